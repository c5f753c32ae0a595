"""Shards: the bytes are Megatron's, and damage of any kind is refused."""

import resource
import struct

import numpy as np
import pytest
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45.data import shards
from glm45.data.shards import MemoryDocuments, Shard, ShardChain, ShardWriter, require_disk, token_dtype, verify

DOCUMENTS = [[5, 6, 7], [8], [], [9, 10, 65_000]]


def write(prefix, documents, dtype=np.uint16):
    with ShardWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(document)
    return writer.entry


def test_bytes_are_those_that_the_format_prescribes(tmp_path):
    """Byte for byte as laid out by hand from the format's definition."""
    write(tmp_path / "web.high", [[1, 2, 3], [4]], np.int32)
    assert (tmp_path / "web.high.bin").read_bytes() == struct.pack("<4i", 1, 2, 3, 4)
    assert (tmp_path / "web.high.idx").read_bytes() == (
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 2, 3) + struct.pack("<2i2q3q", 3, 1, 0, 12, 0, 1, 2)
    )


@pytest.mark.parametrize("chunk", [1 << 20, 1])
@pytest.mark.parametrize("token_size, dtype", [(2, np.uint16), (4, np.int32)])
def test_bytes_equal_those_of_datatrove(tmp_path, monkeypatch, token_size, dtype, chunk):
    """An independent writer of Megatron shards gives the same two files, however few entries we handle at once."""
    monkeypatch.setattr(shards, "CHUNK", chunk)
    theirs = MegatronTokenizedFile(str(tmp_path), "theirs", token_size=token_size)
    for document in DOCUMENTS:
        theirs.write(document)
    theirs.bin_file.flush()
    theirs.close()
    write(tmp_path / "ours", DOCUMENTS, dtype)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_our_shards_and_we_read_theirs(tmp_path, dtype):
    """Runs where megatron-core is installed."""
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document, dtype=torch.int32), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write(tmp_path / "ours", DOCUMENTS, dtype)
    read_by_them, read_by_us = theirs.IndexedDataset(str(tmp_path / "ours")), Shard(tmp_path / "theirs")
    assert [read_by_them[i].tolist() for i in range(len(read_by_them))] == DOCUMENTS
    assert [read_by_us[i].tolist() for i in range(len(read_by_us))] == DOCUMENTS
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65_535), max_size=20), max_size=20))
def test_documents_come_back(tmp_path_factory, documents):
    prefix = tmp_path_factory.mktemp("shard") / "web.high"
    entry = write(prefix, documents)
    shard = Shard(prefix)
    assert [document.tolist() for document in (shard[i] for i in range(len(shard)))] == documents
    assert entry["documents"] == shard.num_documents == len(documents)
    assert entry["tokens"] == shard.num_tokens == sum(map(len, documents))
    verify(prefix.parent, entry)


def test_a_document_of_several_sequences_is_one_document(tmp_path):
    """Megatron can split documents into sentences: bounds 0, 2, 3 over three sequences are two documents."""
    (tmp_path / "s.bin").write_bytes(struct.pack("<5H", 1, 2, 3, 4, 5))
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 3)
    (tmp_path / "s.idx").write_bytes(header + struct.pack("<3i3q3q", 1, 2, 2, 0, 2, 6, 0, 2, 3) + b"\1\1\1")
    shard = Shard(tmp_path / "s")
    assert [shard[i].tolist() for i in range(len(shard))] == [[1, 2, 3], [4, 5]]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=5), min_size=1, max_size=5), st.data())
def test_a_chain_of_shards_reads_as_one(tmp_path_factory, parts, data):
    folder = tmp_path_factory.mktemp("chain")
    for number, documents in enumerate(parts):
        write(folder / f"part-{number}", documents)
    everything = [document for documents in parts for document in documents]
    write(folder / "whole", everything)
    chain = ShardChain([Shard(folder / f"part-{number}") for number in range(len(parts))])
    whole = Shard(folder / "whole")
    assert (chain.num_documents, chain.num_tokens) == (whole.num_documents, whole.num_tokens)
    first = data.draw(st.integers(0, len(everything)))
    last = data.draw(st.integers(first, len(everything)))
    assert chain.starts(first, last).tolist() == whole.starts(first, last).tolist()
    places = np.array(data.draw(st.permutations(range(whole.num_tokens))), dtype=np.int64)
    assert chain.tokens[places].tolist() == whole.tokens[places].tolist()


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(OverflowError, match="70000"):
        write(tmp_path / "x", [[1], [70_000]])
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    """Wherever the limit strikes: in the tokens, the lengths or the index."""
    for limit in (1_000, 6_000, 9_000, 20_500):
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        try:
            with pytest.raises(OSError, match="large"):
                write(tmp_path / "x", [[1, 2, 3, 4]] * 2_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert list(tmp_path.iterdir()) == []


def test_an_unfinished_write_is_not_taken_for_a_shard(tmp_path):
    """What a killed writer leaves carries other names."""
    writer = ShardWriter(tmp_path / "x", np.uint16)
    writer.add([1, 2])
    assert all(path.name.endswith(".tmp") for path in tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Shard(tmp_path / "x")
    writer.discard()


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_every_cut_is_refused_on_opening(tmp_path, suffix):
    write(tmp_path / "x", [[1, 2, 3], [4, 5]])
    path = tmp_path / f"x.{suffix}"
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=rf"x\.{suffix}"):
            Shard(tmp_path / "x")


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_file_that_is_too_long_is_refused_on_opening(tmp_path, suffix):
    write(tmp_path / "x", [[1, 2, 3], [4, 5]])
    with (tmp_path / f"x.{suffix}").open("ab") as file:
        file.write(b"\0" * 3)
    with pytest.raises(ValueError, match=rf"x\.{suffix}"):
        Shard(tmp_path / "x")


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_every_flipped_byte_is_found(tmp_path, suffix):
    entry = write(tmp_path / "x", [[1, 2, 3], [4, 5]])
    path = tmp_path / f"x.{suffix}"
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            verify(tmp_path, entry)


def test_missing_shard_is_named(tmp_path):
    entry = write(tmp_path / "x", [[1]])
    (tmp_path / "x.bin").unlink()
    with pytest.raises(ValueError, match=r"x\.bin is in the manifest and not on disk"):
        verify(tmp_path, entry)


def test_token_type_follows_megatron():
    assert [token_dtype(size).name for size in (4_096, 65_499, 65_500, 151_552)] == [
        "uint16",
        "uint16",
        "int32",
        "int32",
    ]


def test_loss_mask_shard_must_match(tmp_path):
    write(tmp_path / "x", [[1, 2], [3]])
    write(tmp_path / "x.loss_mask", [[0, 1], [1]], np.uint8)
    assert Shard(tmp_path / "x").mask.tolist() == [0, 1, 1]
    write(tmp_path / "x.loss_mask", [[0, 1]], np.uint8)
    with pytest.raises(ValueError, match="masks 2 tokens of 3"):
        Shard(tmp_path / "x")


def test_documents_in_memory_refuse_a_mask_of_another_length():
    with pytest.raises(ValueError, match="document 1 has 1 tokens and a loss mask of 2"):
        MemoryDocuments([[1, 2], [3]], [[True, False], [True, True]])


def test_a_full_disk_is_told_before_writing(tmp_path):
    with pytest.raises(OSError, match="MB free"):
        require_disk(tmp_path, 1 << 60)
