"""A language model as judge and as teacher, file to file: seeds for the scorers, worked answers for mid-training."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx

from glm45.corpus.quality import SCORERS
from glm45.corpus.reasoning import TIMEOUT_SECONDS, UnreadableScoreError, ask_score, teach
from glm45.environments.protocol import Reward, Task, assistant
from glm45.environments.verify import RewardWorkers
from glm45.evaluation.command import API_KEY


def write_seeds(texts: Path, out: Path, question: str, scorer: str, *, url: str, model: str) -> Counter[str]:
    """Have a model score the `text` of every line and write seeds for `quality.seeds`; return what came of them.

    Replies that cannot be read are counted and told on standard error. Raises ValueError for an unknown scorer, a line
    without text or an output that exists, OSError if the endpoint is not reachable.
    """
    if scorer not in SCORERS:
        raise ValueError(f"no scorer {scorer!r}; known: {', '.join(SCORERS)}")
    counts: Counter[str] = Counter()
    with _client() as client, _new_file(out) as sink:
        for number, record in _records(texts, "text"):
            try:
                score = ask_score(record["text"], question, url=url, model=model, client=client)
            except UnreadableScoreError as error:
                counts["unreadable"] += 1
                print(f"{texts}, line {number}: {error}", file=sys.stderr)
                continue
            counts["scored"] += 1
            sink.write(
                json.dumps({"scorer": scorer, "text": record["text"], "score": score}, ensure_ascii=False) + "\n"
            )
    return counts


def write_worked_answers(
    tasks: Path, out: Path, verifier: str, *, url: str, model: str, samples: int = 4
) -> Counter[str]:
    """Have a model answer the `prompt` of every line and write what agrees with its `answer`; return the counts.

    The file is a `jsonl` source of kind `reasoning`. Raises ValueError for an unknown verifier, a line without prompt
    and answer or an output that exists, OSError if the endpoint is not reachable.
    """
    counts: Counter[str] = Counter()
    with RewardWorkers() as workers, _client() as client:
        workers.prove([verifier])

        def is_right(answer: str, reference: str) -> bool:
            task = Task(task_id="teach", verifier=verifier, messages=[], answer=reference)
            outcome = workers.score(task, assistant(answer))
            return isinstance(outcome, Reward) and outcome.value == 1.0

        with _new_file(out) as sink:
            for _, task in _records(tasks, "prompt", "answer"):
                records, found = teach([task], is_right, url=url, model=model, samples=samples, client=client)
                counts.update(found)
                sink.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return counts + Counter({"not judged": workers.failures.total()})


def _client() -> httpx.Client:
    key = os.environ.get(API_KEY)
    return httpx.Client(timeout=TIMEOUT_SECONDS, headers={"Authorization": f"Bearer {key}"} if key else {})


def _records(path: Path, *needed: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if not all(isinstance(record[name], str) for name in needed):
                    raise TypeError("not text")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {error!r}; each line needs {' and '.join(needed)}") from None
            yield number, record


@contextmanager
def _new_file(path: Path) -> Iterator[IO[str]]:
    """Open a file that bears its name only once it is whole."""
    if path.exists():
        raise ValueError(f"{path} exists: delete it or give another name")
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as sink:
        yield sink
    part.rename(path)
