"""The documents of one dataset in the order in which they are read, and rows cut or packed from them.

Everything is a function of (seed, dataset, position): nothing is consumed, so any row can be asked for at any time.
A *piece* is a stretch of the dataset's tokens that belongs to one document: where it starts and its length.

Shapes: N documents or pieces.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

import numpy as np

from glm45.data.packing import assign_bins, split_long
from glm45.data.shards import Documents
from glm45.seeds import derive_seed

BLOCK = 1 << 18  # documents shuffled together: bounds memory at 4 MB a block whatever the dataset's size
WINDOW = 1 << 14  # documents packed together, or more where that would be fewer rows than
WINDOW_ROWS = 256  # this many: the last row of a window is seldom full
Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Pieces:
    """N pieces in order."""

    starts_N: np.ndarray
    lengths_N: np.ndarray

    def cut(self, first: int, last: int) -> "Pieces":
        """Return the pieces of the token range `first` to `last`, counted from the first piece's first token."""
        bounds = np.concatenate([[0], np.cumsum(self.lengths_N)])
        begin, end = np.searchsorted(bounds, first, "right") - 1, np.searchsorted(bounds, last, "left")
        lows, highs = np.maximum(bounds[begin:end], first), np.minimum(bounds[begin + 1 : end + 1], last)
        return Pieces(self.starts_N[begin:end] + lows - bounds[begin:end], highs - lows)

    def __add__(self, other: "Pieces") -> "Pieces":
        return Pieces(
            np.concatenate([self.starts_N, other.starts_N]), np.concatenate([self.lengths_N, other.lengths_N])
        )


NOTHING = Pieces(np.empty(0, np.int64), np.empty(0, np.int64))


@dataclass(frozen=True)
class Cursor:
    """How far earlier stages have read a dataset: where the next stage goes on, without repeating or skipping."""

    document: int = 0
    """Ordinal of the first document that no stage has touched, counted over epochs."""
    pending: Pieces = field(default=NOTHING)
    """What is unread of documents before that one: the rest of a cut document, or what packing had left over."""


class DocumentOrder:
    """A dataset's documents, epoch after epoch, each epoch in another order.

    An epoch visits the dataset's blocks in a shuffled order and the documents of each block in a shuffled order.
    Ordinal k is the k-th document of the endless sequence, position p its p-th token.
    """

    def __init__(self, documents: Documents, seed: int, name: str) -> None:
        self.documents, self._seed, self._name = documents, seed, name
        firsts = np.arange(0, documents.num_documents, BLOCK)
        self._sizes = np.minimum(BLOCK, documents.num_documents - firsts)
        ends = [int(documents.starts(end, end)[0]) for end in firsts + self._sizes]
        self._tokens = np.diff([0, *ends])
        self._blocks: _Recent[tuple[int, int], tuple[np.ndarray, np.ndarray]] = _Recent(2)
        self._epochs: _Recent[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = _Recent(2)

    def documents_between(self, first: int, last: int) -> Pieces:
        """Return documents of ordinals `first` to `last - 1`, each as one piece."""
        pieces = NOTHING
        while first < last:
            (starts, bounds), begin = self._at(first, self.documents.num_documents, by_token=False)
            end = min(begin + last - first, len(starts))
            pieces += Pieces(starts[begin:end], np.diff(bounds[begin : end + 1]))
            first += end - begin
        return pieces

    def tokens_between(self, first: int, last: int) -> Pieces:
        """Return the pieces of positions `first` to `last - 1`."""
        pieces = NOTHING
        while first < last:
            (starts, bounds), begin = self._at(first, self.documents.num_tokens, by_token=True)
            end = min(begin + last - first, int(bounds[-1]))
            inside = slice(np.searchsorted(bounds, begin, "right") - 1, np.searchsorted(bounds, end, "left"))
            block = Pieces(starts[inside], np.diff(bounds[inside.start : inside.stop + 1]))
            pieces += block.cut(begin - int(bounds[inside.start]), end - int(bounds[inside.start]))
            first += end - begin
        return pieces

    def position(self, document: int) -> int:
        """Return the position of the first token of the document of this ordinal."""
        epoch, rest = divmod(document, self.documents.num_documents)
        place, begin = self._place(epoch, rest, by_token=False)
        _, bounds = self._block(epoch, place)
        return epoch * self.documents.num_tokens + int(self._epoch(epoch)[2][place]) + int(bounds[begin])

    def locate(self, position: int) -> tuple[int, int]:
        """Return the ordinal of the document that holds a position, and the position within that document."""
        epoch, rest = divmod(position, self.documents.num_tokens)
        place, begin = self._place(epoch, rest, by_token=True)
        _, bounds = self._block(epoch, place)
        index = int(np.searchsorted(bounds, begin, "right")) - 1
        document = epoch * self.documents.num_documents + int(self._epoch(epoch)[1][place]) + index
        return document, begin - int(bounds[index])

    def _at(self, index: int, total: int, by_token: bool) -> tuple[tuple[np.ndarray, np.ndarray], int]:
        epoch, rest = divmod(index, total)
        place, begin = self._place(epoch, rest, by_token)
        return self._block(epoch, place), begin

    def _place(self, epoch: int, index: int, by_token: bool) -> tuple[int, int]:
        """Return which block of an epoch holds a document or token, and its index within the block."""
        bounds = self._epoch(epoch)[2 if by_token else 1]
        place = int(np.searchsorted(bounds, index, "right")) - 1
        return place, index - int(bounds[place])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return an epoch's order of blocks, and the number of documents and of tokens before each."""

        def build() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            order = self._rng(epoch).permutation(len(self._sizes))
            before = [np.concatenate([[0], np.cumsum(sizes[order])]) for sizes in (self._sizes, self._tokens)]
            return order, before[0], before[1]

        return self._epochs.get(epoch, build)

    def _block(self, epoch: int, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shuffled documents of a block: where each starts in the shard, and bounds within the block."""

        def build() -> tuple[np.ndarray, np.ndarray]:
            block = int(self._epoch(epoch)[0][place])
            starts = self.documents.starts(block * BLOCK, block * BLOCK + int(self._sizes[block]))
            order = self._rng(epoch, block).permutation(len(starts) - 1)
            return starts[order], np.concatenate([[0], np.cumsum(np.diff(starts)[order])])

        return self._blocks.get((epoch, place), build)

    def _rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng(derive_seed(self._seed, "documents", self._name, *purpose))


class ConcatenatedRows:
    """Rows cut from the documents laid end to end: for pre-training (report section 2.3: no best-fit packing there)."""

    def __init__(self, order: DocumentOrder, cursor: Cursor, sequence_length: int) -> None:
        self._order, self._length, self._pending = order, sequence_length, cursor.pending
        self._num_pending = int(cursor.pending.lengths_N.sum())
        self._base = order.position(cursor.document) - self._num_pending
        self._document = cursor.document

    def pieces(self, first: int, last: int) -> tuple[Pieces, np.ndarray]:
        """Return the pieces of rows `first` to `last - 1` and each piece's row, counted from `first`."""
        begin, end = first * self._length, last * self._length
        pieces = NOTHING
        if begin < self._num_pending:
            pieces = self._pending.cut(begin, min(end, self._num_pending))
        pieces += self._order.tokens_between(self._base + max(begin, self._num_pending), self._base + end)
        return _cut_at_rows(pieces, self._length)

    def cursor(self, rows: int) -> Cursor:
        """Return where a stage of `rows` rows leaves the dataset."""
        position = rows * self._length
        if position < self._num_pending:
            return Cursor(self._document, self._pending.cut(position, self._num_pending))
        document, offset = self._order.locate(self._base + position)
        if not offset:
            return Cursor(document)
        whole = self._order.documents_between(document, document + 1)
        return Cursor(document + 1, whole.cut(offset, int(whole.lengths_N[0])))


class PackedRows:
    """Rows of whole documents by best-fit packing (report section 2.3, mid-training).

    Documents are packed in windows that never cross an epoch, and a window's rows are read in a shuffled order.
    The number of rows of each window is found by packing it, once, when a row at or past it is first asked for.
    Documents longer than a row are cut into full rows and a rest (`long="split"`) or left out (`long="drop"`).
    """

    def __init__(
        self, order: DocumentOrder, cursor: Cursor, sequence_length: int, long: Literal["split", "drop"], seed: int
    ) -> None:
        self._order, self._length, self._long, self._seed = order, sequence_length, long, seed
        self._pending = cursor.pending
        fewest = WINDOW_ROWS * sequence_length * order.documents.num_documents // max(1, order.documents.num_tokens)
        self._size = max(WINDOW, 1 << fewest.bit_length())
        self._documents = [cursor.document]  # ordinal at which each window begins
        self._rows = [0]  # row at which each window begins
        self._windows: _Recent[int, tuple[Pieces, np.ndarray]] = _Recent(2)
        self._lock = threading.Lock()

    def pieces(self, first: int, last: int) -> tuple[Pieces, np.ndarray]:
        """Return the pieces of rows `first` to `last - 1` and each piece's row, counted from `first`."""
        pieces, rows = NOTHING, [np.empty(0, np.int64)]
        row = first
        while row < last:
            window = self._find(row)
            packed, row_N = self._window(window)
            begin, end = self._rows[window], min(last, self._rows[window + 1])
            inside = slice(*np.searchsorted(row_N, [row - begin, end - begin]))
            pieces += Pieces(packed.starts_N[inside], packed.lengths_N[inside])
            rows.append(row_N[inside] + begin - first)
            row = end
        return pieces, np.concatenate(rows)

    def cursor(self, rows: int) -> Cursor:
        """Return where a stage of `rows` rows leaves the dataset."""
        window = self._find(rows)
        if rows == self._rows[window]:
            return Cursor(self._documents[window], self._pending if window == 0 else NOTHING)
        packed, row_N = self._window(window)
        unread = slice(np.searchsorted(row_N, rows - self._rows[window]), None)
        return Cursor(self._documents[window + 1], Pieces(packed.starts_N[unread], packed.lengths_N[unread]))

    def rows_of_epoch(self) -> int:
        """Return the number of rows of the first epoch."""
        with self._lock:
            while self._documents[-1] < self._order.documents.num_documents:
                self._pack_next_window()
        return self._rows[-1]

    def _find(self, row: int) -> int:
        """Return the window that holds a row."""
        with self._lock:  # the prefetching thread and the caller of `cursor` may both come here
            while self._rows[-1] <= row:
                self._pack_next_window()
        return int(np.searchsorted(self._rows, row, "right")) - 1

    def _pack_next_window(self) -> None:
        window, num_documents = len(self._rows) - 1, self._order.documents.num_documents
        epoch, rest = divmod(self._documents[window], num_documents)
        end = epoch * num_documents + min((rest // self._size + 1) * self._size, num_documents)
        if window == 0 and len(self._pending.starts_N) and rest % self._size == 0:
            end = self._documents[0]  # the rest of an earlier stage's window comes before any of the next one
        self._documents.append(end)
        _, row_N = self._window(window)
        self._rows.append(self._rows[window] + (int(row_N[-1]) + 1 if len(row_N) else 0))

    def _window(self, window: int) -> tuple[Pieces, np.ndarray]:
        """Return a window's pieces sorted by row, and the row of each."""

        def build() -> tuple[Pieces, np.ndarray]:
            first, last = self._documents[window], self._documents[window + 1]
            pieces = self._order.documents_between(first, last)
            if window == 0:
                pieces = self._pending + pieces
            keep = pieces.lengths_N > 0
            if self._long == "drop":
                keep &= pieces.lengths_N <= self._length
            starts_N, lengths_N = split_long(pieces.starts_N[keep], pieces.lengths_N[keep], self._length)
            bin_N, num_bins = assign_bins(lengths_N, self._length)
            rng = np.random.default_rng(derive_seed(self._seed, "bins", first))
            row_N = rng.permutation(num_bins)[bin_N]
            by_row = np.argsort(row_N, kind="stable")
            return Pieces(starts_N[by_row], lengths_N[by_row]), row_N[by_row]

        return self._windows.get(window, build)


def _cut_at_rows(pieces: Pieces, row_length: int) -> tuple[Pieces, np.ndarray]:
    """Cut pieces that lie end to end at every multiple of `row_length`; return them and each one's row."""
    some = pieces.lengths_N > 0
    starts, ends = pieces.starts_N[some], np.cumsum(pieces.lengths_N[some])
    begins = ends - pieces.lengths_N[some]
    cuts = np.union1d(begins, np.arange(0, ends[-1], row_length))
    whole = np.searchsorted(begins, cuts, "right") - 1
    return Pieces(starts[whole] + cuts - begins[whole], np.diff(np.append(cuts, ends[-1]))), cuts // row_length


class _Recent(Generic[Key, Value]):
    """The few values that were built last; an older one is built again when it is asked for."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: dict[Key, Value] = {}

    def get(self, key: Key, build: Callable[[], Value]) -> Value:
        if (value := self._values.get(key)) is None:
            value = build()
            kept = list(self._values.items())[-(self._size - 1) :]
            self._values = {**dict(kept), key: value}  # a new dictionary: another thread may be reading the old one
        return value
