"""A stage's rows: cut from each dataset's documents laid end to end, or packed from the documents of all of them.

Shapes: N pieces, D datasets, R rows.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from glm45.data.mixture import Interleaver
from glm45.data.packing import assign_bins, split_long
from glm45.data.stream import NOTHING, Cursor, Pieces, Recent, Stream
from glm45.seeds import derive_seed

WINDOW_DOCUMENTS = 1 << 14  # documents packed together, about, and at least
WINDOW_ROWS = 256  # so many rows: the last rows of a window are not full
FEWEST_ROWS = 64  # a dataset whose epoch is shorter does not make the windows of a mixture shorter


@dataclass(frozen=True)
class PlacedPieces:
    """Pieces by row: those of one row follow one another from its first token on."""

    dataset_N: np.ndarray
    starts_N: np.ndarray
    lengths_N: np.ndarray
    row_N: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[tuple[int, Pieces]], row_N: np.ndarray) -> "PlacedPieces":
        """Sort the pieces of several datasets by row."""
        dataset_N = np.concatenate([np.full(len(pieces.starts_N), dataset) for dataset, pieces in parts])
        order_N = np.argsort(row_N, kind="stable")
        return cls(
            dataset_N[order_N],
            np.concatenate([pieces.starts_N for _, pieces in parts])[order_N],
            np.concatenate([pieces.lengths_N for _, pieces in parts])[order_N],
            row_N[order_N],
        )

    def rows(self, first: int, last: int, offset: int) -> "PlacedPieces":
        """Return the pieces of rows `first` to `last - 1`, with rows numbered from `offset` on."""
        inside = slice(*np.searchsorted(self.row_N, [first, last]))
        return PlacedPieces(
            self.dataset_N[inside], self.starts_N[inside], self.lengths_N[inside], self.row_N[inside] - first + offset
        )

    def of_dataset(self, dataset: int, first_row: int) -> Pieces:
        """Return a dataset's pieces from row `first_row` on."""
        chosen = (self.dataset_N == dataset) & (self.row_N >= first_row)
        return Pieces(self.starts_N[chosen], self.lengths_N[chosen])


NO_PIECES = PlacedPieces(*(np.empty(0, np.int64) for _ in range(4)))


class ConcatenatedRows:
    """Rows cut from the documents laid end to end, for pre-training (report section 2.3: no best-fit packing there).

    A row is of one dataset; datasets take turns as the shares ask.
    """

    def __init__(self, streams: Sequence[Stream], share_D: Sequence[float], sequence_length: int, seed: int) -> None:
        self._streams, self._length = streams, sequence_length
        self._interleaver = Interleaver(share_D, seed)

    def pieces(self, first: int, last: int) -> PlacedPieces:
        """Return the pieces of rows `first` to `last - 1`, with rows numbered from 0 on."""
        dataset_R, number_R = self._interleaver.assign(first, last)
        parts, rows = [(0, NOTHING)], [np.empty(0, np.int64)]
        for dataset in np.unique(dataset_R).tolist():
            row_R = np.flatnonzero(dataset_R == dataset)
            begin = int(number_R[row_R[0]]) * self._length
            pieces = self._streams[dataset].between(begin, begin + len(row_R) * self._length)
            pieces, number_N = _cut_at_rows(pieces, self._length)
            parts.append((dataset, pieces))
            rows.append(row_R[number_N])
        return PlacedPieces.of(parts, np.concatenate(rows))

    def cursors(self, rows: int) -> list[Cursor]:
        """Return where a stage of `rows` rows leaves every dataset."""
        counts = self._interleaver.counts(rows)
        return [stream.cursor(count * self._length) for stream, count in zip(self._streams, counts, strict=True)]


class PackedRows:
    """Rows of whole documents by best-fit packing (report section 2.3, mid-training).

    The stage is cut into windows, to which every dataset gives the documents that start within its share of tokens.
    A window's documents are packed together, whatever their dataset, and its rows are read in a shuffled order. A
    dataset's epoch ends with a window, so that no document is read twice before every other was read once. How many
    rows a window has is found by packing it, once, when a row at or past it is first asked for.

    Documents longer than a row are cut into full rows and a rest (`long="split"`) or left out (`long="drop"`).
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        share_D: Sequence[float],
        sequence_length: int,
        long: Literal["split", "drop"],
        seed: int,
    ) -> None:
        self._streams, self._length, self._long, self._seed = streams, sequence_length, long, seed
        self.windows_per_epoch, self._quota_D = _plan_windows(streams, share_D, sequence_length)
        self._rows = [0]  # row at which each window begins
        self._windows: Recent[int, PlacedPieces] = Recent(2)
        self._lock = threading.Lock()

    def pieces(self, first: int, last: int) -> PlacedPieces:
        """Return the pieces of rows `first` to `last - 1`, with rows numbered from 0 on."""
        found, row = [NO_PIECES], first
        while row < last:
            window = self._find(row)
            begin, end = self._rows[window], min(last, self._rows[window + 1])
            found.append(self._window(window).rows(row - begin, end - begin, row - first))
            row = end
        columns = [(each.dataset_N, each.starts_N, each.lengths_N, each.row_N) for each in found]
        return PlacedPieces(*(np.concatenate(column) for column in zip(*columns, strict=True)))

    def cursors(self, rows: int) -> list[Cursor]:
        """Return where a stage of `rows` rows leaves every dataset."""
        window = self._find(rows)
        first_unread = rows - self._rows[window]
        packed, end = (self._window(window), window + 1) if first_unread else (NO_PIECES, window)
        return [
            stream.cursor_of_whole(self._position(end, dataset), packed.of_dataset(dataset, first_unread))
            for dataset, stream in enumerate(self._streams)
        ]

    def rows_of_epoch(self) -> int:
        """Return the number of rows of the first epoch of the dataset that is read most often."""
        with self._lock:
            while len(self._rows) <= self.windows_per_epoch:
                self._pack_next_window()
        return self._rows[self.windows_per_epoch]

    def _find(self, row: int) -> int:
        """Return the window that holds a row."""
        with self._lock:  # the prefetching thread and the caller of `cursors` may both come here
            while self._rows[-1] <= row:
                self._pack_next_window()
        return int(np.searchsorted(self._rows, row, "right")) - 1

    def _pack_next_window(self) -> None:
        row_N = self._window(len(self._rows) - 1).row_N
        self._rows.append(self._rows[-1] + (int(row_N[-1]) + 1 if len(row_N) else 0))

    def _position(self, window: int, dataset: int) -> int:
        """Return the position in a dataset's stream at which a window begins."""
        return self._streams[dataset].boundary(window, self._quota_D[dataset])

    def _window(self, window: int) -> PlacedPieces:
        return self._windows.get(window, lambda: self._pack(window))

    def _pack(self, window: int) -> PlacedPieces:
        parts = []
        for dataset, stream in enumerate(self._streams):
            pieces = stream.starting(self._position(window, dataset), self._position(window + 1, dataset))
            keep = pieces.lengths_N > 0
            if self._long == "drop":
                keep &= pieces.lengths_N <= self._length
            parts.append((dataset, Pieces(*split_long(pieces.starts_N[keep], pieces.lengths_N[keep], self._length))))
        bin_N, num_bins = assign_bins(np.concatenate([pieces.lengths_N for _, pieces in parts]), self._length)
        rng = np.random.default_rng(derive_seed(self._seed, "bins", self._streams[0].first_document, window))
        return PlacedPieces.of(parts, rng.permutation(num_bins)[bin_N])


def _plan_windows(streams: Sequence[Stream], share_D: Sequence[float], sequence_length: int) -> tuple[int, list[float]]:
    """Return the number of windows in the shortest epoch, and the tokens that each dataset gives to a window."""
    documents = [stream.order.documents for stream in streams]
    epoch_D = [each.num_tokens / share for each, share in zip(documents, share_D, strict=True)]
    per_token = sum(each.num_documents / epoch for each, epoch in zip(documents, epoch_D, strict=True))
    wanted = max(WINDOW_ROWS * sequence_length, WINDOW_DOCUMENTS / per_token)
    epoch = min((each for each in epoch_D if each >= FEWEST_ROWS * sequence_length), default=max(epoch_D))
    num_windows = max(1, round(epoch / wanted))
    return num_windows, [share * epoch / num_windows for share in share_D]


def _cut_at_rows(pieces: Pieces, row_length: int) -> tuple[Pieces, np.ndarray]:
    """Cut pieces that lie end to end at every multiple of `row_length`; return them and each one's row."""
    ends = np.cumsum(pieces.lengths_N)
    begins = ends - pieces.lengths_N
    cuts = np.union1d(begins, np.arange(0, ends[-1], row_length))
    whole = np.searchsorted(begins, cuts, "right") - 1
    return Pieces(pieces.starts_N[whole] + cuts - begins[whole], np.diff(np.append(cuts, ends[-1]))), cuts // row_length
