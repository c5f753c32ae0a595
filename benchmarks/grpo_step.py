"""A GRPO step (generate, score, train) against TRL's GRPOTrainer: samples per second on the same checkpoint.

Both sides start from one random million-parameter model in the hub layout and take the same prompts, group size,
token cap, temperature and reward (whether the response avoids a digit, which random text often does not). No group
is dropped. The first step of each side is warm-up. CPU, one thread, one process, the sides in turn. On a busy machine
read the ratio by processor time; it leaves out our reward process, which takes a few milliseconds a step.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import io
import json
import tempfile
import time
from pathlib import Path

import torch

from glm45.engine.clients import InProcessClient
from glm45.engine.engine import Engine, EngineConfig
from glm45.environments.arithmetic import arithmetic_tasks
from glm45.environments.verify import RewardWorkers
from glm45.model import hub
from glm45.model.config import ModelConfig
from glm45.model.transformer import Glm45
from glm45.rl.config import LossConfig, RolloutConfig
from glm45.rl.pool import Pool
from glm45.rl.rollout import Rollout, Sampling
from glm45.rl.update import PolicyTrainer
from glm45.text.chat import render
from glm45.text.tokenizer import Tokenizer
from glm45.training.layout import Layout
from glm45.training.parallel import World

PROMPTS, GROUP, CAP = 8, 16, 64
SHAPE = {
    "vocab_size": 384,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 0,
    "use_qk_norm": True,
    "max_position_embeddings": 512,
}


def make_checkpoint(folder: Path) -> Tokenizer:
    tasks = list(arithmetic_tasks(0, 500))
    tokenizer = Tokenizer.train([task.messages[0]["content"] for task in tasks] * 2, vocab_size=300)
    shape = {**SHAPE, "vocab_size": tokenizer.padded_vocab_size, "eos_token_id": tuple(tokenizer.eos_token_ids)}
    hub.save(Glm45(ModelConfig(**shape), seed=1), folder)
    tokenizer.save(folder)
    return tokenizer


Times = list[tuple[float, float]]
"""Seconds by the wall clock and by the processor's."""


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    end = now()
    return end[0] - start[0], end[1] - start[1]


def ours(folder: Path, tokenizer: Tokenizer, steps: int) -> tuple[Times, int]:
    """Return the times of each step, and the tokens that were generated."""
    tasks = [
        dataclasses.replace(task, verifier="instructions", answer=None, metadata={"constraints": {"excludes": "7"}})
        for task in arithmetic_tasks(3, PROMPTS * (steps + 1))
    ]
    trainer = PolicyTrainer(hub.load(folder, dtype=torch.float32), LossConfig(lr=1e-5), World.start(Layout()))
    pool, tokens = Pool(tasks, seed=0), 0
    times: Times = []

    async def run(engine: Engine, rewards: RewardWorkers) -> None:
        nonlocal tokens
        client = InProcessClient(engine)
        rollout = Rollout(client, tokenizer, rewards, RolloutConfig(oversampling=1.0, drop_uninformative=False))
        for step in range(steps + 1):
            start = now()
            made = await rollout.fill(pool, PROMPTS, Sampling(GROUP, CAP, 1.0, 0))
            trainer.update(pool.take(PROMPTS, step), CAP)
            await client.update_weights(None, version=step + 1)
            if step:
                times.append(since(start))
                tokens += sum(sample.num_generated for group in made for sample in group)

    with RewardWorkers() as rewards, Engine(trainer.model, tokenizer, EngineConfig()) as engine:
        asyncio.run(run(engine, rewards))
    return times, tokens


def theirs(folder: Path, steps: int) -> tuple[Times, int]:
    """The same with TRL."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|user|>", pad_token="<|endoftext|>"
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [render(task.messages, add_generation_prompt=True) for task in arithmetic_tasks(3, PROMPTS * (steps + 1))]
    tokens = 0
    times: Times = []

    def reward(completions, completion_ids, **_):
        nonlocal tokens
        tokens += sum(map(len, completion_ids))
        return [float("7" not in text) for text in completions]

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.last = now()

        def on_step_end(self, *_, **__):
            times.append(since(self.last))
            self.last = now()

    with tempfile.TemporaryDirectory() as output:
        arguments = GRPOConfig(
            output_dir=output,
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            max_completion_length=CAP,
            temperature=1.0,
            beta=0.0,
            learning_rate=1e-5,
            max_steps=steps + 1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
    return times[1:], round(tokens * steps / (steps + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Times] = {"glm45": [], "trl": []}
    tokens = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = make_checkpoint(folder)
        for _ in range(options.rounds):
            for side, run in (
                ("glm45", lambda: ours(folder, tokenizer, options.steps)),
                ("trl", lambda: theirs(folder, options.steps)),
            ):
                times, count = run()
                results[side] += times
                tokens[side] = count / options.steps
    ratios = {}
    for place, clock in enumerate(("wall", "processor")):
        rates = {side: PROMPTS * GROUP / min(each[place] for each in times) for side, times in results.items()}
        ratios[clock] = round(rates["glm45"] / rates["trl"], 2)
        for side, rate in rates.items():
            best = f"best of {len(results[side])}; {tokens[side]:.0f} tokens a step"
            print(f"{side:6} {rate:7.1f} samples a second by {clock} ({best})")
    print(json.dumps({"ratio": ratios}))


if __name__ == "__main__":
    main()
