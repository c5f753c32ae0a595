"""Lines of document files to tokens, in worker processes.

A line is a JSON object with `text`, or with `messages` (and `tools`, `thinking`), which the chat renderer turns into
tokens. `metadata.special_tokens` lists the special tokens that were put into a text on purpose, such as those of
fill-in-the-middle; what else spells a special token stays text. Every document ends with `<|endoftext|>`.
"""

import functools
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from glm45.corpus.words import WordEncoder
from glm45.data.shards import token_dtype
from glm45.text.chat import render_tokens
from glm45.text.special_tokens import END_OF_TEXT
from glm45.text.tokenizer import Tokenizer


class Rejected(NamedTuple):
    """A line that is not a document."""

    line: int
    """Counted from the first line of its chunk."""
    reason: str
    """One of few, to be counted."""
    detail: str


@dataclass
class Chunk:
    """What lines became: tokens in the shard's type, the length of every document, and what was rejected."""

    num_lines: int
    tokens: bytes = b""
    lengths: list[int] = field(default_factory=list)
    text_bytes: int = 0
    """Bytes of plain text; chats do not count."""
    rejected: list[Rejected] = field(default_factory=list)


class RejectedError(ValueError):
    """Says why a line is not a document: its arguments are the reason and the detail."""


def encode_lines(lines: Sequence[bytes], encoder: WordEncoder) -> Chunk:
    """Encode lines of a document file; what is not a document is left out and told."""
    chunk = Chunk(num_lines=len(lines))
    texts: list[str] = []
    documents: list[list[bytes | None]] = []  # ids that are known, and None for the next of `texts`
    for number, line in enumerate(lines):
        try:
            parts = _parts(_read(line), encoder)
        except RejectedError as error:
            chunk.rejected.append(Rejected(number, *error.args))
            continue
        plain = [part for part in parts if isinstance(part, str)]
        chunk.text_bytes += sum(len(part.encode()) for part in plain)
        texts += plain
        documents.append([part if isinstance(part, bytes) else None for part in parts])
    end = encoder.to_bytes([encoder.tokenizer.special_id(END_OF_TEXT)])
    encoded = iter(encoder.encode(texts))
    pieces: list[bytes] = []
    for document in documents:
        ids = [next(encoded) if part is None else part for part in document]
        pieces += [*ids, end]
        chunk.lengths.append(sum(map(len, ids)) // encoder.dtype.itemsize + 1)
    chunk.tokens = b"".join(pieces)
    return chunk


def _read(line: bytes) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RejectedError("not JSON", str(error)) from None
    except UnicodeDecodeError as error:
        raise RejectedError("not Unicode", str(error)) from None
    if not isinstance(document, dict) or not ("text" in document or "messages" in document):
        raise RejectedError("neither text nor messages", line[:80].decode(errors="replace"))
    return document


def _parts(document: dict[str, Any], encoder: WordEncoder) -> list[str | bytes]:
    """Return a document as plain texts and ids."""
    if "messages" in document:
        return [_chat(document, encoder)]
    text, metadata = document["text"], document.get("metadata")
    if not isinstance(text, str) or not text:
        raise RejectedError("empty text", repr(text))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RejectedError("not Unicode", str(error)) from None
    special = metadata.get("special_tokens") if isinstance(metadata, dict) else None
    if not special:
        return [text]
    from glm45.corpus.document import split_special  # imports datatrove

    try:
        ids = {token: encoder.to_bytes([encoder.tokenizer.special_id(token)]) for token in special}
    except (TypeError, ValueError) as error:
        raise RejectedError("unknown special token", str(error)) from None
    return [ids[piece] if is_special else piece for piece, is_special in split_special(text, special)]


def _chat(document: dict[str, Any], encoder: WordEncoder) -> bytes:
    thinking = None if document.get("thinking", True) else False
    try:
        rendered = render_tokens(
            document["messages"], encoder.tokenizer, tools=document.get("tools") or None, enable_thinking=thinking
        )
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise RejectedError("not a chat", str(error)) from None
    return encoder.to_bytes(rendered.ids)


class Encoders:
    """Encodes chunks of lines in `workers` processes, in order and never far ahead; one worker is this process."""

    def __init__(self, tokenizer: Path, fingerprint: str, workers: int) -> None:
        self._work = functools.partial(_work, tokenizer, fingerprint)
        self._ahead = 2 * workers
        self._pool = None
        if workers > 1:
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _keep_to_one_thread)

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def encode(self, chunks: Iterator[list[bytes]]) -> Iterator[Chunk]:
        """Yield what became of each chunk of lines."""
        if self._pool is None:
            yield from map(self._work, chunks)
            return
        futures: deque[Future[Chunk]] = deque()
        try:
            for lines in chunks:
                futures.append(self._pool.submit(self._work, lines))
                if len(futures) > self._ahead:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        except BrokenProcessPool:
            raise OSError("a tokenizing process was killed, perhaps for memory: run again with fewer workers") from None


def _keep_to_one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for every core already


@functools.lru_cache(maxsize=1)
def _encoder(folder: Path, fingerprint: str) -> WordEncoder:
    """Return this process's encoder, which remembers words from chunk to chunk."""
    encoder = WordEncoder(folder, token_dtype(Tokenizer.load(folder).vocab_size))
    assert encoder.tokenizer.fingerprint == fingerprint
    return encoder


def _work(folder: Path, fingerprint: str, lines: list[bytes]) -> Chunk:
    return encode_lines(lines, _encoder(folder, fingerprint))
