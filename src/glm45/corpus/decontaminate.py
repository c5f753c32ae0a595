"""Removal of documents that hold a piece of an evaluation item: shared word n-grams, as hashes.

Shapes: W words, S n-grams.
"""

import json
import re
from functools import cached_property
from glob import glob
from pathlib import Path

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
    words_per_ngram: int = 13
    """Length of the word n-grams that a document may not share with an item. Not in the report."""
    min_words: int = 8
    """Items of fewer words than an n-gram are matched whole if they have at least this many; shorter ones would match
    by chance. Not in the report."""


def ngram_hashes(text: str, length: int) -> np.ndarray:
    """Return the hashes of a text's word n-grams in order, case and punctuation aside, uint64 [S]."""
    words = _WORD.findall(text.lower())
    words_W = np.fromiter((xxhash.xxh64_intdigest(word.encode()) for word in words), np.uint64, len(words))
    if len(words_W) < length:
        return np.empty(0, dtype=np.uint64)
    hashes_S = words_W[: len(words_W) - length + 1].copy()
    for offset in range(1, length):
        hashes_S = hashes_S * _MULTIPLIER + words_W[offset : offset + len(hashes_S)]
    return hashes_S


def evaluation_items(patterns: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return `(file name, text)` of every evaluation item. Raises ValueError for a pattern that matches no file."""
    items = []
    for pattern in patterns:
        paths = sorted(glob(str(Path(pattern).expanduser()), recursive=True))
        if not paths:
            raise ValueError(f"evaluation file {pattern}: not found; correct decontamination.files")
        for path in map(Path, paths):
            for piece in path.read_text().splitlines() if path.suffix == ".jsonl" else path.read_text().split("\n\n"):
                items += [(path.name, text) for text in _strings(piece, path.suffix == ".jsonl")]
    return items


def _strings(piece: str, is_json: bool) -> list[str]:
    if not is_json:
        return [piece]
    found: list[str] = []

    def visit(node: object) -> None:
        if isinstance(node, str):
            found.append(node)
        elif isinstance(node, dict | list):
            for child in node.values() if isinstance(node, dict) else node:
                visit(child)

    visit(json.loads(piece) if piece.strip() else None)
    return found


class Decontaminate(BaseFilter):
    """Removes documents that share an n-gram with an evaluation item; the reason names the file."""

    name = "🧪 decontamination"

    def __init__(self, config: Decontamination, drops: Path) -> None:
        super().__init__(DropLog(drops))
        self.config = config

    @cached_property
    def _index(self) -> tuple[dict[int, np.ndarray], dict[int, str]]:
        """Sorted hashes by n-gram length, and the file each came from."""
        found: dict[int, str] = {}
        by_length: dict[int, list[np.ndarray]] = {}
        for name, text in evaluation_items(self.config.files):
            num_words = len(_WORD.findall(text.lower()))
            if num_words < self.config.min_words:
                continue
            length = min(num_words, self.config.words_per_ngram)
            hashes_S = ngram_hashes(text, length)
            by_length.setdefault(length, []).append(hashes_S)
            found.update((int(value), name) for value in hashes_S)
        return {length: np.unique(np.concatenate(parts)) for length, parts in by_length.items()}, found

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Say whether `doc` shares nothing with an evaluation item."""
        index, names = self._index
        for length, known_S in index.items():
            hashes_S = ngram_hashes(doc.text, length)
            hits = hashes_S[np.isin(hashes_S, known_S)]
            if hits.size:
                return False, f"contaminated: {names[int(hits[0])]}"
        return True
