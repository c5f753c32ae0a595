"""`glm45 rl pools`: how hard each prompt is for a checkpoint, by unbiased pass@k (report section 3.2).

Every prompt is sampled `num_samples` times; those without a right answer are sampled on, up to `hard_k` in all. The
measurement goes on where it was stopped: each finished prompt is a line of `OUT.partial`.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from glm45.config import configuration, to_dict
from glm45.environments.protocol import Task
from glm45.environments.tasks import read_tasks
from glm45.environments.verify import RewardConfig
from glm45.files import fingerprint, write_atomically
from glm45.rl.config import RolloutConfig
from glm45.rl.curriculum import PoolThresholds
from glm45.rl.metrics import is_correct
from glm45.rl.pool import Group
from glm45.rl.rollout import Rollout, Sampling, open_rollout
from glm45.seeds import derive_seed

GENERATED = ("arithmetic", "reasoning_gym", "tools", "instructions")
"""Verifiers whose tasks come from generators, which know the answers."""


@configuration
class PoolsConfig:
    """What is measured, and how."""

    policy: str = ""
    """Hub folder of the checkpoint."""
    tasks: str = ""
    """JSONL file of tasks. The report takes hard prompts with verified answers only: tasks whose metadata says
    `"verified_answer": false` are left out and counted, those that say nothing are never hard (`has_verified_answer`).
    """
    thresholds: PoolThresholds = PoolThresholds()
    """What makes a prompt moderate or hard."""
    max_tokens: int = 64
    """Cap on a response."""
    temperature: float = 1.0
    """Sampling temperature. Not in the report."""
    seed: int = 0
    """Root seed of the samples."""
    rewards: RewardConfig = RewardConfig()
    """Processes that judge."""
    prompts_at_once: int = 64
    """Prompts that are sampled together, and so lost if the command is killed."""


def measure_pools(config: PoolsConfig, out: str | Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure every task, write `out` and return its contents.

    Raises ValueError if there is nothing to measure or a partial measurement was begun with another configuration.
    """
    out = Path(out)
    every_task = list(read_tasks(config.tasks))
    tasks = [task for task in every_task if task.metadata.get("verified_answer", True)]
    if not tasks:
        raise ValueError(f"{config.tasks} has {len(every_task)} tasks, none with a verified answer: nothing to measure")
    partial = out.with_name(out.name + ".partial")
    with open_rollout(config.policy, tasks, config.rewards, RolloutConfig()) as rollout:
        done = _read_partial(partial, config)
        waiting = [(number, task) for number, task in enumerate(tasks) if task.task_id not in done]
        for first in range(0, len(waiting), config.prompts_at_once):
            rows = asyncio.run(measure(rollout, waiting[first : first + config.prompts_at_once], config))
            done |= {row["task_id"]: row for row in rows}
            with partial.open("a", encoding="utf-8") as sink:
                sink.writelines(json.dumps(row) + "\n" for row in rows)
            say(f"{len(done)} of {len(tasks)} prompts")
    pools: dict[str, list[str]] = {name: [] for name in ("easy", "moderate", "hard", "unsolved", "unverified")}
    for task in tasks:
        pools[done[task.task_id]["pool"]].append(task.task_id)
    result = {
        "config": to_dict(config),
        "counts": {name: len(members) for name, members in pools.items()},
        "left_out": len(every_task) - len(tasks),
        "samples": sum(row["num_samples"] for row in done.values()),
        "generated_tokens": sum(row["generated_tokens"] for row in done.values()),
        "failures": dict(sum((Counter(row["failures"]) for row in done.values()), Counter())),
        "pools": pools,
        "measurements": [done[task.task_id] for task in tasks],
    }
    write_atomically(out, json.dumps(result, indent=1) + "\n")
    partial.unlink()
    return result


def has_verified_answer(task: Task) -> bool:
    """Whether a prompt that is never answered rightly may be hard, and not just have a wrong reference.

    Its metadata says so, or an expert did, or a generator made the answer.
    """
    said = task.metadata.get("verified_answer", task.metadata.get("expert_verified"))
    return said is True or (said is None and task.verifier in GENERATED)


async def measure(rollout: Rollout, prompts: Sequence[tuple[int, Task]], config: PoolsConfig) -> list[dict[str, Any]]:
    """Sample prompts, each with its number in the task set, shallowly, and those without a right answer deeply."""
    thresholds = config.thresholds

    async def sample(prompts: Sequence[tuple[int, Task]], num_samples: int, purpose: str) -> list[Group]:
        seed = derive_seed(config.seed, purpose)
        sampling = Sampling(num_samples, config.max_tokens, config.temperature, seed)
        return await rollout.make_groups(prompts, sampling)

    rows: list[dict[str, Any]] = []
    for group in await sample(prompts, thresholds.num_samples, "shallow"):
        row = _counts(group)
        # Samples that could not be judged are no samples; fewer than k of them say nothing about pass@k.
        judged = len(group) - len(row["failures"])
        pool = thresholds.classify(row["num_correct"], num_samples=judged) if judged >= thresholds.k else "unsolved"
        if pool == "deeper" and not has_verified_answer(group[0].task):
            pool = "unverified"
        rows.append({"task_id": group[0].task.task_id, "pool": pool, **row})
    deeper = [place for place, row in enumerate(rows) if row["pool"] == "deeper"]
    extra = thresholds.hard_k - thresholds.num_samples
    groups = await sample([prompts[place] for place in deeper], extra, "deep") if extra else [[] for _ in deeper]
    for place, group in zip(deeper, groups, strict=True):
        row = rows[place]
        row |= {name: row[name] + more for name, more in _counts(group).items()}
        row["pool"] = "hard" if row["num_correct"] else "unsolved"
    return rows


def _counts(group: Group) -> dict[str, Any]:
    """Return what a group of samples of one prompt adds to its measurement."""
    return {
        "num_samples": len(group),
        "num_correct": sum(map(is_correct, group)),
        "generated_tokens": sum(sample.num_generated for sample in group),
        "failures": [sample.metadata["failure"]["kind"] for sample in group if sample.status == "failed"],
    }


def _read_partial(path: Path, config: PoolsConfig) -> dict[str, dict[str, Any]]:
    """Return the prompts measured so far; the first line says with which configuration."""
    files = {name: fingerprint(getattr(config, name)) for name in ("policy", "tasks")}  # which may have moved
    header = json.dumps({"config": {**to_dict(config), **files}})
    if not path.exists():
        write_atomically(path, header + "\n")
        return {}
    first, *lines = path.read_bytes().split(b"\n")[:-1]
    if first.decode() != header:
        raise ValueError(f"{path} was begun with another configuration: remove it to begin anew")
    # Without a line cut short by a kill.
    write_atomically(path, b"".join(line + b"\n" for line in [first, *lines]).decode())
    return {row["task_id"]: row for row in map(json.loads, lines)}
