"""Whether a suite's prompts stand in training data: shared word n-grams, as the corpus build removes them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from glm45.corpus.decontaminate import Decontamination, ngram_hashes, word_hashes
from glm45.data.folder import MANIFEST, DataFolder
from glm45.data.mixture import HELD_OUT
from glm45.environments.protocol import Task
from glm45.environments.tasks import prompt_text
from glm45.text.tokenizer import Tokenizer

TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".jsonl"})


@dataclass(frozen=True)
class Contamination:
    """What a suite shares with training data."""

    num_tasks: int
    num_short: int
    """Tasks whose prompts have fewer words than `min_words`: too short to be told from chance, and not checked."""
    num_documents: int
    """Documents that were read."""
    shared: dict[str, float]
    """Share of a prompt's n-grams that occur in the documents, for every task that shares any."""

    @property
    def num_whole(self) -> int:
        """Tasks all of whose n-grams occur: the prompt stands there as it is."""
        return sum(share == 1 for share in self.shared.values())

    def describe(self) -> str:
        """Return the finding for people."""
        checked = self.num_tasks - self.num_short
        return (
            f"{len(self.shared)} of {checked} prompts share an n-gram with {self.num_documents} training documents, "
            f"{self.num_whole} stand there whole; {self.num_short} prompts are too short to check"
        )


def measure_contamination(
    tasks: Sequence[Task], documents: Iterator[str], config: Decontamination | None = None
) -> Contamination:
    """Look for the tasks' prompts in documents, case and punctuation aside.

    A prompt shorter than an n-gram is looked for whole if it has `min_words` words. Raises ValueError if there is no
    document.
    """
    config = config or Decontamination()
    prompts: dict[str, tuple[int, np.ndarray]] = {}
    for task in tasks:
        words_W = word_hashes(prompt_text(task))
        if len(words_W) >= config.min_words:
            length = min(len(words_W), config.words_per_ngram)
            prompts[task.task_id] = length, np.unique(ngram_hashes(words_W, length))
    wanted = {
        length: np.unique(np.concatenate([hashes_S for other, hashes_S in prompts.values() if other == length]))
        for length in {length for length, _ in prompts.values()}
    }
    found = {length: np.zeros(len(known_S), dtype=bool) for length, known_S in wanted.items()}
    num_documents = 0
    for text in documents:
        num_documents += 1
        words_W = word_hashes(text)
        for length, known_S in wanted.items():
            found[length] |= np.isin(known_S, ngram_hashes(words_W, length))
    if not num_documents:
        raise ValueError("there is no training document to compare with")
    shared = {}
    for name, (length, hashes_S) in prompts.items():
        share = float(found[length][np.searchsorted(wanted[length], hashes_S)].mean())
        if share:
            shared[name] = share
    return Contamination(len(tasks), len(tasks) - len(prompts), num_documents, shared)


def write_contamination(finding: Contamination, path: Path) -> None:
    """Write a finding, with every task that shares anything, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**asdict(finding), "num_whole": finding.num_whole}, indent=1) + "\n")


def training_documents(folder: Path) -> Iterator[str]:
    """Yield the training documents of a data folder (decoded; held-out datasets left out), or of a folder of text.

    In a folder of text, JSONL files give the `text` of each line and others are a document each. Raises
    FileNotFoundError for a folder with neither, ValueError for a JSONL line without text.
    """
    if (folder / MANIFEST).exists():
        yield from _tokenized_documents(folder)
        return
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in TEXT_SUFFIXES and path.is_file()]
    if not paths:
        endings = ", ".join(sorted(TEXT_SUFFIXES))
        raise FileNotFoundError(f"{folder} is neither a data folder nor does it hold text ({endings})")
    for path in paths:
        if path.suffix == ".jsonl":
            yield from _texts_of_lines(path)
        else:
            yield path.read_text(encoding="utf-8", errors="replace")


def _tokenized_documents(folder: Path) -> Iterator[str]:
    data, tokenizer = DataFolder.open(folder), Tokenizer.load(folder / "tokenizer")
    for name, documents in data.datasets.items():
        if name.endswith(f".{HELD_OUT}"):
            continue
        for start, stop in pairwise(documents.starts(0, documents.num_documents)):
            yield tokenizer.decode(documents.tokens[np.arange(start, stop)].tolist())


def _texts_of_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number}: not an object with a text") from None
