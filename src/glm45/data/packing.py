"""Best-fit packing: documents into rows of a fixed capacity, none cut (report section 2, mid-training).

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

    About a microsecond a document: bit r of `rooms` says that some bin has room r left, so that "the least room of
    at least n" is the lowest bit of `rooms >> n`.
    """
    if len(lengths_N) and not 1 <= lengths_N.min() <= lengths_N.max() <= capacity:
        wrong = int(lengths_N.max() if lengths_N.max() > capacity else lengths_N.min())
        raise ValueError(f"a document of {wrong} tokens cannot be packed into rows of {capacity}: split or drop it")
    bin_N = np.empty(len(lengths_N), dtype=np.int64)
    order_N = np.argsort(-lengths_N, kind="stable")
    chosen: list[int] = []
    bins_with_room: dict[int, list[int]] = {}
    rooms = num_bins = 0
    for length in lengths_N[order_N].tolist():
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            stack = bins_with_room[room]
            number = stack.pop()
            if not stack:
                rooms ^= 1 << room
        else:
            room, number = capacity, num_bins
            num_bins += 1
        chosen.append(number)
        room -= length
        if room:
            stack = bins_with_room.setdefault(room, [])
            if not stack:
                rooms |= 1 << room
            stack.append(number)
    bin_N[order_N] = chosen
    return bin_N, num_bins


def split_long(starts_N: np.ndarray, lengths_N: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut every document longer than `capacity` into pieces of `capacity` and a rest; return starts and lengths."""
    pieces_N = np.maximum(1, -(-lengths_N // capacity))
    first_N = np.cumsum(pieces_N) - pieces_N
    skipped = (np.arange(pieces_N.sum()) - np.repeat(first_N, pieces_N)) * capacity
    lengths = np.minimum(np.repeat(lengths_N, pieces_N) - skipped, capacity)
    return np.repeat(starts_N, pieces_N) + skipped, lengths
