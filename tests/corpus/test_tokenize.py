"""Document files to shards: exact, the same for any number of workers, and safe to kill."""

import gzip
import json
import multiprocessing
import os
import signal
import time

import pytest
import zstandard

from glm45.corpus import tokenize
from glm45.corpus.tokenize import find_datasets, tokenize_folder
from glm45.data.loader import Loader
from glm45.data.shards import Shard
from glm45.text.chat import render_tokens
from glm45.text.tokenizer import Tokenizer

TEXTS = [f"def function_{n}(value):\n    return value + {n}  # 第{n}個\n" * (1 + n % 7) for n in range(300)]
MESSAGES = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]


def lines(texts):
    return "".join(json.dumps({"text": text, "id": str(n), "metadata": {}}) + "\n" for n, text in enumerate(texts))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(TEXTS, 310).save(path)
    return path


@pytest.fixture
def documents(tmp_path):
    """Three datasets in plain, gzip and multi-frame zstd files."""
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "code.heldout.jsonl").write_text(lines(TEXTS[:20]))
    (folder / "code.high-00000.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[20:100]).encode()))
    (folder / "code.high-00001.jsonl").write_text(lines(TEXTS[100:200]))
    frames = [zstandard.compress(lines(part).encode()) for part in (TEXTS[200:250], TEXTS[250:])]
    (folder / "my-web.medium.00000.jsonl.zst").write_bytes(b"".join(frames))
    return folder


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_document_becomes_its_tokens_and_the_end_of_text(documents, tmp_path):
    entries = tokenize_folder(documents, tmp_path / "out", vocab_size=320, workers=1)
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer")
    end = tokenizer.special_id("<|endoftext|>")
    read = []
    for name in ("code.heldout", "code.high", "my-web.medium"):
        shard = Shard(tmp_path / "out" / "shards" / name)
        read += [shard[i].tolist() for i in range(len(shard))]
    assert read == [[*tokenizer.encode(text), end] for text in TEXTS]
    assert sum(entry["text_bytes"] for entry in entries["datasets"].values()) == sum(len(t.encode()) for t in TEXTS)
    assert entries["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    assert Loader(tmp_path / "out", {"*": 1}, 64).batch(0, 4).tokens_BT.shape == (4, 64)


@pytest.mark.slow
def test_the_number_of_workers_changes_no_byte(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "CHUNK", 2_000)
    for workers in (1, 3):
        tokenize_folder(documents, tmp_path / str(workers), vocab_size=320, workers=workers)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


def test_lines_that_cannot_be_read_are_counted(documents, tmp_path, trained, monkeypatch):
    monkeypatch.setattr(tokenize, "CHUNK", 60)
    bad = {
        "not JSON": ["not json", "", '{"text": "cut sho', "[" * 100_000],
        "not Unicode": ['{"text": "\\ud800"}', '{"text": "\udcff"}'],
        "neither text nor messages": ["[]", "5", '{"id": 1}'],
        "empty text": ['{"text": ""}', '{"text": 5}', '{"text": null}'],
        "not a chat": ['{"messages": 5}', '{"messages": [7]}', '{"messages": [{"role": "wizard", "content": "x"}]}'],
        "unknown special token": ['{"text": "x", "metadata": {"special_tokens": ["<x>"]}}'],
    }
    rows = ['{"text": "good", "metadata": 5}', *(line for rows in bad.values() for line in rows)]
    (documents / "bad.high.jsonl").write_bytes("\n".join(rows).encode("utf-8", "surrogateescape"))
    entries = tokenize_folder(documents, tmp_path / "out", vocab_size=320, workers=1, tokenizer=trained)
    entry = entries["datasets"]["bad.high"]
    assert entry["documents"] == 1
    assert {reason: value["documents"] for reason, value in entry["rejected"].items()} == {
        reason: len(lines) for reason, lines in bad.items()
    }
    assert entry["rejected"]["not JSON"]["examples"][0].startswith("bad.high.jsonl, line 2: Expecting value")
    assert entry["rejected"]["unknown special token"]["examples"][0].startswith(f"bad.high.jsonl, line {len(rows)}: ")


def test_special_tokens_are_placed_only_where_the_document_says_so(documents, tmp_path, trained):
    text = "<|code_prefix|>def f():<|code_suffix|>\n<|code_middle|> pass <|user|>"
    fim = ["<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"]
    rows = [{"text": text, "metadata": {"special_tokens": fim}}, {"text": text, "metadata": {}}]
    (documents / "fim.high.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenize_folder(documents, tmp_path / "out", vocab_size=320, workers=1, tokenizer=trained)
    tokenizer, shard = Tokenizer.load(tmp_path / "out" / "tokenizer"), Shard(tmp_path / "out" / "shards" / "fim.high")
    specials = [[token for token in shard[i].tolist() if token in tokenizer.special_tokens] for i in range(2)]
    end = tokenizer.special_id("<|endoftext|>")
    assert specials == [[*map(tokenizer.special_id, fim), end], [end]]
    assert [tokenizer.decode(shard[i].tolist()[:-1]) for i in range(2)] == [text, text]


def test_chats_are_rendered(documents, tmp_path, trained):
    (documents / "chat.high.jsonl").write_text(json.dumps({"messages": MESSAGES}))
    tokenize_folder(documents, tmp_path / "out", vocab_size=320, workers=1, tokenizer=trained)
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer")
    expected = [*render_tokens(MESSAGES, tokenizer).ids, tokenizer.special_id("<|endoftext|>")]
    assert Shard(tmp_path / "out" / "shards" / "chat.high")[0].tolist() == expected


def test_held_out_text_does_not_train_the_tokenizer(documents, tmp_path):
    (documents / "secret.heldout.jsonl").write_text(lines(["xyzzyxyzzy " * 50] * 20))
    tokenize_folder(documents, tmp_path / "out", vocab_size=320, workers=1)
    assert len(Tokenizer.load(tmp_path / "out" / "tokenizer").encode("xyzzyxyzzy")) == 10


def test_a_given_tokenizer_is_used(documents, tmp_path, trained):
    entries = tokenize_folder(documents, tmp_path / "out", vocab_size=999, workers=1, tokenizer=trained)
    assert entries["tokenizer"]["fingerprint"] == Tokenizer.load(trained).fingerprint


def test_a_second_run_keeps_what_is_finished_and_repairs_what_is_not(documents, tmp_path):
    out = tmp_path / "out"
    tokenize_folder(documents, out, vocab_size=320, workers=1)
    first, kept = files_of(out), (out / "shards" / "code.high.bin").stat().st_ino
    damaged = out / "shards" / "my-web.medium.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2])
    tokenize_folder(documents, out, vocab_size=320, workers=1)
    assert files_of(out) == first
    assert (out / "shards" / "code.high.bin").stat().st_ino == kept


def test_changed_documents_are_tokenized_again(documents, tmp_path, trained):
    entries = [
        tokenize_folder(documents, tmp_path / "out", vocab_size=320, workers=1, tokenizer=trained) for _ in range(1)
    ]
    (documents / "code.high-00001.jsonl").write_text(lines(TEXTS[100:150]))
    entries.append(tokenize_folder(documents, tmp_path / "out", vocab_size=320, workers=1, tokenizer=trained))
    assert [entry["datasets"]["code.high"]["documents"] for entry in entries] == [180, 130]


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_is_trusted_and_is_continued(documents, tmp_path):
    """Killed at many moments; in the end the folder equals one that was made at once."""
    (documents / "more.high.jsonl").write_text(lines(TEXTS * 30))
    whole = tmp_path / "whole"
    tokenize_folder(documents, whole, vocab_size=320, workers=1)
    context, out = multiprocessing.get_context("spawn"), tmp_path / "out"
    for milliseconds in (100, 400, 700, 800, 900, 1_000, 1_100, 1_300):
        process = context.Process(
            target=tokenize_folder, args=(documents, out), kwargs={"vocab_size": 600, "workers": 1}
        )
        process.start()
        time.sleep(milliseconds / 1_000)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if (out / "manifest.json").exists():
            Loader(out, {"*": 1}, 64)
    tokenize_folder(documents, out, vocab_size=320, workers=1)
    assert files_of(out) == files_of(whole)


@pytest.mark.parametrize("name", ["code.high-00000.jsonl.gz", "my-web.medium.00000.jsonl.zst"])
def test_a_document_file_that_is_cut_short_is_refused(documents, tmp_path, name, trained):
    data = (documents / name).read_bytes()
    (documents / name).write_bytes(data[: len(data) - 10])
    with pytest.raises(ValueError, match=f"{name} is cut short or damaged"):
        tokenize_folder(documents, tmp_path / "out", vocab_size=320, workers=1, tokenizer=trained)


def test_a_source_that_gives_nothing_is_refused(documents, tmp_path, trained):
    (documents / "void.high.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"void\.high: no documents in void\.high\.jsonl: \{'empty text': 1\}"):
        tokenize_folder(documents, tmp_path / "out", vocab_size=320, workers=1, tokenizer=trained)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_folder_of_files_is_a_dataset(tmp_path, trained):
    """The layout that the corpus pipeline writes."""
    (tmp_path / "documents" / "code.high").mkdir(parents=True)
    for number in range(3):
        data = lines(TEXTS[number * 100 : number * 100 + 100]).encode()
        (tmp_path / "documents" / "code.high" / f"{number:05d}.jsonl.zst").write_bytes(zstandard.compress(data))
    tokenize_folder(tmp_path / "documents", tmp_path / "out", vocab_size=320, workers=1, tokenizer=trained)
    tokenizer, shard = Tokenizer.load(tmp_path / "out" / "tokenizer"), Shard(tmp_path / "out" / "shards" / "code.high")
    assert [tokenizer.decode(shard[i].tolist()[:-1]) for i in range(len(shard))] == TEXTS


def test_names_of_document_files(tmp_path):
    for name in ("a.high.jsonl", "a.high.00001.jsonl.zst", "a.high_2-3.jsonl.gz", "b-c.d.low.jsonl", "notes.txt"):
        (tmp_path / name).touch()
    found = {name: len(paths) for name, paths in find_datasets(tmp_path).items()}
    assert found == {"a.high": 2, "a.high_2": 1, "b-c.d.low": 1}
    (tmp_path / "nobucket.jsonl").touch()
    with pytest.raises(ValueError, match=r"must be <source>\.<bucket>"):
        find_datasets(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no"):
        find_datasets(tmp_path)
