"""Document files to a data folder's `tokenizer/` and `shards/`; what a line may hold is said in `encoding`."""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from glm45.corpus.encoding import Encoders
from glm45.corpus.extract import COMPRESSIONS, open_lines
from glm45.data.folder import describe_tokenizer, update_manifest
from glm45.data.mixture import HELD_OUT
from glm45.data.shards import ShardWriter, require_disk, token_dtype, verify
from glm45.files import write_atomically
from glm45.text.chat import render
from glm45.text.tokenizer import Tokenizer

TOKENIZER_SAMPLE = 20_000_000
"""Bytes of text that a tokenizer is trained on. Not in the report."""
CHUNK = 1 << 20  # bytes of lines that a worker encodes at once
NUM_EXAMPLES = 5  # rejected documents named in the manifest for each reason
DATASET_NAME = re.compile(r"(?P<dataset>.+?\.[A-Za-z]\w*)(?:[-.]\d+)*")


def tokenize_folder(
    documents_dir: Path, out_dir: Path, *, vocab_size: int, workers: int, tokenizer: Path | None = None
) -> dict[str, Any]:
    """Do what `tokenize_datasets` does, and put its entries into `manifest.json` last."""
    entries = tokenize_datasets(documents_dir, out_dir, vocab_size=vocab_size, workers=workers, tokenizer=tokenizer)
    update_manifest(out_dir, entries)
    return entries


def tokenize_datasets(
    documents_dir: Path, out_dir: Path, *, vocab_size: int, workers: int, tokenizer: Path | None = None
) -> dict[str, Any]:
    """Tokenize the datasets of a folder of documents (see `find_datasets`) and return the manifest's entries.

    Document files are `.jsonl`, `.jsonl.zst` or `.jsonl.gz`.

    Trains a tokenizer of `vocab_size` on what is not held out, unless the folder of one is given. Writes `tokenizer/`
    and `shards/<dataset>.bin|.idx`, and removes shards of datasets that are no more. The result does not depend on
    `workers`. A dataset that an earlier run finished from the same files with the same tokenizer is kept; what a killed
    run left of another is overwritten. Lines that cannot be read are counted, with examples, under `rejected`.

    Raises ValueError for a folder without document files, a file that is cut short, or a dataset without documents;
    OSError where the disk has no room.
    """
    if workers < 1:
        raise ValueError(f"workers = {workers}: at least 1 is needed")
    datasets = find_datasets(documents_dir)
    digests = {
        name: {str(path.relative_to(documents_dir)): _digest(path) for path in paths}
        for name, paths in datasets.items()
    }
    size = sum(_text_size(path) for paths in datasets.values() for path in paths)
    require_disk(out_dir, size)  # two or four bytes a token of three or four characters
    progress = _Progress(out_dir / "shards" / "progress.json")
    folder = out_dir / "tokenizer"
    _prepare_tokenizer(datasets, digests, folder, tokenizer, vocab_size, progress)
    loaded = Tokenizer.load(folder)
    entries = {}
    with ExitStack() as stack:
        encoders: Encoders | None = None
        for name, paths in datasets.items():
            made_from = {"tokenizer": loaded.fingerprint, "files": digests[name]}
            entry = progress.get(name, made_from)
            if entry is None or not _is_intact(out_dir / "shards", entry):
                encoders = encoders or stack.enter_context(Encoders(folder, loaded.fingerprint, workers))
                entry = _tokenize_dataset(paths, out_dir / "shards" / name, encoders, token_dtype(loaded.vocab_size))
                progress.put(name, made_from, entry)
            entries[name] = entry
    progress.forget_all_but(entries)
    return {"tokenizer": describe_tokenizer(loaded), "datasets": entries}


def find_datasets(documents_dir: Path) -> dict[str, list[Path]]:
    """Return the document files of every dataset, both sorted by name.

    A dataset is a folder `<source>.<bucket>/` of files, or the files `<source>.<bucket>`, numbered after `-` or `.`.
    Raises ValueError if there are none, or for a file or folder of documents whose name says no source and bucket.
    """
    datasets: dict[str, list[Path]] = {}
    for path in sorted(documents_dir.iterdir()) if documents_dir.is_dir() else ():
        files = sorted(path.glob("*.jsonl*")) if path.is_dir() else [path] if ".jsonl" in path.suffixes else []
        name = DATASET_NAME.fullmatch(path.name if path.is_dir() else path.name.partition(".jsonl")[0])
        if files and name:
            datasets.setdefault(name["dataset"], []).extend(files)
        elif files:
            raise ValueError(f"{path}: the name must be <source>.<bucket>, such as web.high.jsonl.zst")
    if not datasets:
        raise ValueError(f"{documents_dir} holds no <source>.<bucket> documents: build them first")
    return dict(sorted(datasets.items()))


def _tokenize_dataset(paths: Sequence[Path], prefix: Path, encoders: Encoders, dtype: np.dtype) -> dict[str, Any]:
    """Write one dataset's shard and return its manifest entry."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    text_bytes = 0
    with ShardWriter(prefix, dtype) as writer:
        for path in paths:
            first_line = 1
            for chunk in encoders.encode(_chunks(path)):
                writer.add_many(np.frombuffer(chunk.tokens, dtype), np.array(chunk.lengths, dtype=np.int32))
                text_bytes += chunk.text_bytes
                for rejected in chunk.rejected:
                    counts[rejected.reason] += 1
                    if len(shown := examples.setdefault(rejected.reason, [])) < NUM_EXAMPLES:
                        shown.append(f"{path.name}, line {first_line + rejected.line}: {rejected.detail}")
                first_line += chunk.num_lines
        if not writer.num_documents:
            raise ValueError(f"{prefix.name}: no documents in {', '.join(path.name for path in paths)}: {dict(counts)}")
    dropped = {reason: {"documents": count, "examples": examples[reason]} for reason, count in counts.most_common()}
    return writer.entry | {"text_bytes": text_bytes, "rejected": dropped}


def _chunks(path: Path) -> Iterator[list[bytes]]:
    """Yield the lines of a document file, about a megabyte at a time."""
    lines, size = [], 0
    with open_lines(path) as file:
        try:
            for line in file:
                lines.append(line)
                size += len(line)
                if size >= CHUNK:
                    yield lines
                    lines, size = [], 0
        except (EOFError, OSError, ValueError) as error:
            raise ValueError(f"{path} is cut short or damaged ({error}): build the documents again") from None
    if lines:
        yield lines


def _prepare_tokenizer(
    datasets: dict[str, list[Path]],
    digests: dict[str, dict[str, str]],
    folder: Path,
    given: Path | None,
    vocab_size: int,
    progress: "_Progress",
) -> None:
    """Copy the given tokenizer to `folder` or train one, unless an earlier run did so from the same files."""
    if given is not None:
        Tokenizer.load(given).save(folder)
        return
    learnt_from = {name: files for name, files in digests.items() if not _is_held_out(name)}
    made_from = {"vocab_size": vocab_size, "sample": TOKENIZER_SAMPLE, "datasets": learnt_from}
    if progress.get("tokenizer", made_from) is not None and (folder / "tokenizer.json").exists():
        return
    trained = Tokenizer.train(_sample(datasets), vocab_size)
    staging = folder.parent / "tokenizer.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    trained.save(staging)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)
    progress.put("tokenizer", made_from, {})


def _sample(datasets: dict[str, list[Path]]) -> Iterator[str]:
    """Yield about `TOKENIZER_SAMPLE` bytes of the texts to train on, chosen by hash from all files alike."""
    paths = [path for name, paths in datasets.items() if not _is_held_out(name) for path in paths]
    share = min(1.0, TOKENIZER_SAMPLE / max(1, sum(_text_size(path) for path in paths)))
    left = 2 * TOKENIZER_SAMPLE  # the sizes of compressed files are estimates
    for path in paths:
        for lines in _chunks(path):
            for line in lines:
                digest = hashlib.blake2b(line, digest_size=8).digest()
                if int.from_bytes(digest, "big") < share * 2**64 and left > 0:
                    texts = list(_texts(line))
                    left -= sum(map(len, texts))
                    yield from texts


def _is_held_out(dataset: str) -> bool:
    return dataset.endswith(f".{HELD_OUT}")


def _texts(line: bytes) -> Iterator[str]:
    """Yield what a tokenizer learns from in a line, nothing where `encode_lines` will reject it.

    A chat is rendered, since the template's words and the tools' schemas are text that its prompts repeat.
    """
    try:
        document = json.loads(line)
        messages = document.get("messages")
        text = render(messages, tools=document.get("tools") or None) if messages else document["text"]
        text.encode()
        yield text
    except (ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError):
        return


def _text_size(path: Path) -> int:
    """Estimate a file's size when unpacked: text shrinks to about a quarter."""
    return path.stat().st_size * (4 if path.suffix in COMPRESSIONS else 1)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_intact(shards: Path, entry: dict[str, Any]) -> bool:
    try:
        verify(shards, entry)
    except ValueError:
        return False
    return True


class _Progress:
    """What is finished and from what it was made, on disk after every step, so that a killed run can go on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._finished: dict[str, Any] = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            self._finished = {}

    def get(self, name: str, made_from: dict[str, Any]) -> dict[str, Any] | None:
        """Return the entry of what was finished from exactly this, or None."""
        finished = self._finished.get(name)
        return finished["entry"] if finished and finished["from"] == made_from else None

    def put(self, name: str, made_from: dict[str, Any], entry: dict[str, Any]) -> None:
        """Record what is finished, surviving a kill at any moment."""
        self._finished[name] = {"from": made_from, "entry": entry}
        self._save()

    def forget_all_but(self, datasets: dict[str, Any]) -> None:
        """Remove the shards of datasets that an earlier recipe had."""
        stale = {name: kept for name, kept in self._finished.items() if name not in datasets and name != "tokenizer"}
        for name, kept in stale.items():
            del self._finished[name]
            for file in kept["entry"]["files"]:
                (self._path.parent / file).unlink(missing_ok=True)
        self._save()

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, json.dumps(self._finished))
