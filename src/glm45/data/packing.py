"""Best-fit packing: documents into rows of a fixed capacity, none cut (report section 2.3, mid-training).

Shapes: N documents.
"""

from collections.abc import Sequence

import numpy as np


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack documents into bins of `capacity` tokens and return each bin's documents, by index.

    Best-fit decreasing: from the longest on, each document goes to the bin with the least room that still takes it.

    Raises ValueError for a document longer than `capacity` or shorter than one token.
    """
    bin_N, num_bins = assign_bins(np.asarray(lengths, dtype=np.int64), capacity)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for document, number in enumerate(bin_N.tolist()):
        bins[number].append(document)
    return bins


def assign_bins(lengths_N: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Return the bin of every document, int64 [N], and the number of bins. See `best_fit`.

    Takes 1 to 2 microseconds a document, whatever the capacity.
    """
    if len(lengths_N) and not 1 <= lengths_N.min() <= lengths_N.max() <= capacity:
        wrong = int(lengths_N.max() if lengths_N.max() > capacity else lengths_N.min())
        raise ValueError(f"a document of {wrong} tokens cannot be packed into rows of {capacity}: split or drop it")
    bin_N = np.empty(len(lengths_N), dtype=np.int64)
    order_N = np.argsort(-lengths_N, kind="stable")
    chosen: list[int] = []
    bins_with_room: dict[int, list[int]] = {}
    rooms, num_bins = _Rooms(capacity), 0
    for length in lengths_N[order_N].tolist():
        if room := rooms.least(length):
            stack = bins_with_room[room]
            number = stack.pop()
            if not stack:
                rooms.flip(room)
        else:
            room, number = capacity, num_bins
            num_bins += 1
        chosen.append(number)
        room -= length
        if room:
            stack = bins_with_room.setdefault(room, [])
            if not stack:
                rooms.flip(room)
            stack.append(number)
    bin_N[order_N] = chosen
    return bin_N, num_bins


class _Rooms:
    """Which amounts of room some bin has left: bits in words of 512, and one bit a word that is not zero."""

    def __init__(self, capacity: int) -> None:
        self._words = [0] * (capacity // 512 + 1)
        self._nonzero = 0

    def flip(self, room: int) -> None:
        """Note that the first bin with this room came, or that the last one went."""
        place = room >> 9
        self._words[place] ^= 1 << (room & 511)
        if self._words[place]:
            self._nonzero |= 1 << place
        else:
            self._nonzero ^= 1 << place

    def least(self, length: int) -> int:
        """Return the least room of at least `length`, 0 if there is none."""
        place = length >> 9
        if fitting := self._words[place] >> (length & 511):
            return length + _lowest_bit(fitting)
        if later := self._nonzero >> (place + 1):
            place += 1 + _lowest_bit(later)
            return (place << 9) + _lowest_bit(self._words[place])
        return 0


def _lowest_bit(number: int) -> int:
    return (number & -number).bit_length() - 1


def split_long(starts_N: np.ndarray, lengths_N: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut every document longer than `capacity` into pieces of `capacity` and a rest; return starts and lengths."""
    pieces_N = np.maximum(1, -(-lengths_N // capacity))
    first_N = np.cumsum(pieces_N) - pieces_N
    skipped = (np.arange(pieces_N.sum()) - np.repeat(first_N, pieces_N)) * capacity
    lengths = np.minimum(np.repeat(lengths_N, pieces_N) - skipped, capacity)
    return np.repeat(starts_N, pieces_N) + skipped, lengths
