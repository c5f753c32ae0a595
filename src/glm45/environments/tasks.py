"""Task sets: JSONL files of tasks, and the split into train and held-out questions."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from glm45.config import from_dict
from glm45.environments.protocol import Task


def write_tasks(path: str | Path, tasks: Iterable[Task]) -> int:
    """Write tasks, one JSON object to a line, and return how many."""
    count = 0
    with open(path, "w", encoding="utf-8") as sink:
        for task in tasks:
            sink.write(json.dumps(dataclasses.asdict(task), ensure_ascii=False) + "\n")
            count += 1
    return count


def read_tasks(path: str | Path) -> Iterator[Task]:
    """Read tasks; `thinking`, `tools` and `metadata` may be left out.

    Raises ValueError with the line's number for fields that are unknown, missing or of a wrong type, and for a task id
    that occurs twice.
    """
    seen: set[str] = set()
    with open(path, "rb") as source:
        for number, line in enumerate(source, start=1):
            try:
                task = from_dict(Task, json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not a task: {error}") from None
            if task.task_id in seen:
                raise ValueError(f"{path}, line {number}: task id {task.task_id!r} occurred before")
            seen.add(task.task_id)
            yield task


def prompt_text(task: Task) -> str:
    """Return the text of a task's messages."""
    return "\n".join(_text(message.get("content")) for message in task.messages)


def question(task: Task) -> str:
    """Return what the split goes by: `metadata["question"]` where a family can ask one thing in several ways.

    Otherwise it is the text of the messages.
    """
    return task.metadata.get("question") or prompt_text(task)


def is_held_out_task(task: Task) -> bool:
    """Say whether a task's question belongs to the share that is never trained on."""
    from glm45.data.splits import is_held_out

    return is_held_out(question(task))


def split_tasks(tasks: Iterable[Task]) -> tuple[list[Task], list[Task]]:
    """Return (train, held-out) tasks; the same question is always on the same side, whoever generated it."""
    sides: tuple[list[Task], list[Task]] = ([], [])
    for task in tasks:
        sides[is_held_out_task(task)].append(task)
    return sides


def _text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, sort_keys=True, ensure_ascii=False)
