"""Multiple choice by likelihood, as base models are evaluated: the choice that the model finds most likely counts."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from glm45.environments.protocol import Task, user
from glm45.evaluation.runner import (
    ERROR,
    TRANSCRIPTS,
    Progress,
    Suite,
    SuiteResult,
    Transcripts,
    check,
    digest,
    no_progress,
    store,
    together,
)
from glm45.evaluation.statistics import bootstrap
from glm45.evaluation.targets import PromptTooLongError, Target

LIKELIHOOD = "likelihood"
"""What stands in a task for a verifier: nothing is generated, so nothing is verified."""


def choice_task(task_id: str, context: str, choices: Sequence[str], right: int, family: str) -> Task:
    """Return a question whose `choices` continue `context`; `right` is the index of the right one.

    Choices begin with the space that stands before them. Raises ValueError for fewer than two, or equal ones.
    """
    if len(set(choices)) < max(2, len(choices)):
        raise ValueError(f"task {task_id!r} has the choices {list(choices)}: need two or more different ones")
    metadata = {"choices": list(choices), "family": family}
    return Task(
        task_id=task_id, verifier=LIKELIHOOD, messages=[user(context)], answer=right, thinking=False, metadata=metadata
    )


def run_choices(target: Target, suite: Suite, folder: Path, *, progress: Progress = no_progress) -> SuiteResult:
    """Score every choice of a suite of `choice_task`s; write transcripts and result to `folder`.

    `score` compares sums of log-probabilities, `score_per_character` their means over characters, since sums favour
    short choices; `chance` is what guessing gives. What `folder` holds already is kept. Raises ValueError where the
    target gives no likelihoods, and as `runner.check`.
    """
    check(suite)
    folder.mkdir(parents=True, exist_ok=True)
    transcripts = Transcripts(folder / TRANSCRIPTS)
    keys = {task.task_id: digest(target.name, LIKELIHOOD, asdict(task)) for task in suite.tasks}
    asyncio.run(_score_all(target, suite, keys, transcripts, progress))
    values: dict[str, list[float]] = {}
    for task in suite.tasks:
        row = transcripts.rows[keys[task.task_id]]
        metrics = task_metrics(task, row["loglikelihoods"])
        for name, value in (metrics | {"unanswered": float(row.get("finish_reason") == ERROR)}).items():
            values.setdefault(name, []).append(value)
    result = SuiteResult(
        suite=suite.name,
        target=target.name,
        metrics={name: bootstrap(column) for name, column in values.items()},
        num_answers=len(suite.tasks),
    )
    return store(result, folder)


async def _score_all(
    target: Target, suite: Suite, keys: dict[str, str], transcripts: Transcripts, progress: Progress
) -> None:
    missing = [task for task in suite.tasks if not transcripts.has(keys[task.task_id])]
    done = len(suite.tasks) - len(missing)
    progress(done, len(suite.tasks))

    async def score(task: Task) -> None:
        nonlocal done
        context = task.messages[0]["content"]
        choices = task.metadata["choices"]
        more: dict[str, Any] = {}
        try:
            found = await target.loglikelihoods(context, choices)
        except PromptTooLongError as error:  # a tie is not right
            found, more = [0.0] * len(choices), {"finish_reason": ERROR, "faults": [str(error)]}
        about: dict[str, Any] = {"task_id": task.task_id, "prompt": task.messages, "answer": task.answer}
        transcripts.add(keys[task.task_id], **about, choices=choices, loglikelihoods=found, **more)
        done += 1
        progress(done, len(suite.tasks))

    await together(score(task) for task in missing)


def task_metrics(task: Task, loglikelihoods: Sequence[float]) -> dict[str, float]:
    """Return one task's metrics from the log-likelihoods of its choices; a tie is not right."""
    choices = task.metadata["choices"]
    per_character = [value / len(choice) for value, choice in zip(loglikelihoods, choices, strict=True)]
    correct = _is_best(loglikelihoods, task.answer)
    return {
        "score": correct,
        "score_per_character": _is_best(per_character, task.answer),
        "chance": 1 / len(choices),
        f"part:{task.metadata['family']}": correct,
    }


def _is_best(values: Sequence[float], index: int) -> float:
    return float(all(values[index] > value for other, value in enumerate(values) if other != index))
