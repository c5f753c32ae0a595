"""What a corpus is held against: the items of our own suites and of the public benchmarks that are at hand."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from glm45.corpus.recipe import CorpusRecipe
from glm45.environments.protocol import Task
from glm45.evaluation.suites import SUITES, SuiteOptions

OPTIONS = SuiteOptions(num_tasks=100)
"""Size of the generated suites; of public benchmarks, every task is compared. Not in the report."""


def against_evaluations(recipe: CorpusRecipe, folder: Path) -> CorpusRecipe:
    """Return the recipe with every suite among its evaluation files, which are written to `folder/SUITE.jsonl`.

    Needs no network: suites whose data has not been fetched are named in `decontamination.not_compared`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files, absent = [], []
    for name, tasks in SUITES.items():
        try:
            items = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in _items(tasks(OPTIONS)))
        except FileNotFoundError:
            absent.append(name)
            continue
        files.append(folder / f"{name}.jsonl")
        if not files[-1].exists() or files[-1].read_text(encoding="utf-8") != items:
            files[-1].write_text(items, encoding="utf-8")
    config = dataclasses.replace(
        recipe.decontamination,
        files=(*recipe.decontamination.files, *map(str, files)),
        not_compared=(*recipe.decontamination.not_compared, *absent),
    )
    return dataclasses.replace(recipe, decontamination=config)


def _items(tasks: Iterable[Task]) -> Iterator[dict[str, str]]:
    """Yield what users ask and the written-out answers, without the lines that most of a suite's questions repeat."""
    items = [
        (task, [str(message["content"]) for message in task.messages if message["role"] == "user"]) for task in tasks
    ]
    repeated = Counter(line for _, asked in items for line in set("\n".join(asked).split("\n")))
    for task, asked in items:
        lines = [line for line in "\n".join(asked).split("\n") if repeated[line] <= max(1, len(items) // 2)]
        yield {"question": "\n".join(lines)} | ({"answer": task.answer} if isinstance(task.answer, str) else {})
