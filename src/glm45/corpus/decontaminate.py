"""Removal of documents that hold a piece of an evaluation item: shared word n-grams, as hashes.

Shapes: W words, S n-grams.
"""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from glm45.config import configuration
from glm45.corpus.document import DropLog

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@configuration
class Decontamination:
    """What counts as contamination. Not in the report."""

    files: tuple[str, ...] = ()
    """Evaluation files or patterns of them: JSONL (every string field of an item), or text (every paragraph). Not in
    the report."""
    not_compared: tuple[str, ...] = ()
    """Evaluations whose items are not here, for the manifest."""
    words_per_ngram: int = 13
    """Length of the word n-grams that a document may not share with an item. Not in the report."""
    min_words: int = 8
    """Items of fewer words than an n-gram are matched whole if they have at least this many; shorter ones would match
    by chance. Not in the report."""


def word_hashes(text: str) -> np.ndarray:
    """Return the hashes of a text's words in order, case and punctuation aside, uint64 [W]."""
    words = _WORD.findall(text.lower())
    return np.fromiter((xxhash.xxh64_intdigest(word.encode()) for word in words), np.uint64, len(words))


def ngram_hashes(words_W: np.ndarray, length: int) -> np.ndarray:
    """Return the hashes of the n-grams of hashed words in order, uint64 [S]."""
    hashes_S = words_W[: max(0, len(words_W) - length + 1)].copy()
    for offset in range(1, length):
        hashes_S = hashes_S * _MULTIPLIER + words_W[offset : offset + len(hashes_S)]
    return hashes_S


def evaluation_files(patterns: tuple[str, ...]) -> list[Path]:
    """Return the files of patterns. Raises ValueError for a pattern that matches none."""
    files: list[Path] = []
    for pattern in patterns:
        paths = sorted(glob(str(Path(pattern).expanduser()), recursive=True))
        if not paths:
            raise ValueError(f"evaluation file {pattern}: not found; correct decontamination.files")
        files += map(Path, paths)
    return files


def evaluation_items(path: Path) -> Iterator[str]:
    """Yield the texts of an evaluation file's items. Raises ValueError, with its number, for a line that is no JSON."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        yield from text.split("\n\n")
        return
    for number, line in enumerate(text.split("\n"), 1):
        try:
            yield from strings_in(json.loads(line) if line.strip() else None)
        except ValueError as error:
            raise ValueError(f"evaluation file {path}, line {number}: not JSON ({error})") from None


def strings_in(node: Any) -> Iterator[str]:
    """Yield every string in JSON-like data; a tool call's arguments, which are JSON in a string, are opened."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, list):
        for child in node:
            yield from strings_in(child)
    elif isinstance(node, dict):
        for key, child in node.items():
            yield from strings_in(_opened(child) if key == "arguments" and isinstance(child, str) else child)


def _opened(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):  # what a model wrote need not be JSON
        return arguments


def _compared_text(document: Document) -> str:
    """Return the text of a document; of a conversation its strings, since JSON would glue `\\n` to words."""
    messages = document.metadata.get("messages")
    return document.text if messages is None else "\n".join(strings_in(messages))


class Decontaminate(BaseFilter):
    """Removes documents that share an n-gram with an evaluation item; the reason names the file."""

    name = "🧪 decontamination"

    def __init__(self, config: Decontamination, drops: Path) -> None:
        super().__init__(DropLog(drops))
        self.config = config

    @cached_property
    def _index(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Sorted hashes by n-gram length, and the name of the file that each came from."""
        found: dict[int, list[tuple[np.ndarray, str]]] = {}
        for path in evaluation_files(self.config.files):
            for text in evaluation_items(path):
                words_W = word_hashes(text)
                if len(words_W) >= self.config.min_words:
                    length = min(len(words_W), self.config.words_per_ngram)
                    found.setdefault(length, []).append((ngram_hashes(words_W, length), path.name))
        return {length: _sorted(items) for length, items in found.items()}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Say whether `doc` shares nothing with an evaluation item."""
        if not self._index:
            return True
        words_W = word_hashes(_compared_text(doc))
        for length, (known_S, names_S) in self._index.items():
            hashes = ngram_hashes(words_W, length)
            places = np.minimum(np.searchsorted(known_S, hashes), len(known_S) - 1)
            hits = places[known_S[places] == hashes]
            if hits.size:
                return False, f"contaminated: {names_S[hits[0]]}"
        return True


def _sorted(items: list[tuple[np.ndarray, str]]) -> tuple[np.ndarray, np.ndarray]:
    known_S, first_S = np.unique(np.concatenate([hashes for hashes, _ in items]), return_index=True)
    names = np.repeat([name for _, name in items], [len(hashes) for hashes, _ in items])
    return known_S, names[first_S]
