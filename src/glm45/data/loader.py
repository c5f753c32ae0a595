"""Batches as a pure function of (seed, mixture, sequence length, packing, row): resume state is one integer.

Nothing is consumed, so any batch can be asked for at any time by any rank, and n ranks together get the bytes that
one rank would get.

Shapes: B rows of a batch, T sequence length, N pieces of documents.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch

from glm45.data.folder import DataFolder
from glm45.data.mixture import Mixture, epochs, shares
from glm45.data.rows import ConcatenatedRows, PackedRows, PlacedPieces
from glm45.data.shards import Documents
from glm45.data.stream import Cursor, DocumentOrder, Stream

Packing = Literal["concatenate", "best_fit"]
Long = Literal["split", "drop"]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of packed documents. The target of position i is token i + 1, where both are of one document."""

    tokens_BT: torch.Tensor
    """int64; 0 where there is padding."""
    document_ids_BT: torch.Tensor
    """int64: 0, 1, ... within a row, equal for one document's tokens; -1 where there is padding."""
    positions_BT: torch.Tensor
    """int64: 0, 1, ... within a document, or within the part of it that this row holds."""
    loss_mask_BT: torch.Tensor
    """bool: tokens that are learnt as targets; never padding."""

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on `device`."""
        tensors = (self.tokens_BT, self.document_ids_BT, self.positions_BT, self.loss_mask_BT)
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


class Loader:
    """Batches of one stage: one mixture, one sequence length, one way of packing.

    `folder` is a data folder's path, an open `DataFolder`, or datasets by name. `mixture` is a `Mixture` or a table of
    weights. `start` says where earlier stages left each dataset (see `cursors`); a dataset not named starts at its
    beginning. `long` says what best-fit packing does with documents longer than a row.

    Raises ValueError for what `glm45.data.mixture.shares` refuses, and for a dataset of which packing keeps nothing.
    """

    def __init__(
        self,
        folder: Path | str | DataFolder | Mapping[str, Documents],
        mixture: Mixture | Mapping[str, float],
        sequence_length: int,
        packing: Packing = "concatenate",
        seed: int = 0,
        *,
        long: Long = "split",
        start: Mapping[str, Cursor] | None = None,
    ) -> None:
        if sequence_length < 2:
            raise ValueError(f"sequence_length = {sequence_length}: a row needs at least 2 tokens")
        self.folder, self.mixture = open_folder(folder), mixture
        self.sequence_length, self.packing, self.seed, self.long = sequence_length, packing, seed, long
        self.shares = shares(mixture, self.folder.tokens)
        self._start, self._names = dict(start or {}), list(self.shares)
        self._documents = [self.folder.datasets[name] for name in self._names]
        self._rows = self._open_rows()

    def batch(self, index: int, global_batch_size: int, rank: int = 0, num_ranks: int = 1) -> Batch:
        """Return rank `rank`'s equal part of global batch `index`, where all batches have `global_batch_size` rows."""
        return self.rows(index * global_batch_size, global_batch_size, rank, num_ranks)

    def rows(self, first: int, count: int, rank: int = 0, num_ranks: int = 1) -> Batch:
        """Return rank `rank`'s equal part of the `count` rows of the stage from row `first` on."""
        if count % num_ranks or not 0 <= rank < num_ranks:
            raise ValueError(f"{count} rows cannot be divided among {num_ranks} ranks (rank {rank}): change either")
        share = count // num_ranks
        begin = first + rank * share
        placed = self._rows.pieces(begin, begin + share)
        return _assemble(placed, self._documents, share, self.sequence_length)

    def cursors(self, num_rows: int) -> dict[str, Cursor]:
        """Return where this stage leaves every dataset after `num_rows` rows: the next stage's `start`."""
        return self._start | dict(zip(self._names, self._rows.cursors(num_rows), strict=True))

    def epochs(self, num_rows: int) -> dict[str, float]:
        """Return how many times `num_rows` rows read each dataset; see `glm45.data.mixture.epochs`."""
        return epochs(self.mixture, self.folder.tokens, num_rows * self.sequence_length)

    def num_long(self) -> dict[str, int]:
        """Return for each dataset how many documents are longer than a row: best-fit packing splits or drops them."""
        return {name: _count(self.folder.datasets[name], self.sequence_length + 1) for name in self._names}

    def _open_rows(self) -> ConcatenatedRows | PackedRows:
        streams = [
            Stream(DocumentOrder(documents, self.seed, name), self._start.get(name, Cursor()))
            for name, documents in zip(self._names, self._documents, strict=True)
        ]
        share_D = list(self.shares.values())
        if self.packing == "concatenate":
            return ConcatenatedRows(streams, share_D, self.sequence_length, self.seed)
        if self.packing != "best_fit":
            raise ValueError(f"packing = {self.packing!r}: choose 'concatenate' or 'best_fit'")
        for name, documents in zip(self._names, self._documents, strict=True):
            if self.long == "drop" and not _count(documents, 1, self.sequence_length):
                raise ValueError(
                    f"{name}: no document fits {self.sequence_length} tokens: use long='split' or longer rows"
                )
        return PackedRows(streams, share_D, self.sequence_length, self.long, self.seed)


def _assemble(placed: PlacedPieces, documents: Sequence[Documents], rows: int, sequence_length: int) -> Batch:
    """Lay pieces one after another from the beginning of each one's row."""
    first_of_row_N = np.searchsorted(placed.row_N, placed.row_N)  # index of the first piece of the same row
    end_N = np.cumsum(placed.lengths_N)
    column_N = end_N - placed.lengths_N - (end_N - placed.lengths_N)[first_of_row_N]
    number_N = np.arange(len(placed.row_N)) - first_of_row_N
    by_dataset_N = np.argsort(placed.dataset_N, kind="stable")
    lengths_N = placed.lengths_N[by_dataset_N]

    def spread(value_N: np.ndarray) -> np.ndarray:
        return np.repeat(value_N[by_dataset_N], lengths_N)

    position = np.arange(int(lengths_N.sum())) - np.repeat(np.cumsum(lengths_N) - lengths_N, lengths_N)
    source = spread(placed.starts_N) + position
    target = spread(placed.row_N * sequence_length + column_N) + position
    tokens, positions = (np.zeros(rows * sequence_length, dtype=np.int64) for _ in range(2))
    document_ids = np.full(rows * sequence_length, -1, dtype=np.int64)
    loss_mask = np.zeros(rows * sequence_length, dtype=np.bool_)
    positions[target] = position
    document_ids[target] = spread(number_N)
    num_tokens_D = np.bincount(placed.dataset_N, placed.lengths_N, len(documents)).astype(np.int64)
    for each, end, count in zip(documents, np.cumsum(num_tokens_D), num_tokens_D, strict=True):
        mine = slice(end - count, end)
        tokens[target[mine]] = each.tokens[source[mine]]
        loss_mask[target[mine]] = True if each.mask is None else each.mask[source[mine]]
    shaped = (array.reshape(rows, sequence_length) for array in (tokens, document_ids, positions, loss_mask))
    return Batch(*map(torch.from_numpy, shaped))


def open_folder(folder: Path | str | DataFolder | Mapping[str, Documents]) -> DataFolder:
    """Return `folder` as a `DataFolder`, opening it if it is a path."""
    if isinstance(folder, DataFolder):
        return folder
    return DataFolder(folder) if isinstance(folder, Mapping) else DataFolder.open(folder)


def held_out_batches(
    folder: Path | str | DataFolder | Mapping[str, Documents], sequence_length: int, batch_size: int, max_rows: int
) -> dict[str, list[Batch]]:
    """Return for each source the batches of its held-out documents, at most `max_rows` rows, always the same ones.

    Documents are packed whole, cut only where they are longer than a row; the last batch of a source may be smaller.
    """
    folder = open_folder(folder)
    result = {}
    for source, name in folder.held_out.items():
        documents = folder.datasets[name]
        if not documents.num_tokens:
            raise ValueError(f"{name} has no tokens: build the data again with a source that gives some")
        rows = PackedRows([Stream(DocumentOrder(documents, 0, name), Cursor())], [1.0], sequence_length, "split", 0)
        num_rows = min(max_rows, rows.rows_of_epoch())
        batches = []
        for first in range(0, num_rows, batch_size):
            last = min(first + batch_size, num_rows)
            batches.append(_assemble(rows.pieces(first, last), [documents], last - first, sequence_length))
        result[source] = batches
    return result


def prefetch(make: Callable[[int], Result], first: int, last: int, depth: int = 2) -> Iterator[Result]:
    """Yield `make(first)`, ..., `make(last - 1)`, made up to `depth` ahead in a thread; errors are raised in order."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        ahead: deque[Future[Result]] = deque()
        try:
            for index in range(first, last):
                ahead.append(pool.submit(make, index))
                if len(ahead) > depth:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _count(documents: Documents, shortest: int, longest: int = 1 << 62) -> int:
    """Count documents of `shortest` to `longest` tokens, a stretch at a time."""
    total = 0
    for first in range(0, documents.num_documents, 1 << 20):
        lengths_N = np.diff(documents.starts(first, min(first + (1 << 20), documents.num_documents)))
        total += int(np.count_nonzero((lengths_N >= shortest) & (lengths_N <= longest)))
    return total
