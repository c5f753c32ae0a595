"""Best-fit packing: nothing is lost, nothing is cut, and rows are full."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45.data.packing import assign_bins, best_fit, split_long


def plain_best_fit(lengths, capacity):
    """The definition, in quadratic time: the room left in each bin, longest document first."""
    rooms, bins = [], []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [number for number, room in enumerate(rooms) if room >= lengths[index]]
        if fitting:
            number = min(fitting, key=lambda number: rooms[number])
        else:
            number = len(bins)
            bins.append([])
            rooms.append(capacity)
        bins[number].append(index)
        rooms[number] -= lengths[index]
    return bins


lengths_and_capacity = st.sampled_from([*range(1, 60), 511, 512, 513, 5_000]).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=80), st.just(capacity))
)


@given(lengths_and_capacity)
def test_every_document_is_in_one_bin_and_no_bin_overflows(case):
    lengths, capacity = case
    bins = best_fit(lengths, capacity)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(members and sum(lengths[index] for index in members) <= capacity for members in bins)


@given(lengths_and_capacity)
def test_bins_hold_what_the_plain_definition_puts_there(case):
    """Which of two bins with equal room is taken does not matter: the fills must agree."""
    lengths, capacity = case
    fills = [
        sorted(sum(lengths[i] for i in members) for members in f(lengths, capacity)) for f in (best_fit, plain_best_fit)
    ]
    assert fills[0] == fills[1]


@pytest.mark.parametrize("mean, capacity", [(200, 2_048), (600, 4_096), (2_000, 32_768)])
def test_rows_are_at_least_98_percent_full_on_log_normal_lengths(mean, capacity):
    """Web text has log-normal lengths with a spread of about 1.2; longer documents are split."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(mean), 1.2, 10_000)).astype(np.int64) + 1
    _, lengths = split_long(np.zeros(len(lengths), np.int64), lengths, capacity)
    _, num_bins = assign_bins(lengths, capacity)
    assert lengths.sum() / (num_bins * capacity) >= 0.98


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="101 tokens cannot be packed into rows of 100"):
        best_fit([5, 101], 100)


@given(st.lists(st.tuples(st.integers(0, 1_000), st.integers(1, 50)), min_size=1, max_size=20), st.integers(1, 20))
def test_splitting_covers_each_document_in_order(documents, capacity):
    starts, lengths = (np.array(column) for column in zip(*documents, strict=True))
    pieces = [
        range(start, start + length) for start, length in zip(*split_long(starts, lengths, capacity), strict=True)
    ]
    assert all(1 <= len(piece) <= capacity for piece in pieces)
    expected = [token for start, length in documents for token in range(start, start + length)]
    assert [token for piece in pieces for token in piece] == expected
