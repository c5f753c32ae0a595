"""The steps of expert iteration, each a function of a pipeline's context (see `glm45.posttraining.experts`)."""

import asyncio
import dataclasses
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from glm45.config import from_dict
from glm45.engine.clients import InProcessClient
from glm45.engine.engine import Engine, EngineConfig
from glm45.environments.arithmetic import arithmetic_tasks
from glm45.environments.instructions import instruction_tasks
from glm45.environments.protocol import Task
from glm45.environments.tasks import read_tasks, split_tasks, write_tasks
from glm45.environments.tools import tool_tasks
from glm45.environments.verify import RewardWorkers
from glm45.model import hub
from glm45.model.config import ModelConfig
from glm45.pipeline import Context
from glm45.posttraining.coldstart import ColdStartConfig, cold_start
from glm45.posttraining.conversations import (
    Conversation,
    ModeBalance,
    answered,
    balance_modes,
    read_conversations,
    write_conversations,
)
from glm45.posttraining.experts import TrajectoryConfig
from glm45.posttraining.rejection import reject
from glm45.posttraining.selection import drop_shorter_prompts, group_by_prompt, scale_responses
from glm45.posttraining.sft import SFTConfig, fine_tune
from glm45.rl.config import RLConfig
from glm45.rl.driver import run_rl
from glm45.rl.metrics import accuracy
from glm45.rl.pool import Group
from glm45.rl.rollout import Rollout, Sampling
from glm45.seeds import derive_seed
from glm45.text.chat import render
from glm45.text.tokenizer import Tokenizer

FAMILIES = {"arithmetic": arithmetic_tasks, "tools": tool_tasks, "instructions": instruction_tasks}


def adopt_base(context: Context) -> None:
    """Copy the given base model, so that the run holds everything it was made from."""
    shutil.copytree(context.config["base"], context.folder / "model", dirs_exist_ok=True)


def train_base(context: Context) -> None:
    """Train a small base and its tokenizer on sound answers of every domain."""
    config = context.config
    cold = from_dict(ColdStartConfig, config["cold_start"])
    careful = dataclasses.replace(cold.arithmetic, careful_share=1.0)
    sound = ColdStartConfig(arithmetic=careful, sound_share=1.0)
    conversations = _mixed(config["domains"], derive_seed(config["seed"], "base"), config["count"], sound)
    tokenizer = Tokenizer.train(_plain_texts(conversations[:4000]), config["vocab_size"])
    shape = from_dict(ModelConfig, config["shape"])
    shape = dataclasses.replace(
        shape, vocab_size=tokenizer.padded_vocab_size, eos_token_id=tuple(tokenizer.eos_token_ids)
    )
    fine_tune(context.folder, conversations, tokenizer, shape, from_dict(SFTConfig, config["sft"]))


def tasks(context: Context) -> None:
    """Write training and held-out tasks of each domain, split by hash."""
    counts = {}
    for expert in context.config["experts"]:
        domain = expert["domain"]
        family = FAMILIES[domain](derive_seed(context.config["seed"], "tasks", domain), context.config["num_tasks"])
        different = {task.task_id: task for task in family}
        train, held_out = split_tasks(different.values())
        counts[domain] = {
            "train": write_tasks(context.folder / f"{domain}.train.jsonl", train),
            "held_out": write_tasks(context.folder / f"{domain}.held_out.jsonl", held_out),
        }
    _write_json(context.folder / "counts.json", counts)


def expert_cold_start(context: Context) -> None:
    """Fine-tune the base on a small set of one domain's worked answers."""
    config = context.config
    cold = from_dict(ColdStartConfig, config["cold_start"])
    conversations = list(cold_start(config["domain"], config["seed"], config["count"], cold))
    write_conversations(context.folder / "conversations.jsonl", conversations)
    base = context.inputs["base"] / "model"
    fine_tune(context.folder, conversations, Tokenizer.load(base), base, from_dict(SFTConfig, config["sft"]))


def expert_rl(context: Context) -> None:
    """Train the step's input model by RL on the tasks of one domain or several."""
    source = next(folder for name, folder in context.inputs.items() if name != "tasks")
    for split in ("train", "held_out"):
        with (context.folder / f"{split}.jsonl").open("w") as sink:
            for domain in context.config["domains"]:
                sink.write((context.inputs["tasks"] / f"{domain}.{split}.jsonl").read_text())
    config = dataclasses.replace(
        from_dict(RLConfig, context.config["rl"]),
        policy=str(source / "model"),
        tasks=str(context.folder / "train.jsonl"),
        held_out=str(context.folder / "held_out.jsonl"),
        seed=context.config["seed"],
    )
    policy = run_rl(config, context.folder)
    shutil.copytree(policy, context.folder / "model", dirs_exist_ok=True)


def expert_trajectories(context: Context) -> None:
    """Sample an expert on training prompts and keep what passes the filters, as conversations."""
    config = context.config
    collect = from_dict(TrajectoryConfig, config["trajectories"])
    source = next(folder for name, folder in context.inputs.items() if name != "tasks")
    prompts = list(read_tasks(context.inputs["tasks"] / f"{config['domain']}.train.jsonl"))[: collect.num_prompts]
    rl = from_dict(RLConfig, config["rl"])
    sampling = Sampling(collect.num_samples, rl.lengths.full, 1.0, derive_seed(config["seed"], "trajectories"))
    groups = sample_groups(source / "model", prompts, sampling, rl)
    report = reject([sample for group in groups for sample in group], collect.rejection)
    right = {
        task_id: sum(map(bool, (sample.reward for sample in group))) / collect.num_samples
        for task_id, group in group_by_prompt([sample for group in groups for sample in group]).items()
    }
    hard = {task_id for task_id, share in right.items() if share < collect.hard_below}
    selected = drop_shorter_prompts(report.kept, collect.drop_shorter)
    kept = scale_responses(selected, hard, collect.hard_responses)
    conversations = [answered(sample.task, sample.response, source=source.name) for sample in kept]
    write_conversations(context.folder / "conversations.jsonl", conversations)
    counts = {
        "filters": dict(report.counts),
        "examples": report.examples,
        "hard_prompts": len(hard),
        "kept_after_selection": len(selected),
        "conversations": len(conversations),
    }
    _write_json(context.folder / "rejection.json", counts)


def overall_sft(context: Context) -> None:
    """Fine-tune the base on every expert's trajectories, thinking and direct ones balanced."""
    config = context.config
    conversations: list[Conversation] = []
    for name, folder in context.inputs.items():
        if name != "base":
            conversations += read_conversations(folder / "conversations.jsonl")
    balanced = balance_modes(conversations, from_dict(ModeBalance, config["balance"]), config["seed"])
    write_conversations(context.folder / "conversations.jsonl", balanced)
    counts = Counter(conversation.metadata["domain"] for conversation in balanced)
    _write_json(context.folder / "mixture.json", {"before_balance": len(conversations), **counts})
    base = context.inputs["base"] / "model"
    fine_tune(context.folder, balanced, Tokenizer.load(base), base, from_dict(SFTConfig, config["sft"]))


def comparison(context: Context) -> None:
    """Compare the unified model with each expert on the expert's held-out tasks, in the mode that belongs to them."""
    config = context.config
    rl = from_dict(RLConfig, config["rl"])
    sampling = Sampling(1, rl.lengths.full, 0.0, 0)
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    for name, domain in config["experts"].items():
        held_out = list(read_tasks(context.inputs["tasks"] / f"{domain}.held_out.jsonl"))
        for model in (f"{name}-rl", config["unified"]):
            groups = sample_groups(context.inputs[model] / "model", held_out, sampling, rl)
            scores[name][model] = accuracy(groups)
        scores[name]["retention"] = scores[name][config["unified"]] / max(scores[name][f"{name}-rl"], 1e-9)
    _write_json(context.folder / "comparison.json", scores)


def sample_groups(policy: Path, prompts: list[Task], sampling: Sampling, rl: RLConfig) -> list[Group]:
    """Sample and judge a group for each prompt with the policy in a hub folder."""
    tokenizer = Tokenizer.load(policy)
    model = hub.load(policy, dtype=torch.float32).eval()
    with RewardWorkers(rl.rewards) as rewards, Engine(model, tokenizer, EngineConfig()) as engine:
        rollout = Rollout(InProcessClient(engine), tokenizer, rewards, rl.rollout)
        return asyncio.run(rollout.make_groups(list(enumerate(prompts)), sampling))


def _mixed(domains: list[str], seed: int, count: int, config: ColdStartConfig) -> list[Conversation]:
    """Return conversations of every domain in turn."""
    makers = [cold_start(domain, seed, count, config) for domain in domains]
    return [conversation for turn in zip(*makers, strict=True) for conversation in turn]


def _plain_texts(conversations: list[Conversation]) -> Iterator[str]:
    """Yield what the tokenizer must spell: the rendered conversations between their special tokens."""
    for conversation in conversations:
        yield render(conversation.messages, tools=conversation.tools or None)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
