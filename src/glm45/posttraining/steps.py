"""The steps of expert iteration, each a function of a pipeline's context (see `glm45.posttraining.experts`)."""

import asyncio
import dataclasses
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from glm45.config import from_dict
from glm45.corpus.arithmetic import ArithmeticConfig
from glm45.environments.arithmetic import arithmetic_tasks
from glm45.environments.instructions import instruction_tasks
from glm45.environments.protocol import Task
from glm45.environments.tasks import read_tasks, split_tasks, write_tasks
from glm45.environments.tools import tool_tasks
from glm45.model.config import ModelConfig
from glm45.pipeline import Context
from glm45.posttraining.coldstart import ColdStartConfig, cold_start
from glm45.posttraining.comparison import Retention, arms_table, compare_arms, retention, retention_table
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
from glm45.posttraining.selection import drop_shorter_prompts, scale_responses
from glm45.posttraining.sft import SFTConfig, fine_tune
from glm45.rl.config import RLConfig
from glm45.rl.driver import run_rl
from glm45.rl.metrics import is_correct
from glm45.rl.pool import Group
from glm45.rl.pools import PoolsConfig, measure_pools
from glm45.rl.rollout import Rollout, Sampling, open_rollout
from glm45.seeds import derive_seed
from glm45.text.chat import render
from glm45.text.tokenizer import Tokenizer
from glm45.training.metrics import last_step
from glm45.training.run import Run

FAMILIES: dict[str, Callable[[int, int], Iterator[Task]]] = {
    "arithmetic": arithmetic_tasks,
    "arithmetic-direct": lambda seed, count: direct(arithmetic_tasks(seed, count)),
    "tools": tool_tasks,
    "instructions": instruction_tasks,
}


def direct(tasks: Iterator[Task]) -> Iterator[Task]:
    """Ask the same without reasoning."""
    for task in tasks:
        yield dataclasses.replace(task, task_id=f"direct/{task.task_id}", thinking=False)


def adopt_base(context: Context) -> None:
    """Copy the given base model, so that the run holds everything it was made from."""
    shutil.copytree(context.config["base"], context.folder / "model", dirs_exist_ok=True)


def train_base(context: Context) -> None:
    """Train a small base and its tokenizer on sound answers of every domain."""
    config = context.config
    cold = from_dict(ColdStartConfig, config["cold_start"])
    conversations = _mixed(config["counts"], derive_seed(config["seed"], "base"), cold.sound)
    tokenizer = Tokenizer.train(_plain_texts(conversations[:4000]), config["vocab_size"])
    _train_from_nothing(context, conversations, tokenizer)


def train_policy(context: Context) -> None:
    """Train a small policy and its tokenizer on one domain's cold start, faults included: the start of RL alone."""
    config = context.config
    cold = from_dict(ColdStartConfig, config["cold_start"])
    conversations = list(cold_start(config["domain"], config["seed"], config["count"], cold))
    tokenizer = Tokenizer.train(_plain_texts(conversations[:4000]), config["vocab_size"])
    _train_from_nothing(context, conversations, tokenizer)


def tasks(context: Context) -> None:
    """Write training and held-out tasks of each domain, split by hash; `arithmetic` gives that family's problems."""
    config = context.config
    families = dict(FAMILIES)
    if "arithmetic" in config:
        problems = from_dict(ArithmeticConfig, config["arithmetic"])
        families["arithmetic"] = lambda seed, count: arithmetic_tasks(seed, count, problems)
        families["arithmetic-direct"] = lambda seed, count: direct(arithmetic_tasks(seed, count, problems))
    counts = {}
    for domain in config["domains"]:
        family = families[domain](derive_seed(config["seed"], "tasks", domain), config["num_tasks"])
        different = {task.task_id: task for task in family}
        train, held_out = split_tasks(different.values())
        counts[domain] = {
            "train": write_tasks(context.folder / f"{domain}.train.jsonl", train),
            "held_out": write_tasks(context.folder / f"{domain}.held_out.jsonl", held_out),
        }
    _write_json(context.folder / "counts.json", counts)


def pools(context: Context) -> None:
    """Measure how hard the training tasks of a domain are for the input model."""
    source = _model_folder(context)
    config = dataclasses.replace(
        from_dict(PoolsConfig, context.config["pools"]),
        policy=str(source / "model"),
        tasks=str(context.inputs["tasks"] / f"{context.config['domain']}.train.jsonl"),
        seed=context.config["seed"],
    )
    measure_pools(config, context.folder / "pools.json")


def expert_cold_start(context: Context) -> None:
    """Fine-tune the base on a small set of worked answers of an expert's domains."""
    config = context.config
    cold = from_dict(ColdStartConfig, config["cold_start"])
    conversations = _mixed(dict.fromkeys(config["domains"], config["count"]), config["seed"], cold)
    write_conversations(context.folder / "conversations.jsonl", conversations)
    base = context.inputs["base"] / "model"
    _fine_tune(context, conversations, Tokenizer.load(base), base)


def expert_rl(context: Context) -> None:
    """Train the step's input model by RL on the tasks of one domain, or on as many of each of several."""
    for split in ("train", "held_out"):
        files = [context.inputs["tasks"] / f"{domain}.{split}.jsonl" for domain in context.config["domains"]]
        write_tasks(context.folder / f"{split}.jsonl", equal_parts([list(read_tasks(file)) for file in files]))
    measured = context.inputs.get("pools")
    config = dataclasses.replace(
        from_dict(RLConfig, {**context.config["rl"], "pools": str(measured / "pools.json") if measured else ""}),
        policy=str(_model_folder(context) / "model"),
        tasks=str(context.folder / "train.jsonl"),
        held_out=str(context.folder / "held_out.jsonl"),
        seed=context.config["seed"],
    )
    with context.watching(lambda: last_step(context.folder) / max(1, config.steps)):
        policy = run_rl(config, context.folder)
    shutil.copytree(policy, context.folder / "model", dirs_exist_ok=True)


def equal_parts(domains: list[list[Task]]) -> list[Task]:
    """Return as many tasks of each domain as the smallest has: a pool draws prompts alike, whatever their domain."""
    fewest = min(map(len, domains))
    return [task for tasks in domains for task in tasks[:fewest]]


def expert_trajectories(context: Context) -> None:
    """Sample an expert on training prompts and keep what passes the filters, as conversations."""
    config = context.config
    collect = from_dict(TrajectoryConfig, config["trajectories"])
    source = _model_folder(context)
    prompts = [
        task
        for domain in config["domains"]
        for task in islice(read_tasks(context.inputs["tasks"] / f"{domain}.train.jsonl"), collect.num_prompts)
    ]
    rl = from_dict(RLConfig, config["rl"])
    sampling = Sampling(collect.num_samples, rl.lengths.full, 1.0, derive_seed(config["seed"], "trajectories"))
    with open_rollout(source / "model", prompts, rl.rewards, rl.rollout) as rollout:
        groups, hard = asyncio.run(collect_answers(rollout, prompts, sampling, collect))
    report = reject([sample for group in groups for sample in group], collect.rejection)
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


async def collect_answers(
    rollout: Rollout, prompts: list[Task], sampling: Sampling, collect: TrajectoryConfig
) -> tuple[list[Group], set[str]]:
    """Sample every prompt, and the hard ones further; return all groups and the ids of the hard prompts."""
    numbered = list(enumerate(prompts))
    groups = await rollout.make_groups(numbered, sampling)
    hard = {group[0].task.task_id for group in groups if sum(map(is_correct, group)) < collect.hard_below * len(group)}
    if collect.hard_samples and hard:
        seed = derive_seed(sampling.seed, "hard")
        deeper = dataclasses.replace(sampling, num_samples=collect.hard_samples, seed=seed)
        again = [(number, task) for number, task in numbered if task.task_id in hard]
        groups += await rollout.make_groups(again, deeper)
    return groups, hard


def overall_sft(context: Context) -> None:
    """Fine-tune the base on every expert's trajectories, thinking and direct ones balanced."""
    config = context.config
    conversations: list[Conversation] = []
    for name, folder in context.inputs.items():
        if name != "base":
            conversations += read_conversations(folder / "conversations.jsonl")
    replay = config["replay"]
    sound, seed = from_dict(ColdStartConfig, replay["cold_start"]), derive_seed(config["seed"], "replay")
    conversations += _mixed(replay["counts"], seed, sound)
    balanced = balance_modes(conversations, from_dict(ModeBalance, config["balance"]), config["seed"])
    write_conversations(context.folder / "conversations.jsonl", balanced)
    counts = Counter(conversation.metadata["domain"] for conversation in balanced)
    _write_json(context.folder / "mixture.json", {"before_balance": len(conversations), **counts})
    base = context.inputs["base"] / "model"
    _fine_tune(context, balanced, Tokenizer.load(base), base)


def comparison(context: Context) -> None:
    """Compare the unified model with each expert on the expert's held-out tasks, in the mode that belongs to them."""
    config = context.config
    rl = from_dict(RLConfig, config["rl"])
    sampling = Sampling(config["num_samples"], rl.lengths.full, 1.0, derive_seed(config["seed"], "comparison"))
    rows: dict[str, Retention] = {}
    for name, domains in config["experts"].items():
        files = [context.inputs["tasks"] / f"{domain}.held_out.jsonl" for domain in domains]
        held_out = [task for file in files for task in read_tasks(file)]
        expert, unified = (
            sample_groups(context.inputs[model] / "model", held_out, sampling, rl)
            for model in (f"{name}-rl", config["unified"])
        )
        rows[name] = retention(expert, unified)
    _write_json(context.folder / "comparison.json", {name: dataclasses.asdict(row) for name, row in rows.items()})
    (context.folder / "comparison.md").write_text(retention_table(rows))


def arms(context: Context) -> None:
    """Put the runs of an experiment beside each other: what they reached and what that cost."""
    rows = compare_arms(context.inputs)
    _write_json(context.folder / "arms.json", rows)
    (context.folder / "arms.md").write_text(arms_table(rows))


def sample_groups(policy: Path, prompts: list[Task], sampling: Sampling, rl: RLConfig) -> list[Group]:
    """Sample and judge a group for each prompt with the policy in a hub folder."""
    with open_rollout(policy, prompts, rl.rewards, rl.rollout) as rollout:
        return asyncio.run(rollout.make_groups(list(enumerate(prompts)), sampling))


def _model_folder(context: Context) -> Path:
    """Return the input that holds a model: all others have names that say what they are."""
    return next(folder for name, folder in context.inputs.items() if name not in ("tasks", "pools"))


def _train_from_nothing(context: Context, conversations: list[Conversation], tokenizer: Tokenizer) -> None:
    """Train random weights of the configured shape, with the vocabulary of the tokenizer."""
    shape = dataclasses.replace(
        from_dict(ModelConfig, context.config["shape"]),
        vocab_size=tokenizer.padded_vocab_size,
        eos_token_id=tuple(tokenizer.eos_token_ids),
    )
    _fine_tune(context, conversations, tokenizer, shape)


def _fine_tune(
    context: Context, conversations: list[Conversation], tokenizer: Tokenizer, base: Path | ModelConfig
) -> None:
    """Fine-tune as the step's configuration says, and tell how far it is."""

    def fraction() -> float:
        try:
            return Run.read(context.folder).fraction()
        except FileNotFoundError:  # still packing
            return 0.0

    with context.watching(fraction):
        fine_tune(context.folder, conversations, tokenizer, base, from_dict(SFTConfig, context.config["sft"]))


def _mixed(counts: Mapping[str, int], seed: int, config: ColdStartConfig) -> list[Conversation]:
    """Return so many conversations of every domain, shuffled."""
    conversations = [
        conversation for domain, count in counts.items() for conversation in cold_start(domain, seed, count, config)
    ]
    random.Random(seed).shuffle(conversations)
    return conversations


def _plain_texts(conversations: list[Conversation]) -> Iterator[str]:
    """Yield what the tokenizer must spell: the rendered conversations between their special tokens."""
    for conversation in conversations:
        yield render(conversation.messages, tools=conversation.tools or None)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
