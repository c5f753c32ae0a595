"""Token shards: Megatron's `.bin`/`.idx` pair (`MMapIndexedDataset`, version 1), written and memory-mapped.

`<prefix>.bin` holds nothing but tokens. `<prefix>.idx` holds, little-endian: the magic, version and dtype code; the
number of sequences and of document bounds; then per sequence its length (int32) and byte offset (int64), and the
document bounds (int64) as sequence numbers. We write one sequence a document; shards with several are read too.

Shapes: N documents.
"""

import contextlib
import hashlib
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
CHUNK = 1 << 20  # entries or bytes handled at once, so that memory does not grow with the shard


def token_dtype(vocab_size: int) -> np.dtype:
    """Return Megatron's choice of token type for a vocabulary: uint16 under 65,500 tokens, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


def bin_path(prefix: Path) -> Path:
    """Return the path of the tokens. `Path.with_suffix` would cut a bucket such as `.high` off the name."""
    return prefix.parent / f"{prefix.name}.bin"


def idx_path(prefix: Path) -> Path:
    """Return the path of the index."""
    return prefix.parent / f"{prefix.name}.idx"


class ShardWriter:
    """Write documents to `<prefix>.bin` and `<prefix>.idx` with memory independent of their number.

    Nothing appears under the final names before `close`, which returns the manifest entry. Used as a context manager
    it closes at the end, and on an error removes what it wrote.
    """

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.num_documents = self.num_tokens = 0
        self.entry: dict[str, Any] = {}
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = {part: prefix.parent / f"{prefix.name}.{part}.tmp" for part in ("bin", "idx", "lengths")}
        self._bin, self._lengths = self._temporary["bin"].open("wb"), self._temporary["lengths"].open("w+b")
        self._bin_hash = hashlib.sha256()

    def add(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append one document. Raises OverflowError for a token that the shard's type cannot hold."""
        tokens = np.asarray(tokens)
        self.add_many(tokens, np.array([len(tokens)]))

    def add_many(self, tokens: np.ndarray, lengths_N: np.ndarray) -> None:
        """Append N documents given as their tokens end to end and their lengths."""
        assert lengths_N.sum() == len(tokens)
        if len(tokens) and tokens.dtype != self.dtype:
            limits = np.iinfo(self.dtype)
            if tokens.min() < limits.min or tokens.max() > limits.max:
                worst = int(tokens.max() if tokens.max() > limits.max else tokens.min())
                raise OverflowError(f"token {worst} does not fit the shard's {self.dtype}: pass a wider dtype")
        data = np.ascontiguousarray(tokens, dtype=self.dtype).data
        self._bin_hash.update(data)
        self._bin.write(data)
        self._lengths.write(np.ascontiguousarray(lengths_N, dtype=np.int32).data)
        self.num_documents += len(lengths_N)
        self.num_tokens += len(tokens)

    def close(self) -> dict[str, Any]:
        """Move the pair to its final names and return `{"documents", "tokens", "dtype", "files"}` for the manifest."""
        with self._temporary["idx"].open("wb") as file:
            idx_hash = self._write_index(file)
            _sync(file)
        _sync(self._bin)
        self._bin.close()
        self._lengths.close()
        self._temporary["lengths"].unlink()
        os.replace(self._temporary["bin"], bin_path(self.prefix))
        os.replace(self._temporary["idx"], idx_path(self.prefix))
        digests = {bin_path(self.prefix): self._bin_hash, idx_path(self.prefix): idx_hash}
        self.entry = {
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "dtype": self.dtype.name,
            "files": {
                path.name: {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
                for path, digest in digests.items()
            },
        }
        return self.entry

    def discard(self) -> None:
        """Remove everything that was written and not moved to its final name."""
        for file in (self._bin, self._lengths):
            with contextlib.suppress(OSError):  # closing writes what is left, on a disk that may be full
                file.close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.discard()

    def _write_index(self, file: BinaryIO) -> Any:
        digest = hashlib.sha256()

        def put(data: Any) -> None:
            digest.update(data)
            file.write(data)

        put(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], self.num_documents, self.num_documents + 1))
        self._lengths.flush()
        for length_bytes in self._chunks_of_lengths():
            put(length_bytes)
        offset = 0
        for length_bytes in self._chunks_of_lengths():
            sizes = np.frombuffer(length_bytes, dtype=np.int32).astype(np.int64) * self.dtype.itemsize
            ends = offset + np.cumsum(sizes)
            put((ends - sizes).data)
            offset = int(ends[-1])
        for first in range(0, self.num_documents + 1, CHUNK):
            put(np.arange(first, min(first + CHUNK, self.num_documents + 1), dtype=np.int64).data)
        return digest

    def _chunks_of_lengths(self) -> Iterator[bytes]:
        self._lengths.seek(0)
        while chunk := self._lengths.read(4 * CHUNK):
            yield chunk


class Shard:
    """Read a shard through memory maps: opening it costs the same whatever its size.

    Attributes: `tokens` (every token, end to end), `num_documents`, `num_tokens`, `mask` (the tokens to learn, from a
    parallel shard `<prefix>.loss_mask` where there is one, else None: learn all).

    Raises ValueError that names the file if it is not a shard of version 1, or is cut short or too long.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        lengths, pointers, self._bounds, dtype = _read_index(idx_path(prefix))
        self._pointers, self._itemsize = pointers, dtype.itemsize
        self.num_documents = len(self._bounds) - 1
        expected = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize if len(lengths) else 0
        size = bin_path(prefix).stat().st_size
        if size != expected:
            raise ValueError(f"{bin_path(prefix)} has {size} bytes, its index says {expected}: build the shard again")
        self.num_tokens = expected // dtype.itemsize
        self.tokens = np.memmap(bin_path(prefix), dtype=dtype, mode="r") if size else np.empty(0, dtype)
        self.mask = self._read_mask()

    def starts(self, first: int, last: int) -> np.ndarray:
        """Return where documents `first` to `last - 1` start in `tokens`, and where the last ends: int64 [N + 1]."""
        sequences = np.asarray(self._bounds[first : last + 1])
        starts = np.full(len(sequences), self.num_tokens, dtype=np.int64)
        inside = sequences < len(self._pointers)
        starts[inside] = self._pointers[sequences[inside]] // self._itemsize
        return starts

    def __len__(self) -> int:
        return self.num_documents

    def __getitem__(self, document: int) -> np.ndarray:
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of a shard of {self.num_documents}")
        start, stop = self.starts(document, document + 1)
        return self.tokens[start:stop]

    def _read_mask(self) -> np.ndarray | None:
        prefix = self.prefix.parent / f"{self.prefix.name}.loss_mask"
        if not idx_path(prefix).exists():
            return None
        mask = Shard(prefix)
        if mask.num_tokens != self.num_tokens:
            raise ValueError(f"{prefix}.bin masks {mask.num_tokens} tokens of {self.num_tokens}: build the shard again")
        return mask.tokens


class MemoryDocuments:
    """Documents held in memory, with the same attributes as a `Shard`; for fine-tuning data and tests.

    `documents` are lists of tokens; `loss_masks`, if given, say for each token whether it is learnt.
    """

    def __init__(self, documents: Sequence[Sequence[int]], loss_masks: Sequence[Sequence[bool]] | None = None) -> None:
        lengths = np.fromiter((len(document) for document in documents), np.int64, len(documents))
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self.num_documents, self.num_tokens = len(documents), int(self._starts[-1])
        self.tokens = np.fromiter((token for document in documents for token in document), np.int32, self.num_tokens)
        self.mask: np.ndarray | None = None
        if loss_masks is not None:
            for number, (document, mask) in enumerate(zip(documents, loss_masks, strict=True)):
                if len(document) != len(mask):
                    raise ValueError(f"document {number} has {len(document)} tokens and a loss mask of {len(mask)}")
            self.mask = np.fromiter((learn for mask in loss_masks for learn in mask), np.bool_, self.num_tokens)

    def starts(self, first: int, last: int) -> np.ndarray:
        """See `Shard.starts`."""
        return self._starts[first : last + 1]


class ShardChain:
    """Several shards read as one, end to end, with the same attributes as a `Shard`."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = list(shards)
        self._first_documents = np.cumsum([0, *(shard.num_documents for shard in shards)])
        self.num_documents = int(self._first_documents[-1])
        self.tokens = _Chain([shard.tokens for shard in shards])
        self.num_tokens = int(self.tokens.firsts[-1])
        masks = [shard.mask for shard in shards if shard.mask is not None]
        if masks and len(masks) != len(shards):
            raise ValueError(f"{len(masks)} of {len(shards)} shards have a loss mask: give all of them one, or none")
        self.mask = _Chain(masks) if masks else None

    def starts(self, first: int, last: int) -> np.ndarray:
        """See `Shard.starts`."""
        parts = []
        for shard, begin, offset in zip(self._shards, self._first_documents, self.tokens.firsts, strict=False):
            low, high = max(first - begin, 0), min(last - begin, shard.num_documents)
            if low < high:
                parts.append(shard.starts(low, high)[:-1] + offset)
        final = np.searchsorted(self._first_documents, last, "right") - 1
        end = self.tokens.firsts[final]
        if last > self._first_documents[final]:
            end += self._shards[final].starts(last - self._first_documents[final], last - self._first_documents[final])[
                0
            ]
        return np.concatenate([*parts, [end]]).astype(np.int64)


class _Chain:
    """Arrays end to end, indexed by an array of places."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = arrays
        self.firsts = np.cumsum([0, *map(len, arrays)])

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        values = np.empty(len(places), dtype=np.int64)
        owner = np.searchsorted(self.firsts, places, "right") - 1
        for number in np.unique(owner).tolist():
            inside = owner == number
            values[inside] = self._arrays[number][places[inside] - self.firsts[number]]
        return values


Documents = Shard | ShardChain | MemoryDocuments


def verify(folder: Path, entry: dict[str, Any]) -> None:
    """Compare a shard's files with its manifest entry, reading every byte.

    Raises ValueError that names the file that is missing, has another size or another checksum.
    """
    for name, expected in entry["files"].items():
        path = folder / name
        if not path.exists():
            raise ValueError(f"{path} is in the manifest and not on disk: build the data again")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{path} has {size} bytes, the manifest says {expected['bytes']}: build it again")
        found = _describe_file(path)["sha256"]
        if found != expected["sha256"]:
            raise ValueError(
                f"{path} is damaged: checksum {found[:12]}…, not {expected['sha256'][:12]}…: build it again"
            )


def describe(prefix: Path) -> dict[str, Any]:
    """Return the manifest entry of a shard that is there already, reading every byte. See `ShardWriter.close`."""
    shard = Shard(prefix)
    return {
        "documents": shard.num_documents,
        "tokens": shard.num_tokens,
        "dtype": shard.tokens.dtype.name,
        "files": {path.name: _describe_file(path) for path in (bin_path(prefix), idx_path(prefix))},
    }


def require_disk(folder: Path, num_bytes: int) -> None:
    """Raise OSError in one line if `folder`'s disk has no room for `num_bytes`."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(f"{folder}: {free / 1e6:.0f} MB free, about {num_bytes / 1e6:.0f} MB needed: make room first")


def _read_index(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.dtype]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: is this the prefix of a .bin/.idx shard?")
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise ValueError(f"{path} does not begin as a Megatron index (MMIDIDX): it is another file, or damaged")
    _, version, code, num_sequences, num_bounds = HEADER.unpack(header)
    if version != VERSION or code not in DTYPES:
        raise ValueError(f"{path}: version {version}, token type {code}; version {VERSION}, types 1 to 8 are readable")
    needed = HEADER.size + 12 * num_sequences + 8 * num_bounds
    if size not in (needed, needed + num_sequences) or num_bounds < 1:  # one byte more per sequence: its mode
        raise ValueError(f"{path} has {size} bytes where its header asks for {needed}: it is cut short or damaged")

    def array(offset: int, dtype: type, count: int) -> np.ndarray:
        return np.memmap(path, dtype, "r", offset, (count,)) if count else np.empty(0, dtype)

    lengths = array(HEADER.size, np.int32, num_sequences)
    pointers = array(HEADER.size + 4 * num_sequences, np.int64, num_sequences)
    bounds = array(HEADER.size + 12 * num_sequences, np.int64, num_bounds)
    if bounds[0] != 0 or bounds[-1] != num_sequences:
        raise ValueError(f"{path}: documents cover sequences {bounds[0]} to {bounds[-1]} of {num_sequences}: damaged")
    return lengths, pointers, bounds, np.dtype(DTYPES[code])


def _describe_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
