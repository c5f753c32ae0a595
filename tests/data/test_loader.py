"""The loader: a pure function of its arguments, and no document lost, repeated or cut where it must not be.

Tokens of the test folder are unique, so that what was read can be told from the tokens themselves.
"""

import contextlib
import itertools
import shutil
import time
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45.data import rows as rows_module
from glm45.data import stream
from glm45.data.folder import DataFolder
from glm45.data.loader import Loader, held_out_batches, prefetch
from glm45.data.mixture import Mixture
from glm45.data.shards import MemoryDocuments, Shard

MIXTURE = Mixture(repeats={"*.high": 3.2})
PACKINGS = ["concatenate", "best_fit"]


def as_bytes(*batches):
    names = ("tokens_BT", "document_ids_BT", "positions_BT", "loss_mask_BT")
    return [torch.cat([getattr(batch, name) for batch in batches]).numpy().tobytes() for name in names]


def documents_in(batch):
    """The pieces of documents in a batch, in order, as lists of tokens."""
    pieces = []
    for tokens, ids in zip(batch.tokens_BT.tolist(), batch.document_ids_BT.tolist(), strict=True):
        for number, group in itertools.groupby(zip(ids, tokens, strict=True), key=lambda pair: pair[0]):
            if number >= 0:
                pieces.append([token for _, token in group])
    return pieces


shuffled_in = st.sampled_from([(1 << 18, 1 << 14), (8, 4), (3, 1)])  # documents a block and a window


def cut_into(sizes):
    """Shuffle and pack in smaller portions, so that few documents go through many."""
    patches = contextlib.ExitStack()
    patches.enter_context(mock.patch.object(stream, "BLOCK", sizes[0]))
    patches.enter_context(mock.patch.multiple(rows_module, WINDOW_DOCUMENTS=sizes[1], WINDOW_ROWS=1, FEWEST_ROWS=1))
    return patches


def in_memory(lengths, masks=None):
    bounds = np.cumsum([0, *lengths])
    documents = [list(range(a, b)) for a, b in itertools.pairwise(bounds)]
    return {"a.b": MemoryDocuments(documents, masks)}, documents


@pytest.mark.parametrize("packing", PACKINGS)
def test_50_steps_give_the_same_bytes_for_1_2_and_4_ranks_and_after_resume_at_every_step(data_folder, packing):
    def make():
        return Loader(data_folder, MIXTURE, 64, packing, seed=3)

    run = [as_bytes(make().batch(0, 8))] + [
        as_bytes(loader.batch(step, 8)) for loader in [make()] for step in range(1, 50)
    ]
    assert len({tokens for tokens, *_ in run}) == 50
    for step in range(50):
        resumed = make()  # a new process knows nothing but the step
        assert as_bytes(resumed.batch(step, 8)) == run[step]
        for ranks in (2, 4):
            assert as_bytes(*(resumed.batch(step, 8, rank, ranks) for rank in range(ranks))) == run[step]


@pytest.mark.parametrize("sizes", [(1 << 18, 1 << 14), (50, 20)])
@pytest.mark.parametrize("packing", PACKINGS)
def test_order_of_asking_does_not_matter(data_folder, packing, sizes):
    with cut_into(sizes):
        forward, backward = Loader(data_folder, MIXTURE, 32, packing), Loader(data_folder, MIXTURE, 32, packing)
        batches = {step: as_bytes(backward.batch(step, 4)) for step in reversed(range(200))}
        assert all(as_bytes(forward.batch(step, 4)) == batches[step] for step in range(200))


@pytest.mark.parametrize("packing", PACKINGS)
def test_another_seed_reads_in_another_order(data_folder, packing):
    one, two = (Loader(data_folder, MIXTURE, 64, packing, seed).batch(0, 8) for seed in (0, 1))
    assert as_bytes(one)[0] != as_bytes(two)[0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(2, 12), st.integers(0, 5), shuffled_in)
def test_concatenation_reads_every_token_once_an_epoch(lengths, sequence_length, seed, sizes):
    """Two epochs of rows, laid end to end, are two permutations of the documents, each whole and in order."""
    datasets, documents = in_memory(lengths)
    total = sum(lengths)
    with cut_into(sizes):
        loader = Loader(datasets, {"a.b": 1}, sequence_length, seed=seed)
        tokens = loader.rows(0, -(-2 * total // sequence_length)).tokens_BT.flatten().tolist()
    for epoch in range(2):
        left = tokens[epoch * total : (epoch + 1) * total]
        by_first = {document[0]: document for document in documents}
        while left:
            document = by_first.pop(left[0])
            assert left[: len(document)] == document
            left = left[len(document) :]
        assert not by_first


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(30, 60), st.integers(0, 5), shuffled_in)
def test_packing_reads_every_document_once_an_epoch_and_cuts_none(lengths, sequence_length, seed, sizes):
    datasets, documents = in_memory(lengths)
    with cut_into(sizes):
        loader = Loader(datasets, {"a.b": 1}, sequence_length, "best_fit", seed=seed)
        read, row, two_epochs = [], 0, sorted(documents * 2)
        while len(read) < len(two_epochs):
            read += documents_in(loader.rows(row, 1))
            row += 1
            if len(read) == len(documents):
                assert sorted(read) == documents
    assert sorted(read) == two_epochs


def test_document_ids_positions_and_mask_describe_the_tokens(data_folder):
    """Independently: tokens of a document count on, so ids change exactly where the count breaks or a shard says so."""
    shards = [Shard(data_folder / "shards" / name) for name in ("web.high", "web.medium", "code.high")]
    starts = {int(shard[document][0]) for shard in shards for document in range(len(shard))}
    for packing in PACKINGS:
        batch = Loader(data_folder, MIXTURE, 64, packing).rows(0, 15)
        for row in range(15):
            expected_id = expected_position = -1
            for column in range(64):
                token, document = batch.tokens_BT[row, column].item(), batch.document_ids_BT[row, column].item()
                if document == -1:
                    assert (batch.document_ids_BT[row, column:] == -1).all()
                    assert not batch.loss_mask_BT[row, column:].any()
                    assert not batch.tokens_BT[row, column:].any()
                    break
                new = column == 0 or token in starts or token != batch.tokens_BT[row, column - 1] + 1
                expected_id, expected_position = (expected_id + 1, 0) if new else (expected_id, expected_position + 1)
                assert (document, batch.positions_BT[row, column].item()) == (expected_id, expected_position)
                assert batch.loss_mask_BT[row, column]


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_keep_the_mixture(data_folder, packing):
    """Code is three quarters of the tokens, by whose tokens are read."""
    batch = Loader(data_folder, {"web.*": 0.25, "code.*": 0.75}, 64, packing).rows(0, 800)
    code = Shard(data_folder / "shards" / "code.high").tokens
    tokens = batch.tokens_BT[batch.document_ids_BT >= 0]
    share = ((tokens >= int(code[0])) & (tokens <= int(code[-1]))).double().mean().item()
    assert share == pytest.approx(0.75, abs=0.01)


def test_a_tiny_dataset_of_large_weight_does_not_spoil_the_packing():
    """Its epoch is two rows, and windows of four rows would be less full."""
    rng = np.random.default_rng(0)
    datasets = {
        "a.tiny": MemoryDocuments([[1] * 20] * 10),
        "a.large": MemoryDocuments([[2] * length for length in rng.integers(1, 100, 5_000)]),
    }
    batch = Loader(datasets, {"a.tiny": 1, "a.large": 1}, 100, "best_fit").rows(0, 500)
    assert (batch.document_ids_BT >= 0).double().mean() > 0.98


def test_packing_fills_rows_from_all_datasets():
    """Documents of 60 % of a row leave room that only another dataset's short ones fill."""
    datasets = {"a.long": MemoryDocuments([[1] * 60] * 600), "a.short": MemoryDocuments([[2] * 13] * 1_846)}
    batch = Loader(datasets, {"*": 1}, 100, "best_fit").rows(0, 500)
    assert (batch.document_ids_BT >= 0).double().mean() > 0.98


stage_lists = st.lists(
    st.tuples(st.integers(0, 25), st.integers(2, 40), st.sampled_from(PACKINGS)), min_size=2, max_size=5
)


def read_through(datasets, stages, seed):
    """Run a chain of stages; return how often each token was read, by dataset, and the last stage's cursors."""
    start, read = {}, []
    for rows, sequence_length, packing, mixture in stages:
        loader = Loader(datasets, mixture, sequence_length, packing, seed, start=start)
        batch = loader.rows(0, rows)
        read += batch.tokens_BT[batch.document_ids_BT >= 0].tolist()
        start = loader.cursors(rows)
    return np.bincount(read, minlength=sum(each.num_tokens for each in datasets.values())), start


def check_nothing_lost(times_N, documents, cursor):
    """What was read and what is pending are whole epochs plus the start of one."""
    times_N = times_N.copy()
    for first, length in zip(cursor.pending.starts_N, cursor.pending.lengths_N, strict=True):
        times_N[documents[0][0] + first : documents[0][0] + first + length] += 1
    epoch, touched = divmod(cursor.document, len(documents))
    per_document = [set(times_N[document].tolist()) for document in documents if document]
    assert all(len(times) == 1 for times in per_document), "a document was read in part"
    counts = [times.pop() for times in per_document]
    assert set(counts) <= {epoch, epoch + 1}
    assert sum(count == epoch + 1 for count in counts) <= touched


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60).filter(any), stage_lists, st.integers(0, 3), shuffled_in)
def test_stages_of_any_shape_neither_repeat_nor_skip_a_token(lengths, stages, seed, sizes):
    lengths = [max(lengths), *lengths]
    datasets, documents = in_memory(lengths)
    with cut_into(sizes):
        times_N, cursors = read_through(datasets, [(*stage, {"a.b": 1}) for stage in stages], seed)
    assert np.ptp(times_N) <= 1, "a second epoch began before the first was read"
    check_nothing_lost(times_N, documents, cursors["a.b"])


mixtures = st.sampled_from(
    [{"*": 1.0}, Mixture(repeats={"*.high": 3.2}), {"a.*": 0.9, "*": 0.1}, {"a.high": 1.0}, {"b.*": 0.3, "a.low": 0.7}]
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=30).filter(any), min_size=3, max_size=3),
    st.lists(st.tuples(st.integers(0, 25), st.integers(2, 40), st.sampled_from(PACKINGS), mixtures), max_size=4),
    st.integers(0, 3),
    shuffled_in,
)
def test_stages_over_several_datasets_lose_nothing(lengths, stages, seed, sizes):
    first, datasets, documents = 0, {}, {}
    for name, of_dataset in zip(("a.high", "a.low", "b.high"), lengths, strict=True):
        bounds = np.cumsum([first, max(of_dataset), *of_dataset])
        documents[name] = [list(range(a, b)) for a, b in itertools.pairwise(bounds)]
        datasets[name] = MemoryDocuments(documents[name])
        first = int(bounds[-1])
    with cut_into(sizes):
        times_N, cursors = read_through(datasets, stages, seed)
    for name, cursor in cursors.items():
        check_nothing_lost(times_N, documents[name], cursor)


def test_stages_go_on_where_the_last_one_stopped_for_every_dataset(data_folder):
    """One epoch over four stages with other mixtures, lengths and packings: no token twice."""
    start, read = {}, []
    for mixture, length, packing, rows in (
        ({"*": 1}, 64, "concatenate", 150),
        ({"code.*": 1, "web.high": 1}, 128, "best_fit", 30),
        ({"*": 1}, 256, "best_fit", 20),
        ({"web.*": 1}, 32, "concatenate", 300),
    ):
        loader = Loader(data_folder, mixture, length, packing, seed=1, start=start)
        batch = loader.rows(0, rows)
        read += batch.tokens_BT[batch.document_ids_BT >= 0].tolist()
        start = loader.cursors(rows)
    assert len(read) == len(set(read)) > 25_000


def test_batch_size_warm_up_reads_the_same_rows(data_folder):
    loader = Loader(data_folder, MIXTURE, 64)
    sizes = [2, 2, 4, 4, 8, 16]
    firsts = np.cumsum([0, *sizes])
    warm = as_bytes(*(loader.rows(int(first), size) for first, size in zip(firsts, sizes, strict=False)))
    assert warm == as_bytes(loader.rows(0, sum(sizes)))


def test_long_documents_are_split_or_dropped_and_counted():
    datasets, documents = in_memory([5, 12, 3, 25, 8])
    split = Loader(datasets, {"a.b": 1}, 10, "best_fit", long="split")
    rows = split._rows.rows_of_epoch()
    pieces = documents_in(split.rows(0, rows))
    assert sorted(token for piece in pieces for token in piece) == list(range(53))
    assert sorted(map(len, pieces)) == [2, 3, 5, 5, 8, 10, 10, 10]
    drop = Loader(datasets, {"a.b": 1}, 10, "best_fit", long="drop")
    rows = drop._rows.rows_of_epoch()
    assert sorted(documents_in(drop.rows(0, rows))) == [documents[0], documents[2], documents[4]]
    assert split.num_long() == drop.num_long() == {"a.b": 2}


def test_dropping_everything_is_refused():
    with pytest.raises(ValueError, match=r"a\.b: no document fits 10 tokens"):
        Loader(in_memory([11, 30])[0], {"a.b": 1}, 10, "best_fit", long="drop")


def test_loss_masks_follow_their_tokens():
    """Token 7 of every document of 10 is learnt: after shuffling and packing, exactly those are."""
    datasets, _ = in_memory([10] * 20, [[place == 7 for place in range(10)]] * 20)
    batch = Loader(datasets, {"a.b": 1}, 33, "best_fit").rows(0, 6)
    assert batch.loss_mask_BT.sum() > 0
    expected = (batch.tokens_BT % 10 == 7) & (batch.document_ids_BT >= 0)
    assert torch.equal(batch.loss_mask_BT, expected)


def test_epochs_are_reported(data_folder):
    loader = Loader(data_folder, MIXTURE, 64)
    tokens = loader.folder.tokens
    rows = round((3.2 * (tokens["web.high"] + tokens["code.high"]) + tokens["web.medium"]) / 64)
    assert loader.epochs(rows) == pytest.approx({"code.high": 3.2, "web.high": 3.2, "web.medium": 1}, rel=1e-2)


def test_held_out_batches_hold_each_held_out_document_once(data_folder):
    batches = held_out_batches(data_folder, 128, 4, max_rows=1_000)
    assert list(batches) == ["web"]
    tokens = [token for batch in batches["web"] for token in batch.tokens_BT[batch.document_ids_BT >= 0].tolist()]
    assert sorted(tokens) == Shard(data_folder / "shards" / "web.heldout").tokens.tolist()
    again = held_out_batches(data_folder, 128, 4, max_rows=8)["web"]
    assert as_bytes(*again) == as_bytes(*batches["web"][:2])


def test_held_out_documents_are_never_trained_on(data_folder):
    batch = Loader(data_folder, {"*": 1}, 64).rows(0, 3_000)
    assert not set(batch.tokens_BT.unique().tolist()) & set(
        Shard(data_folder / "shards" / "web.heldout").tokens.tolist()
    )


def test_uneven_ranks_are_refused(data_folder):
    with pytest.raises(ValueError, match="6 rows cannot be divided among 4 ranks"):
        Loader(data_folder, {"*": 1}, 64).batch(0, 6, 0, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((1,), "sequence_length = 1"),
        ((64, "first_fit"), "packing = 'first_fit'"),
    ],
)
def test_impossible_arguments_are_refused(data_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        Loader(data_folder, {"*": 1}, *arguments)


def test_a_damaged_folder_is_refused(data_folder, tmp_path):
    shutil.copytree(data_folder, tmp_path / "data")
    path = tmp_path / "data" / "shards" / "web.high.bin"
    data = bytearray(path.read_bytes())
    data[1_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"web\.high\.bin is damaged"):
        Loader(tmp_path / "data", {"*": 1}, 64)
    assert DataFolder.open(tmp_path / "data", check=False).tokens["web.high"] > 0


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a data folder"):
        Loader(tmp_path, {"*": 1}, 64)


def test_prefetch_yields_in_order_and_raises_in_place():
    def make(index):
        if index == 3:
            raise ValueError("batch 3")
        return index * index

    results = prefetch(make, 0, 10)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(ValueError, match="batch 3"):
        next(results)


def test_prefetch_works_ahead_so_far_and_no_further():
    made = []
    results = prefetch(made.append, 0, 1_000, depth=3)
    next(results)
    while len(made) < 4:
        time.sleep(0.01)
    time.sleep(0.1)  # if it went further, it would by now
    assert made == [0, 1, 2, 3]
    results.close()
    assert made == [0, 1, 2, 3]
