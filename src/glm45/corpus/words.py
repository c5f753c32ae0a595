"""Encoding many documents: exactly what `Tokenizer.encode` gives, several times as fast.

Text repeats its words. Words are split off with Python's `re`, whose character classes are read off the tokenizer's
own regular expressions, and each distinct word goes through the tokenizer once. A tokenizer that splits in another
way, and the rare text with characters beyond U+FFFF, goes through `Tokenizer.encode_batch` whole.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm45.text.tokenizer import SPLIT_PATTERN, Tokenizer

MAX_WORDS = 1 << 18  # remembered at most: about 40 MB a process
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
        self._ascii = self._unicode = None
        if pattern in PATTERNS:
            self._ascii, self._unicode = (re.compile(_translate(pattern, last)) for last in (0x7F, 0xFFFF))
        self._words: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return for each text the bytes of its ids. Raises ValueError for a lone surrogate."""
        words_of = [self._split(text) for text in texts]
        self._learn(set().union(*(words for words in words_of if words is not None)))
        whole = [text for text, words in zip(texts, words_of, strict=True) if words is None]
        encoded = iter(self.tokenizer.encode_batch(whole)) if whole else iter(())
        ids_of = self._words.__getitem__
        return [self.to_bytes(next(encoded)) if words is None else b"".join(map(ids_of, words)) for words in words_of]

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids in the shard's type."""
        return np.array(ids, dtype=self.dtype).tobytes()

    def _split(self, text: str) -> list[str] | None:
        if self._ascii is None or self._unicode is None:
            return None
        if text.isascii():
            return self._ascii.findall(text)
        return None if _BEYOND.search(text) else self._unicode.findall(text)

    def _learn(self, words: set[str]) -> None:
        missing = sorted(words - self._words.keys())
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
