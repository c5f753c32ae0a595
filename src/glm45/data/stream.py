"""The documents of one dataset in the order in which they are read.

Everything is a function of (seed, dataset, position): nothing is consumed, so any row can be asked for at any time.
A *piece* is a stretch of the dataset's tokens that belongs to one document: where it starts and its length.

Shapes: N documents or pieces.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from glm45.data.shards import Documents
from glm45.seeds import derive_seed

BLOCK = 1 << 18  # documents shuffled together: bounds memory at 4 MB a block whatever the dataset's size
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
        self._blocks: Recent[tuple[int, int], tuple[np.ndarray, np.ndarray]] = Recent(2)
        self._epochs: Recent[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = Recent(2)

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


class Stream:
    """What a stage reads of one dataset: what earlier stages left pending, then documents that none has touched.

    Positions count tokens from the stage's first one on.
    """

    def __init__(self, order: DocumentOrder, cursor: Cursor) -> None:
        self.order = order
        self._pending, self.first_document = cursor.pending, cursor.document
        self._num_pending = int(cursor.pending.lengths_N.sum())
        self._base = order.position(cursor.document) - self._num_pending

    def between(self, first: int, last: int) -> Pieces:
        """Return the tokens at positions `first` to `last - 1`, as pieces."""
        pieces = self._pending.cut(first, min(last, self._num_pending)) if first < self._num_pending else NOTHING
        untouched = max(first, self._num_pending)
        return pieces + self.order.tokens_between(self._base + untouched, self._base + last)

    def starting(self, first: int, last: int) -> Pieces:
        """Return the pieces that start at positions `first` to `last - 1`, whole."""
        documents = self.order.documents_between(self._document_at(first), self._document_at(last))
        return self._pending_from(first, last) + documents

    def boundary(self, window: int, quota: float) -> int:
        """Return the position at which a window of about `quota` tokens begins: at an epoch's end where one is near.

        If the stage begins within an epoch that ends soon, the first window is what is left of it.
        """
        if window == 0:
            return 0
        tokens, begin = self.order.documents.num_tokens, self._base
        first_end = -(-begin // tokens) * tokens
        if begin < first_end < begin + 1.5 * quota:
            begin, window = first_end, window - 1
        place = begin + int(window * quota)
        nearest_end = (2 * place + tokens) // (2 * tokens) * tokens
        near = 2 * abs(place - nearest_end) <= quota + 1  # one more, since places are rounded: some window is near
        return (nearest_end if near else place) - self._base

    def cursor(self, position: int) -> Cursor:
        """Return where a stage leaves the dataset that reads everything before `position`, cutting there."""
        if position < self._num_pending:
            return Cursor(self.first_document, self._pending.cut(position, self._num_pending))
        document, offset = self.order.locate(self._base + position)
        whole = self.order.documents_between(document, document + 1)
        return Cursor(document + 1, whole.cut(offset, int(whole.lengths_N[0])))

    def cursor_of_whole(self, position: int, unread: Pieces) -> Cursor:
        """Return where a stage leaves the dataset that reads what starts before `position`, except `unread`."""
        return Cursor(self._document_at(position), unread + self._pending_from(position, self._num_pending))

    def _pending_from(self, first: int, last: int) -> Pieces:
        starts = np.cumsum(self._pending.lengths_N) - self._pending.lengths_N
        inside = (starts >= first) & (starts < last)
        return Pieces(self._pending.starts_N[inside], self._pending.lengths_N[inside])

    def _document_at(self, position: int) -> int:
        """Return the ordinal of the first untouched document that starts at or after `position`."""
        if position <= self._num_pending:
            return self.first_document
        document, offset = self.order.locate(self._base + position)
        return document + (offset > 0)


class Recent(Generic[Key, Value]):
    """The few values that were built last; an older one is built again when it is asked for."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: dict[Key, Value] = {}

    def get(self, key: Key, build: Callable[[], Value]) -> Value:
        """Return the value of `key`, built if it is not at hand."""
        if (value := self._values.get(key)) is None:
            value = build()
            kept = list(self._values.items())[-(self._size - 1) :]
            self._values = {**dict(kept), key: value}  # a new dictionary: another thread may be reading the old one
        return value
