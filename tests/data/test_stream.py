"""The order of documents, and what a stage reads of one dataset."""

import itertools
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45.data import stream
from glm45.data.shards import MemoryDocuments
from glm45.data.stream import Cursor, DocumentOrder, Pieces, Stream


def of_lengths(lengths):
    return MemoryDocuments([[0] * length for length in lengths])


def epochs_of(order, count):
    size = order.documents.num_documents
    return [order.documents_between(epoch * size, (epoch + 1) * size).starts_N.tolist() for epoch in range(count)]


def test_every_epoch_has_its_own_order():
    orders = epochs_of(DocumentOrder(of_lengths([1] * 50), 0, "a.b"), 4)
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_blocks_are_shuffled_and_so_are_documents_within_them():
    """Twelve blocks of ten: an epoch visits each block whole, in an order of its own."""
    with mock.patch.object(stream, "BLOCK", 10):
        orders = np.array(epochs_of(DocumentOrder(of_lengths([1] * 120), 0, "a.b"), 3)).reshape(3, 12, 10)
    blocks = orders // 10
    assert (blocks == blocks[:, :, :1]).all()
    assert len({tuple(order) for order in blocks[:, :, 0].tolist()}) == 3
    assert blocks[0, :, 0].tolist() != list(range(12))
    within = {tuple(order % 10) for order in orders.reshape(-1, 10)}
    assert len(within) > 30


def test_datasets_and_seeds_have_their_own_orders():
    orders = [
        epochs_of(DocumentOrder(of_lengths([1] * 50), seed, name), 1)[0] for seed in (0, 1) for name in ("a", "b")
    ]
    assert len({tuple(order) for order in orders}) == 4


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any), st.integers(0, 500), st.sampled_from([3, 1 << 18])
)
def test_a_position_is_found_in_the_document_that_holds_it(lengths, position, block):
    with mock.patch.object(stream, "BLOCK", block):
        order = DocumentOrder(of_lengths(lengths), 0, "a.b")
        document, offset = order.locate(position)
        assert order.position(document) + offset == position
        assert 0 <= offset < order.documents_between(document, document + 1).lengths_N[0]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=30),
    st.lists(st.integers(1, 9), max_size=6),
    st.integers(0, 40),
    st.lists(st.integers(0, 120), min_size=1, max_size=6),
)
def test_cutting_a_stream_anywhere_gives_every_piece_once(lengths, pending, document, cuts):
    """Whole pieces by where they start, and tokens by their place, from any cursor on."""
    starts = 1_000 + np.cumsum([0, *pending])[:-1]  # not the documents' own places, to tell them apart
    cursor = Cursor(document, Pieces(np.array(starts, np.int64), np.array(pending, np.int64)))
    order = DocumentOrder(of_lengths(lengths), 0, "a.b")
    read = Stream(order, cursor)
    bounds = [0, *sorted(cuts)]
    whole, tokens = [], []
    for first, last in itertools.pairwise(bounds):
        pieces = read.starting(first, last)
        whole += zip(pieces.starts_N.tolist(), pieces.lengths_N.tolist(), strict=True)
        pieces = read.between(first, last) if last > first else Pieces(np.empty(0, int), np.empty(0, int))
        tokens += [s + i for s, n in zip(pieces.starts_N, pieces.lengths_N, strict=True) for i in range(n)]
    rest = order.documents_between(document, document + 200)
    expected = [
        *zip(starts.tolist(), pending, strict=True),
        *zip(rest.starts_N.tolist(), rest.lengths_N.tolist(), strict=True),
    ]
    assert whole == expected[: len(whole)]
    assert sum(length for _, length in whole) >= bounds[-1]
    assert sum(length for _, length in whole[:-1]) < max(bounds[-1], 1)
    assert tokens == [s + i for s, n in expected for i in range(n)][: bounds[-1]]


@pytest.mark.parametrize("quota", [7.0, 20.0, 33.3, 50.0, 99.0])
@pytest.mark.parametrize("document", [0, 3, 9])
def test_windows_begin_where_epochs_end_and_keep_the_quota(quota, document):
    """A dataset of 10 documents of 10 tokens: every epoch's end is a window's, and windows are a quota on average."""
    read = Stream(DocumentOrder(of_lengths([10] * 10), 0, "a.b"), Cursor(document))
    bounds = [read.boundary(window, quota) + 10 * document for window in range(200)]
    assert bounds == sorted(bounds)
    assert bounds[0] == 10 * document
    assert set(range(100, bounds[-1], 100)) <= set(bounds)
    assert abs(bounds[-1] - bounds[0] - 199 * quota) <= 1.5 * quota
