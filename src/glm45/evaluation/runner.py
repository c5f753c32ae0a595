"""Runs a suite against a target: every answer is kept, so an interrupted evaluation goes on where it was."""

import asyncio
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from glm45.config import configuration, to_dict
from glm45.environments.protocol import Failure, Outcome, Reward, Task, assistant
from glm45.environments.verify import RewardConfig, RewardWorkers
from glm45.evaluation.judge import VERDICTS, Judge
from glm45.evaluation.statistics import Estimate, bootstrap
from glm45.evaluation.targets import Answer, PromptTooLongError, Sampling, Target
from glm45.rl.curriculum import pass_at_k
from glm45.seeds import derive_seed

TRANSCRIPTS = "transcripts.jsonl"
ACCEPTANCE = "acceptance.json"  # of several models: the share of drafts that each accepts
RESULT = "result.json"
ERROR = "error"
"""Finish reason of an answer that there is none of; its faults say why."""

Answers = dict[str, list[dict[str, Any]]]
"""Transcript rows by task, in the order of their samples."""
Progress = Callable[[int, int], None]
"""Told how many of how many answers are there."""


def no_progress(done: int, total: int) -> None:
    """Tell nobody."""


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
    """`score` is avg@n; `pass@k`; `well_formed`, `truncated`, `unanswered` (the prompt did not fit the context; such an
    answer scores 0) and every part that the verifier reports."""
    failures: dict[str, int] = field(default_factory=dict)
    """Answers that could not be judged, by kind; they count in no metric."""
    num_answers: int = 0
    mean_tokens: float = 0.0
    """Mean completion tokens of an answer."""
    nats: dict[str, Estimate] = field(default_factory=dict)
    """Held-out nats a token by source (`base`) or by position in a document (`long`), where data were given."""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return asdict(self)


def run_suite(
    target: Target,
    suite: Suite,
    folder: Path,
    *,
    rewards: RewardConfig | None = None,
    judge: Judge | None = None,
    progress: Progress = no_progress,
) -> SuiteResult:
    """Answer and judge every task of a suite; write transcripts and result to `folder`.

    Answers already in `folder` for the same task, sample and settings are kept, and so are a judge's verdicts. With a
    judge, its verdict is the score of every task whose reference is text, and the verifier's opinion a part, `rules`.
    Raises ValueError for a suite without tasks and for tasks that share an id.
    """
    check(suite)
    folder.mkdir(parents=True, exist_ok=True)
    transcripts = Transcripts(folder / TRANSCRIPTS)
    asyncio.run(_answer_all(target, suite, transcripts, progress))
    answers = {
        task.task_id: [
            transcripts.rows[_key(target, task, suite.settings.sampling, sample)]
            for sample in range(suite.settings.num_samples)
        ]
        for task in suite.tasks
    }
    outcomes = _verify(suite, answers, rewards)
    if judge is not None:
        verdicts = Transcripts(folder / VERDICTS)
        asyncio.run(_consult(judge, suite, answers, outcomes, verdicts))
    return store(_summary(target, suite, answers, outcomes), folder)


def check(suite: Suite) -> None:
    """Raise ValueError for a suite without tasks and for tasks that share an id."""
    if not suite.tasks:
        raise ValueError(f"suite {suite.name!r} has no tasks")
    repeated = [name for name, count in Counter(task.task_id for task in suite.tasks).items() if count > 1]
    if repeated:
        raise ValueError(f"suite {suite.name!r} has several tasks with the id {repeated[0]!r}")


def store(result: SuiteResult, folder: Path) -> SuiteResult:
    """Write a result to its folder, whole or not at all, and return it."""
    draft = folder / f".{RESULT}"
    draft.write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    draft.replace(folder / RESULT)
    return result


class Transcripts:
    """Rows by key, in a file that is only appended to: what a killed run had written is there for the next."""

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

    def has(self, key: str) -> bool:
        """Whether there is an answer; one that failed is asked for again."""
        return key in self.rows and self.rows[key].get("finish_reason") != ERROR

    def add(self, key: str, **values: Any) -> None:
        """Keep one row."""
        row = {"key": key, **values}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows[key] = row


def digest(*values: Any) -> str:
    """Return the key of what JSON-ready values say."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:24]


def _key(target: Target, task: Task, sampling: Sampling, sample: int) -> str:
    return digest(target.name, dataclasses.asdict(task), to_dict(sampling), sample)


async def _answer_all(target: Target, suite: Suite, transcripts: Transcripts, progress: Progress) -> None:
    settings = suite.settings
    jobs = [(task, sample) for task in suite.tasks for sample in range(settings.num_samples)]
    keys = {(task.task_id, sample): _key(target, task, settings.sampling, sample) for task, sample in jobs}
    missing = [(task, sample) for task, sample in jobs if not transcripts.has(keys[task.task_id, sample])]
    done = len(jobs) - len(missing)
    progress(done, len(jobs))

    async def answer(task: Task, sample: int) -> None:
        nonlocal done
        seed = derive_seed(settings.sampling.seed, suite.name, task.task_id, sample)
        try:
            answer = await target.answer(task, settings.sampling, seed)
        except PromptTooLongError as error:
            answer = Answer({**assistant(""), "faults": [str(error)]}, ERROR, 0)
        about = {"task_id": task.task_id, "sample": sample, "prompt": task.messages}
        transcripts.add(keys[task.task_id, sample], **about, **asdict(answer))
        done += 1
        progress(done, len(jobs))

    await together(answer(task, sample) for task, sample in missing)


async def together(jobs: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run jobs side by side; the first that fails ends the others, and its error is raised as it was."""
    try:
        async with asyncio.TaskGroup() as group:
            for job in jobs:
                group.create_task(job)
    except* (OSError, ValueError) as failed:
        raise failed.exceptions[0] from None


def _verify(suite: Suite, answers: Answers, rewards: RewardConfig | None) -> dict[str, list[Outcome]]:
    """Return the verifiers' outcomes, by task and sample; where there is no answer, 0."""
    with RewardWorkers(rewards) as workers:
        waiting = {
            task.task_id: [
                workers.submit(task, visible(suite, row["message"])) if row["finish_reason"] != ERROR else None
                for row in answers[task.task_id]
            ]
            for task in suite.tasks
        }
        return {
            name: [future.result() if future else Reward(0.0) for future in futures]
            for name, futures in waiting.items()
        }


async def _consult(
    judge: Judge, suite: Suite, answers: Answers, outcomes: dict[str, list[Outcome]], verdicts: Transcripts
) -> None:
    """Replace the outcomes of tasks whose reference is text by a judge's verdicts."""

    async def consult(task: Task, sample: int) -> None:
        row = answers[task.task_id][sample]
        if row["finish_reason"] == ERROR:
            return
        text = visible(suite, row["message"]).get("content") or ""
        key = digest(judge.name, task.messages, task.answer, text)
        if key not in verdicts.rows:
            correct, said = await judge.verdict(task, text)
            verdicts.add(key, task_id=task.task_id, sample=sample, correct=correct, said=said)
        correct = verdicts.rows[key]["correct"]
        rules = outcomes[task.task_id][sample]
        if correct is None:
            outcomes[task.task_id][sample] = Failure("judge", "the judge gave no verdict")
        else:
            parts = {}
            if isinstance(rules, Reward):
                parts = {"rules": rules.value, "agreement": float(correct == (rules.value >= 1))}
            outcomes[task.task_id][sample] = Reward(float(correct), parts)

    judged = [task for task in suite.tasks if isinstance(task.answer, str)]
    await together(consult(task, sample) for task in judged for sample in range(suite.settings.num_samples))


def _summary(target: Target, suite: Suite, answers: Answers, outcomes: dict[str, list[Outcome]]) -> SuiteResult:
    failures: Counter[str] = Counter()
    values: dict[str, list[float]] = {}
    families = {task.task_id: task.metadata.get("family") for task in suite.tasks}
    for name, rows in answers.items():
        failures.update(outcome.kind for outcome in outcomes[name] if isinstance(outcome, Failure))
        scored = [outcome for outcome in outcomes[name] if isinstance(outcome, Reward)]
        for metric, value in _task_metrics(rows, scored, suite.settings).items():
            values.setdefault(metric, []).append(value)
            if metric == "score" and families[name]:
                values.setdefault(f"part:{families[name]}", []).append(value)
    tokens = [row["num_tokens"] for rows in answers.values() for row in rows]
    return SuiteResult(
        suite=suite.name,
        target=target.name,
        metrics={name: bootstrap(column) for name, column in values.items()},
        failures=dict(failures),
        num_answers=len(tokens),
        mean_tokens=sum(tokens) / len(tokens),
    )


def visible(suite: Suite, message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with as much of its end as is judged."""
    last_characters = suite.settings.last_characters
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
        "unanswered": sum(row["finish_reason"] == ERROR for row in rows) / len(rows),
    }
    if not scored:
        return metrics
    metrics["score"] = sum(reward.value for reward in scored) / len(scored)
    for part in sorted({name for reward in scored for name in reward.parts}):
        metrics[f"part:{part}"] = sum(reward.parts.get(part, 0.0) for reward in scored) / len(scored)
    correct = sum(reward.value >= 1 for reward in scored)
    metrics |= {f"pass@{k}": pass_at_k(len(scored), correct, k) for k in settings.ks if k <= len(scored)}
    return metrics
