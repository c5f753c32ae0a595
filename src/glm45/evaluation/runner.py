"""Runs a suite against a target: every answer is kept, so an interrupted evaluation goes on where it was."""

import asyncio
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from glm45.config import configuration, to_dict
from glm45.environments.protocol import Failure, Reward, Task
from glm45.environments.verify import RewardConfig, RewardWorkers
from glm45.evaluation.statistics import Estimate, bootstrap
from glm45.evaluation.targets import Answer, Sampling, Target
from glm45.rl.curriculum import pass_at_k
from glm45.seeds import derive_seed

TRANSCRIPTS = "transcripts.jsonl"
RESULT = "result.json"


@configuration
class SuiteSettings:
    """How a suite is run."""

    num_samples: int = 1
    """Answers drawn for each task; their average is avg@n."""
    ks: tuple[int, ...] = (1,)
    """pass@k is reported for each of these that `num_samples` allows."""
    sampling: Sampling = Sampling()
    """How answers are drawn."""
    last_characters: int | None = None
    """Judge only the end of the content, as the report does for GPQA (1,024 characters); None judges all of it."""


@dataclass(frozen=True)
class Suite:
    """Tasks with the way they are run."""

    name: str
    tasks: Sequence[Task]
    settings: SuiteSettings


@dataclass(frozen=True)
class SuiteResult:
    """What a suite gave."""

    suite: str
    target: str
    metrics: dict[str, Estimate]
    """`score` is avg@n; `pass@k`; `well_formed`, `truncated` and every part that the verifier reports."""
    failures: dict[str, int] = field(default_factory=dict)
    """Answers that could not be judged, by kind; they count in no metric."""
    num_answers: int = 0
    mean_tokens: float = 0.0
    """Mean completion tokens of an answer."""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return asdict(self)


def run_suite(
    target: Target,
    suite: Suite,
    folder: Path,
    *,
    rewards: RewardConfig | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SuiteResult:
    """Answer and judge every task of a suite; write transcripts and result to `folder`.

    Answers already in `folder` for the same task, sample and settings are kept. Raises ValueError for a suite without
    tasks and for tasks that share an id.
    """
    if not suite.tasks:
        raise ValueError(f"suite {suite.name!r} has no tasks")
    repeated = [name for name, count in Counter(task.task_id for task in suite.tasks).items() if count > 1]
    if repeated:
        raise ValueError(f"suite {suite.name!r} has several tasks with the id {repeated[0]!r}")
    folder.mkdir(parents=True, exist_ok=True)
    transcripts = _Transcripts(folder / TRANSCRIPTS)
    asyncio.run(_answer_all(target, suite, transcripts, progress))
    result = _judge(target, suite, transcripts, rewards)
    draft = folder / f".{RESULT}"
    draft.write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    draft.replace(folder / RESULT)
    return result


class _Transcripts:
    """Answers by task, sample and settings, in a file that is only appended to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # the last line of a killed run
                    continue
                self.rows[row["key"]] = row

    def add(self, key: str, task: Task, sample: int, answer: Answer) -> None:
        """Keep one answer."""
        row = {"key": key, "task_id": task.task_id, "sample": sample, "prompt": task.messages, **asdict(answer)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows[key] = row


def _key(target: Target, task: Task, sampling: Sampling, sample: int) -> str:
    text = json.dumps([target.name, dataclasses.asdict(task), to_dict(sampling), sample], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


async def _answer_all(
    target: Target, suite: Suite, transcripts: _Transcripts, progress: Callable[[int, int], None]
) -> None:
    settings = suite.settings
    jobs = [(task, sample) for task in suite.tasks for sample in range(settings.num_samples)]
    keys = {(task.task_id, sample): _key(target, task, settings.sampling, sample) for task, sample in jobs}
    missing = [(task, sample) for task, sample in jobs if keys[task.task_id, sample] not in transcripts.rows]
    done = len(jobs) - len(missing)
    progress(done, len(jobs))

    async def answer(task: Task, sample: int) -> None:
        nonlocal done
        seed = derive_seed(settings.sampling.seed, suite.name, task.task_id, sample)
        transcripts.add(keys[task.task_id, sample], task, sample, await target.answer(task, settings.sampling, seed))
        done += 1
        progress(done, len(jobs))

    async with asyncio.TaskGroup() as group:
        for task, sample in missing:
            group.create_task(answer(task, sample))


def _judge(target: Target, suite: Suite, transcripts: _Transcripts, rewards: RewardConfig | None) -> SuiteResult:
    settings = suite.settings
    failures: Counter[str] = Counter()
    values: dict[str, list[float]] = {}
    tokens: list[int] = []
    with RewardWorkers(rewards) as workers:
        waiting = []
        for task in suite.tasks:
            rows = [
                transcripts.rows[_key(target, task, settings.sampling, sample)]
                for sample in range(settings.num_samples)
            ]
            tokens += [row["num_tokens"] for row in rows]
            judged = [workers.submit(task, _visible(row["message"], settings.last_characters)) for row in rows]
            waiting.append((rows, judged))
        for rows, judged in waiting:
            outcomes = [future.result() for future in judged]
            failures.update(outcome.kind for outcome in outcomes if isinstance(outcome, Failure))
            scored = [outcome for outcome in outcomes if isinstance(outcome, Reward)]
            for name, value in _task_metrics(rows, scored, settings).items():
                values.setdefault(name, []).append(value)
    return SuiteResult(
        suite=suite.name,
        target=target.name,
        metrics={name: bootstrap(column) for name, column in values.items()},
        failures=dict(failures),
        num_answers=len(tokens),
        mean_tokens=sum(tokens) / len(tokens),
    )


def _visible(message: dict[str, Any], last_characters: int | None) -> dict[str, Any]:
    if last_characters is None or not message.get("content"):
        return message
    return {**message, "content": message["content"][-last_characters:]}


def _task_metrics(
    rows: Sequence[dict[str, Any]], scored: Sequence[Reward], settings: SuiteSettings
) -> dict[str, float]:
    """Return one task's averages over its samples; only judged answers count in what was judged."""
    metrics = {
        "well_formed": sum(not row["message"].get("faults") for row in rows) / len(rows),
        "truncated": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
    }
    if not scored:
        return metrics
    metrics["score"] = sum(reward.value for reward in scored) / len(scored)
    for part in sorted({name for reward in scored for name in reward.parts}):
        metrics[f"part:{part}"] = sum(reward.parts.get(part, 0.0) for reward in scored) / len(scored)
    correct = sum(reward.value >= 1 for reward in scored)
    metrics |= {f"pass@{k}": pass_at_k(len(scored), correct, k) for k in settings.ks if k <= len(scored)}
    return metrics
