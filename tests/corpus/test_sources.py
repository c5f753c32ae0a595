import gzip
import io
import os
import tarfile
import tracemalloc

import pytest
import zstandard

from glm45.corpus.document import DropLog, merge_drops
from glm45.corpus.downloads import Archive, fetch_debian, fetch_sdists, file_sha256, sdist_archives
from glm45.corpus.read import read_documents
from glm45.corpus.repositories import Repositories
from glm45.corpus.sources import Source, Unit, list_units, share_out


def read(source, tmp_path):
    with DropLog(tmp_path / "drops") as log:
        units = list_units(source, tmp_path)
        return [document for unit in units for document in read_documents(source, unit, log, Repositories())]


def test_a_folder_is_read_file_by_file_and_what_cannot_be_read_is_counted(tmp_path):
    root = tmp_path / "mine"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.py").write_text("x = 1\n")
    (root / "sub" / "page.html").write_text("<html><body><p>A page of text.</p><pre>code()</pre></body></html>")
    (root / "b.md.gz").write_bytes(gzip.compress(b"# Packed\n"))
    (root / "cut.txt.gz").write_bytes(gzip.compress(b"x" * 9999)[:40])
    (root / "image.png").write_bytes(b"\x89PNG")
    (root / "broken.txt").write_bytes(b"\xff\xfe\xfa")
    (root / "gone.txt").symlink_to(root / "nowhere")
    documents = read(Source(name="own", reader="folder", path=str(root)), tmp_path)
    assert {(d.metadata["path"], d.metadata["kind"]) for d in documents} == {
        ("a.py", "code"),
        ("page.html", "web"),
        ("b.md", "prose"),
    }
    reasons = {reason: entry["documents"] for reason, entry in merge_drops(tmp_path / "drops").items()}
    assert reasons == {"file type without text": 1, "unreadable file": 2, "undecodable bytes": 1}


def test_names_in_another_encoding_can_be_written(tmp_path):
    folder = os.fsencode(tmp_path) + b"/mine/caf\xe9"
    os.makedirs(folder)
    with open(folder + b"/na\xefve.txt", "w") as stream:
        stream.write("A text.")
    [document] = read(Source(name="own", reader="folder", path=str(tmp_path / "mine")), tmp_path)
    assert document.id == r"own/caf\udce9/na\udcefve.txt"
    assert document.id.encode()


def test_a_jsonl_source_counts_bad_lines_and_keeps_trajectories_as_conversations(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [
        b'{"body": "A text.", "language": "en"}',
        b'{"messages": [{"role": "user", "content": "hi"}], "tools": null}',
        b"not json",
        b'{"other": 1}',
        b'{"body": "caf\xe9"}',
        b'{"body": "x", "kind": "video"}',
        b"[1]",
        rb'{"body": "half a pair: \ud83d"}',
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    documents = read(Source(name="own", reader="jsonl", path=str(path), text_key="body"), tmp_path)
    assert [document.metadata["kind"] for document in documents] == ["prose", "chat"]
    assert documents[1].metadata["messages"] == [{"role": "user", "content": "hi"}]
    assert {reason: entry["documents"] for reason, entry in merge_drops(tmp_path / "drops").items()} == {
        "line is not JSON": 1,
        "record without text": 1,
        "record with broken encoding": 2,
        "record of unknown kind": 1,
        "line is not a JSON object": 1,
    }


def test_parquet_is_read_and_its_empty_cells_are_absent_fields(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    chat = [{"role": "user", "content": "hi"}]
    columns = {"text": ["one", None, "three", None], "messages": [None, None, None, chat], "kind": [None] * 4}
    pq.write_table(pa.table(columns | {"prompt": [None] * 4}), tmp_path / "t.parquet")
    documents = read(Source(name="own", reader="parquet", path=str(tmp_path / "t.parquet")), tmp_path)
    assert [document.metadata["kind"] for document in documents] == ["prose", "prose", "chat"]
    assert [document.text for document in documents[:2]] == ["one", "three"]
    assert [document.metadata.get("messages") for document in documents] == [None, None, chat]
    assert "prompt" not in documents[0].metadata


def test_files_of_one_name_in_different_folders_give_different_documents(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / "own" / folder).mkdir(parents=True)
        (tmp_path / "own" / folder / "x.jsonl").write_text('{"text": "A text."}\n')
    documents = read(Source(name="own", reader="jsonl", path=str(tmp_path / "own")), tmp_path)
    assert [document.id for document in documents] == ["own/a/x.jsonl/0", "own/b/x.jsonl/0"]


@pytest.mark.parametrize("packed", [False, True])
def test_no_more_is_read_of_a_large_file_than_shows_that_it_is_large(tmp_path, packed):
    text = b"x" * 100_000_000
    (tmp_path / "own").mkdir()
    path = tmp_path / "own" / ("large.txt.gz" if packed else "large.txt")
    path.write_bytes(gzip.compress(text, 1) if packed else text)
    del text
    tracemalloc.start()
    assert read(Source(name="own", reader="folder", path=str(tmp_path / "own"), max_file_bytes=1000), tmp_path) == []
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert merge_drops(tmp_path / "drops").keys() == {"file too large"}


def test_damaged_files_of_records_are_counted_and_what_comes_before_the_damage_is_kept(tmp_path):
    whole = gzip.compress(b"".join(b'{"text": "%0100d"}\n' % (n * n * 7919) for n in range(60_000)))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "' + b"x" * 100_000 + b'"}')[:-9])
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and then nothing")
    documents = read(Source(name="own", reader="jsonl", path=str(tmp_path)), tmp_path)
    assert 10_000 < len(documents) < 60_000
    read(Source(name="own", reader="parquet", path=str(tmp_path)), tmp_path)
    reasons = {reason: entry["documents"] for reason, entry in merge_drops(tmp_path / "drops").items()}
    assert reasons.keys() == {"damaged parquet file"}
    read(Source(name="own", reader="jsonl", path=str(tmp_path)), tmp_path)
    reasons = {reason: entry["documents"] for reason, entry in merge_drops(tmp_path / "drops").items()}
    assert reasons["damaged jsonl file"] == 2


@pytest.mark.parametrize("save", ["to_disk", "parquet"])
def test_a_folder_of_hugging_face_datasets_is_read(tmp_path, save):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": ["one", "two"], "kind": ["prose", "code"]})
    folder = tmp_path / "made"
    if save == "to_disk":
        made.save_to_disk(str(folder))
    else:
        folder.mkdir()
        made.to_parquet(str(folder / "train.parquet"))
    documents = read(Source(name="own", reader="huggingface", path=str(folder), limit=5), tmp_path)
    assert [(document.text, document.metadata["kind"]) for document in documents] == [("one", "prose"), ("two", "code")]


def test_a_source_that_gives_nothing_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="own: nothing to read"):
        list_units(Source(name="own", reader="folder", path=str(tmp_path / "empty")), tmp_path)
    with pytest.raises(ValueError, match="not a folder"):
        list_units(Source(name="own", reader="folder", path=str(tmp_path / "missing")), tmp_path)


def test_the_standard_library_and_installed_packages_have_units_with_versions(tmp_path):
    assert len(list_units(Source(name="s", reader="stdlib"), tmp_path)) > 20
    [unit] = list_units(Source(name="i", reader="installed", packages=("numpy", "no-such-package")), tmp_path)
    assert unit.package == "numpy"
    assert unit.version[0].isdigit()


def test_work_is_shared_out_evenly_and_completely():
    units = [Unit("s", str(i), "", "", size, ("x",)) for i, size in enumerate([90, 50, 40, 30, 30, 20, 10, 5, 5])]
    tasks = share_out(units, 3)
    assert sorted(unit.package for task in tasks for unit in task) == sorted(unit.package for unit in units)
    loads = [sum(unit.size for unit in task) for task in tasks]
    assert max(loads) - min(loads) <= 10


def test_the_manifest_pins_every_archive_and_refuses_unknown_packages(tmp_path):
    archives = [archive for releases in sdist_archives("", (), tmp_path).values() for archive in releases]
    assert len(archives) > 12
    assert all(len(archive.sha256) == 64 and archive.license for archive in archives)
    with pytest.raises(ValueError, match="no-such"):
        sdist_archives("", ("no-such",), tmp_path)


def test_debian_sources_without_apt_say_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="apt-get"):
        fetch_debian(("python3-doc",), tmp_path)


@pytest.mark.parametrize("fields", [{"name": "a.b"}, {"name": ""}, {"reader": "folder"}, {"reader": "installed"}])
def test_a_source_that_makes_no_sense_is_refused(fields):
    with pytest.raises(ValueError, match="source"):
        Source(**({"name": "a", "reader": "stdlib"} | fields))


@pytest.mark.slow
def test_a_download_runs_nothing_of_the_archive_and_holds_it_to_its_hash(monkeypatch, tmp_path):
    """pip itself, without network: the archive's own backend would leave a mark, and is not to be had anyway."""
    path = tmp_path / "index" / "some_thing-1.0.tar.gz"
    path.parent.mkdir()
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: some-thing\nVersion: 1.0\n",
        "pyproject.toml": "[build-system]\nrequires = ['nowhere']\nbuild-backend = 'mark'\nbackend-path = ['.']\n",
        "mark.py": f"open({str(tmp_path / 'ran')!r}, 'w')\n",
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"some_thing-1.0/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    right = Archive("some-thing", "1.0", file_sha256(path), "MIT", tmp_path / "sdists" / path.name)
    fetch_sdists([right], tmp_path)
    assert right.path.read_bytes() == path.read_bytes()
    assert not (tmp_path / "ran").exists()
    wrong = Archive("some-thing", "1.0", "0" * 64, "MIT", tmp_path / "sdists" / "other.tar.gz")
    with pytest.raises(OSError, match=r"some-thing 1\.0: ERROR.*[Hh][Aa][Ss][Hh]"):
        fetch_sdists([wrong], tmp_path)
    assert [entry.name for entry in (tmp_path / "sdists").iterdir()] == [path.name]
