"""Held-out accuracy of a policy while it is trained: greedy and sampled, under the full cap and the current one."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from glm45.environments.protocol import Task
from glm45.rl.config import RLEvaluationConfig
from glm45.rl.metrics import accuracy, accuracy_error, judged_groups
from glm45.rl.pool import Group
from glm45.rl.rollout import Rollout, Sampling
from glm45.seeds import derive_seed

NUM_EXAMPLES = 16


class HeldOut:
    """Held-out tasks; the same prompts and seeds every time, so that a difference is the policy's."""

    def __init__(self, rollout: Rollout, tasks: Sequence[Task], config: RLEvaluationConfig, seed: int):
        self._rollout, self._tasks, self._config = rollout, list(tasks), config
        self._seed = derive_seed(seed, "held out")
        self.examples: list[dict[str, Any]] = []
        """A few greedy answers of the last evaluation, to read."""

    async def evaluate(self, full_cap: int, cap: int) -> dict[str, float]:
        """Return `held_out_greedy` and `held_out_full_cap` (sampled at temperature 1) under the full cap, each with
        its standard error, and `held_out`, sampled under the current cap; also length, reward parts, greedy accuracy
        by domain and sampled accuracy by a property of the tasks. What could not be judged is left out of all
        accuracies and counted in `held_out_failure_share`. Raises ValueError if nothing could be.
        """
        greedy = await self._groups(1, full_cap, 0.0)
        sampled = await self._groups(self._config.num_samples, full_cap, 1.0)
        current = sampled if cap == full_cap else await self._groups(self._config.num_samples, cap, 1.0)
        samples = [sample for group in greedy for sample in group]
        self.examples = [
            {"messages": each.messages, "reward": each.reward, "parts": each.reward_parts, "status": each.status}
            for each in samples[:NUM_EXAMPLES]
        ]
        record = {
            "held_out_greedy": accuracy(greedy),
            "held_out_greedy_error": accuracy_error(greedy),
            "held_out_full_cap": accuracy(sampled),
            "held_out_full_cap_error": accuracy_error(sampled),
            "held_out": accuracy(current),
            "held_out_length": sum(sample.num_generated for sample in samples) / len(samples),
            "held_out_failure_share": _failure_share([*greedy, *sampled]),
        }
        for name in sorted({part for sample in samples for part in sample.reward_parts}):
            values = [sample.reward_parts[name] for sample in samples if name in sample.reward_parts]
            record[f"held_out_part/{name}"] = sum(values) / len(values)
        for domain, groups in _split(judged_groups(greedy), lambda task: task.verifier).items():
            record[f"held_out_greedy/{domain}"] = accuracy(groups)
        if by := self._config.by:
            for value, groups in _split(judged_groups(sampled), lambda task: f"{by} {task.metadata.get(by)}").items():
                record[f"held_out_by/{value}"] = accuracy(groups)
                record[f"held_out_by/{value}_error"] = accuracy_error(groups)
        return record

    async def at_temperature(self, temperature: float, cap: int) -> tuple[float, int]:
        """Return the sampled accuracy at a temperature, and the tokens that it took to find out."""
        groups = await self._groups(self._config.num_samples, cap, temperature)
        return accuracy(groups), sum(sample.num_generated for group in groups for sample in group)

    async def _groups(self, num_samples: int, cap: int, temperature: float) -> list[Group]:
        sampling = Sampling(num_samples, cap, temperature, self._seed)
        return await self._rollout.make_groups(list(enumerate(self._tasks)), sampling)


def _failure_share(groups: Sequence[Group]) -> float:
    unjudged = [sample.reward is None for group in groups for sample in group]
    return sum(unjudged) / len(unjudged)


def _split(groups: Sequence[Group], by: Callable[[Task], str]) -> dict[str, list[Group]]:
    """Return the groups by a property of their task, in the order of its values."""
    parts: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        parts[by(group[0].task)].append(group)
    return dict(sorted(parts.items()))
