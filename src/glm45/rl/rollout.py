"""Trajectories: prompts in, judged groups out. Scoring a group overlaps with generating the others.

Speaks to any engine client (in-process, SGLang, vLLM); sampled token ids are kept as they were sampled.
"""

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from glm45.engine.clients import EngineClient, InProcessClient
from glm45.engine.engine import Engine, EngineConfig
from glm45.engine.request import Completion, SamplingParams
from glm45.environments.formats import format_faults, language_mixing_rate, repetition_rate
from glm45.environments.protocol import Task
from glm45.environments.tasks import prompt_text
from glm45.environments.tokens import prompt_ids, read_answer
from glm45.environments.verify import RewardConfig, RewardWorkers
from glm45.model import hub
from glm45.rl.batch import teaches
from glm45.rl.config import LossConfig, PenaltyConfig, RolloutConfig
from glm45.rl.pool import Group, Pool
from glm45.rl.sample import Sample
from glm45.seeds import derive_seed
from glm45.text.tokenizer import Tokenizer

REPETITION_LIMIT, LANGUAGE_MIXING_LIMIT = 0.2, 0.05


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a group is sampled."""

    num_samples: int
    max_tokens: int
    temperature: float
    seed: int


class Rollout:
    """Makes groups with one engine client and one set of reward processes."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        rewards: RewardWorkers,
        config: RolloutConfig,
        loss: LossConfig | None = None,
    ):
        """`loss` says what becomes of truncated samples, and so which groups are worth landing."""
        self.client, self.tokenizer, self.rewards, self.config = client, tokenizer, rewards, config
        self.loss = loss or LossConfig()

    async def fill(self, pool: Pool, wanted: int, sampling: Sampling) -> list[Group]:
        """Make groups until `wanted` informative ones have landed in `pool`, or the rounds are used up.

        Returns every group that was made, the dropped ones too: mean rewards are taken over all of them, or they
        would be biased by the filter.
        """
        made: list[Group] = []
        for _ in range(self.config.max_rounds):
            missing = wanted - pool.num_landed
            if missing <= 0:
                break
            begun = [pool.begin() for _ in range(math.ceil(missing * self.config.oversampling))]
            groups = await self.make_groups(begun, sampling)
            for (group_id, _), group in zip(begun, groups, strict=True):
                self._admit(pool, group_id, group)
            made += groups
        return made

    async def make_groups(self, prompts: Sequence[tuple[int, Task]], sampling: Sampling) -> list[Group]:
        """Sample and judge a group for each (group id, task), in this order whatever finishes first.

        The engine waits until it has all of them: what shares a batch then never depends on the clock, and with it
        the last bits of log-probabilities.
        """
        await self.client.pause()
        groups = [asyncio.create_task(self.make_group(group_id, task, sampling)) for group_id, task in prompts]
        await asyncio.sleep(0)  # each runs up to its request
        await self.client.resume()
        return await asyncio.gather(*groups)

    async def make_group(self, group_id: int, task: Task, sampling: Sampling) -> Group:
        """Sample one group and judge it; the seed depends on the group's id and not on what else is generated."""
        prompt = prompt_ids(task, self.tokenizer)
        params = SamplingParams(
            n=sampling.num_samples,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=derive_seed(sampling.seed, "group", group_id),
        )
        completions = await self.client.generate(prompt, params)
        group = [self._sample(group_id, task, prompt, sampling, each) for each in completions]
        await asyncio.gather(*(self._judge(sample) for sample in group if sample.status != "aborted"))
        return group

    def _sample(self, group_id: int, task: Task, prompt: list[int], sampling: Sampling, made: Completion) -> Sample:
        sample = Sample(task=task, group_id=group_id, index=made.index)
        sample.metadata["temperature"] = sampling.temperature
        sample.append_context(list(prompt), list(task.messages))
        if made.finish_reason == "abort":
            sample.status = "aborted"
            return sample
        sample.append_generated(
            list(made.token_ids),
            list(made.logprobs),
            read_answer(made.token_ids, task, self.tokenizer),
            min(made.weight_versions),
            truncated=made.finish_reason == "length",
        )
        return sample

    async def _judge(self, sample: Sample) -> None:
        outcome = await asyncio.wrap_future(self.rewards.submit(sample.task, sample.response))
        sample.judge(outcome)
        if sample.reward is not None:
            penalise(sample, self.config.penalties)

    def _admit(self, pool: Pool, group_id: int, group: Group) -> None:
        """Land what can be learnt from; count the rest by reason."""
        if all(sample.status == "aborted" for sample in group):
            pool.give_back(group_id)
            return
        judged = [sample for sample in group if sample.reward is not None]
        pool.counts["failed_samples"] += sum(sample.status == "failed" for sample in group)
        if len(judged) < 2:
            pool.drop(group_id, "failed")
        elif self.config.drop_uninformative and not teaches(judged, self.loss):
            pool.drop(group_id, "uninformative")
        else:
            pool.land(judged)


@contextmanager
def open_rollout(
    policy: str | Path, tasks: Sequence[Task], rewards: RewardConfig, config: RolloutConfig
) -> Iterator[Rollout]:
    """Sample the policy in a hub folder. Raises ValueError if a verifier of `tasks` cannot judge on this machine."""
    tokenizer = Tokenizer.load(policy)
    model = hub.load(policy, dtype=torch.float32, device=hub.best_device()).eval()
    with RewardWorkers(rewards) as workers, Engine(model, tokenizer, EngineConfig()) as engine:
        workers.prove(task.verifier for task in tasks)
        yield Rollout(InProcessClient(engine), tokenizer, workers, config)


def penalise(sample: Sample, config: PenaltyConfig) -> None:
    """Take note of faults of form in the reward's parts, and subtract the penalties (report section 3.4)."""
    text = f"{sample.response.get('reasoning_content') or ''} {sample.response.get('content') or ''}"
    faulty = bool(format_faults(sample.response, sample.task.thinking)) and sample.status == "completed"
    repetition = repetition_rate(text)
    mixing = language_mixing_rate(text, allowed=prompt_text(sample.task))
    sample.metadata |= {"faulty": faulty, "repetition_rate": repetition, "language_mixing_rate": mixing}
    for name, size, holds in (
        ("format_penalty", config.format, faulty),
        ("repetition_penalty", config.repetition, repetition > REPETITION_LIMIT),
        ("language_mixing_penalty", config.language_mixing, mixing > LANGUAGE_MIXING_LIMIT),
    ):
        if size and holds:
            sample.add_penalty(name, -size)
