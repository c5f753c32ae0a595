"""Encoding many documents: exactly what `Tokenizer.encode` gives, several times as fast.

Text repeats its words. Words are split off with Python's `re`, whose character classes are read off the tokenizer's
own regular expressions, and each distinct word goes through the tokenizer once. A tokenizer that splits in another
way, and the rare text with characters beyond U+FFFF, goes through `Tokenizer.encode_batch` whole.
"""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from glm45.text.tokenizer import SPLIT_PATTERN, Tokenizer

MAX_WORDS = 1 << 17  # remembered at most: about 30 MB a process
LONG = 1 << 19  # characters from which on a text is split some words at a time
WORDS_AT_ONCE = 1 << 15
PATTERNS = (SPLIT_PATTERN, SPLIT_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"))  # ours; GLM-4.5's own
_CLASSES = re.compile(r"\\p\{L\}|\\p\{N\}|\\[sS]")
_BEYOND = re.compile("[\ud800-\udfff\U00010000-\U0010ffff]")


class WordEncoder:
    """Encodes texts to the bytes of their token ids in a shard's type.

    `folder` holds a `tokenizer.json`. `tokenizer` is that tokenizer.
    """

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self.tokenizer, self.dtype = Tokenizer.load(folder), np.dtype(dtype)
        pattern = _split_pattern(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
        self._ascii: re.Pattern[str] | None = None
        self._unicode: re.Pattern[str] | None = None
        if pattern in PATTERNS:
            self._ascii, self._unicode = (re.compile(_translate(pattern, last)) for last in (0x7F, 0xFFFF))
        self._words: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return for each text the bytes of its ids. Raises ValueError for a lone surrogate."""
        encoded, words_of = [], []
        for text in texts:
            pattern = self._pattern(text)
            in_one_go = pattern is not None and len(text) < LONG
            words_of.append(pattern.findall(text) if pattern and in_one_go else [])
            encoded.append(b"" if in_one_go else self._encode_long(text, pattern))
        self._learn(set().union(*words_of))
        ids_of = self._words.__getitem__
        return [ids or b"".join(map(ids_of, words)) for ids, words in zip(encoded, words_of, strict=True)]

    def _encode_long(self, text: str, pattern: re.Pattern[str] | None) -> bytes:
        """Encode a text some words at a time, so that memory stays small, or whole where no pattern splits it."""
        if pattern is None:
            return self.to_bytes(self.tokenizer.encode(text))
        found, parts = pattern.finditer(text), []
        while words := [match.group() for match in islice(found, WORDS_AT_ONCE)]:
            self._learn(set(words))
            parts.append(b"".join(map(self._words.__getitem__, words)))
        return b"".join(parts)

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids in the shard's type."""
        return np.array(ids, dtype=self.dtype).tobytes()

    def _pattern(self, text: str) -> re.Pattern[str] | None:
        """Return what splits this text as the tokenizer does, None where only the tokenizer can."""
        if text.isascii():
            return self._ascii
        return None if _BEYOND.search(text) else self._unicode

    def _learn(self, words: set[str]) -> None:
        missing = sorted(word for word in words if word not in self._words)  # set - keys() would visit every key
        if len(self._words) + len(missing) > MAX_WORDS:
            self._words.clear()
            missing = sorted(words)
        for word, ids in zip(missing, self.tokenizer.encode_batch(missing), strict=True):
            self._words[word] = self.to_bytes(ids)


def _split_pattern(definition: dict[str, Any]) -> str | None:
    """Return the regular expression by which a tokenizer splits, if splitting is all that it does to text."""
    match definition:
        case {
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                ],
            },
        }:
            return pattern
    return None


def _translate(pattern: str, last: int) -> str:
    """Write the pattern's character classes out for Python's `re`, up to the code point `last`."""

    def write_out(found: re.Match[str]) -> str:
        name, bracketed = found.group(), pattern.count("[", 0, found.start()) > pattern.count("]", 0, found.start())
        members = _members(name.lower() if name == r"\S" else name, last)
        if bracketed:
            return members
        return f"[^{members}]" if name == r"\S" else f"[{members}]"

    return _CLASSES.sub(write_out, pattern)


def _members(name: str, last: int) -> str:
    """Return the characters of a class, as the tokenizer's engine sees them, as ranges for use within brackets."""
    from tokenizers import Regex, pre_tokenizers

    characters = "".join(chr(code) for code in range(last + 1) if not 0xD800 <= code <= 0xDFFF)
    split = pre_tokenizers.Split(Regex(f"{name}+"), behavior="removed")
    bounds = [bound for _, (start, end) in split.pre_tokenize_str(characters) for bound in (start, end)]
    inside = zip([0, *bounds[1::2]], [*bounds[::2], len(characters)], strict=True)
    return "".join(
        f"\\u{ord(characters[start]):04x}-\\u{ord(characters[end - 1]):04x}" for start, end in inside if start < end
    )
