"""The first step of the pipeline: every task reads its units and turns files into documents."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from glm45.corpus.document import DropLog, merge_drops, merge_tallies
from glm45.corpus.extract import Skip, extract, open_lines, split_long
from glm45.corpus.repositories import Repositories, release_documents
from glm45.corpus.sources import Source, Unit, list_units, read_unit, share_out
from glm45.data.splits import is_held_out

CODE_BLOCK = re.compile(
    r"^```|^\s*>>> |^\s*\.\. (?:code|code-block|sourcecode|literalinclude)::|::\n\n[ \t]+\S", re.MULTILINE
)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Plan(PipelineStep):
    """Writes which task reads which units; runs once everything is fetched."""

    type = "🗺 - PLAN"
    name = "share out units"

    def __init__(self, sources: tuple[Source, ...], downloads: Path, num_tasks: int, path: Path) -> None:
        super().__init__()
        self.sources, self.downloads, self.num_tasks, self.path = sources, downloads, num_tasks, path

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Write the plan as JSON, one list of units a task."""
        units = [unit for source in self.sources for unit in list_units(source, self.downloads)]
        tasks = [[asdict(unit) for unit in task] for task in share_out(units, self.num_tasks)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(tasks))


def load_plan(path: Path) -> list[list[Unit]]:
    """Return the units of every task."""
    tasks = json.loads(path.read_text())
    return [[Unit(**(unit | {"paths": tuple(unit["paths"])})) for unit in task] for task in tasks]


class ReadUnits(PipelineStep):
    """Reads the units of a task; files that give no document go to the drop log."""

    type = "📖 - READER"
    name = "sources"

    def __init__(
        self,
        sources: tuple[Source, ...],
        plan: Path,
        drops: Path,
        repositories: Repositories,
        held_out_fraction: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.sources = {source.name: source for source in sources}
        self.plan, self.drops, self.repositories = plan, drops, repositories
        self.held_out_fraction, self.seed = held_out_fraction, seed

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents of this task's units."""
        with DropLog(self.drops) as log:
            log.rank = rank
            for unit in load_plan(self.plan)[rank]:
                source = self.sources[unit.source]
                yield from read_documents(source, unit, log, self.repositories, self.held_out_fraction, self.seed)


class RequireDocuments(PipelineStep):
    """Refuses to go on if a source gave no document; one task, once everything is read."""

    type = "🗺 - PLAN"
    name = "require documents"

    def __init__(self, sources: tuple[Source, ...], read: Path, skipped: Path) -> None:
        super().__init__()
        self.sources, self.read, self.skipped = sources, read, skipped

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Raise ValueError that names the source and says why its files were skipped."""
        giving = {row["source"] for row in merge_tallies(self.read)}
        for source in self.sources:
            if source.name not in giving:
                reasons = {
                    reason: entry["sources"].get(source.name) for reason, entry in merge_drops(self.skipped).items()
                }
                counted = ", ".join(f"{count} x {reason}" for reason, count in reasons.items() if count)
                raise ValueError(
                    f"source {source.name} gave no document ({counted or 'no file is included'}): mend or drop it"
                )


def read_documents(
    source: Source, unit: Unit, log: DropLog, repositories: Repositories, held_out_fraction: float = 0.0, seed: int = 0
) -> Iterator[Document]:
    """Yield the documents of one unit and log the files that give none.

    A file of which a document will be held out does not come back in the releases.
    """
    if source.reader == "generated":
        yield from _generated(source, seed)
    elif source.reader in ("jsonl", "parquet", "huggingface"):
        yield from _ready_made(source, unit, log)
    else:
        held_out = set()
        for file in read_unit(source, unit):
            identifier = f"{source.name}/{unit.package}/{file.path}"
            try:
                text, kind, language = extract(file.path, file.content, source.docstrings_only)
            except Skip as skip:
                log.add(source.name, str(skip), identifier, "")
                continue
            pieces = split_long(text, file.path)
            for number, piece in enumerate(pieces):
                part = f"#{number}" if len(pieces) > 1 else ""
                metadata = _metadata(source, kind, language, unit) | {"path": file.path + part}
                if kind != "code":
                    metadata["has_code"] = has_code(piece)
                if is_held_out(identifier + part, held_out_fraction):
                    held_out.add(file.path)
                yield Document(text=piece, id=identifier + part, metadata=metadata)
        if source.reader == "sdists" and len(unit.paths) > 1:
            yield from release_documents(source, unit, repositories, held_out, log)


def has_code(text: str) -> bool:
    """Say whether a page holds code blocks: fences (every `<pre>` became one), sessions, reStructuredText blocks."""
    return bool(CODE_BLOCK.search(text))


def _metadata(source: Source, kind: str, language: str, unit: Unit) -> dict[str, Any]:
    return {
        "source": source.name,
        "kind": kind,
        "language": language,
        "license": unit.license,
        "package": unit.package,
        "version": unit.version,
    }


def _ready_made(source: Source, unit: Unit, log: DropLog) -> Iterator[Document]:
    """Documents of a JSONL, Parquet or Hugging Face source: prose, unless a record says its `kind`.

    Records of code that name their `package` and `path`, and stand together, give repository contexts.

    A record with `messages` (and `tools`) in place of text is a trajectory and stays a conversation to the end.
    """
    for index, record in enumerate(_records(source, unit.paths[0])):
        identifier = f"{source.name}/{unit.package}/{index}"
        record = {key: value for key, value in record.items() if value is not None}  # an empty cell of a table
        messages = record.get("messages")
        text = json.dumps(messages, ensure_ascii=False) if messages else record.get(source.text_key)
        if isinstance(text, str) and _LONE_SURROGATE.search(text):
            record = {"problem": "record with broken encoding"}
        if "problem" in record or not isinstance(text, str) or not text.strip():
            log.add(source.name, record.get("problem", "record without text"), identifier, record.get("detail", ""))
            continue
        kind = "chat" if messages else record.get("kind", "prose")
        if kind not in ("prose", "web", "code", "chat", "reasoning"):
            log.add(source.name, "record of unknown kind", identifier, text)
            continue
        metadata = _metadata(source, kind, str(record.get("language", "")), unit)
        metadata |= {"license": str(record.get("license", unit.license)), "path": str(record.get("path", index))}
        metadata["package"] = str(record.get("package", ""))  # a file of records is no repository by itself
        metadata |= {key: record[key] for key in ("messages", "tools", "prompt", "answer") if key in record}
        if kind in ("prose", "web"):
            metadata["has_code"] = has_code(text)
        yield Document(text=text, id=identifier, metadata=metadata)


def _records(source: Source, path: str) -> Iterator[dict[str, Any]]:
    """Yield the records of a file or dataset; what is none, and the damaged end of a file, gives `{"problem": why}`."""
    read = {"parquet": _parquet_records, "jsonl": _json_records, "huggingface": _dataset_records}[source.reader]
    try:
        for record in islice(read(path), source.limit or None):
            yield record if isinstance(record, dict) else {"problem": "line is not a JSON object"}
    except (OSError, EOFError, pa.ArrowException) as error:
        if source.reader == "huggingface":
            raise
        yield {"problem": f"damaged {source.reader} file", "detail": str(error)}


def _parquet_records(path: str) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1000):
            yield from batch.to_pylist()


def _json_records(path: str) -> Iterator[Any]:
    with open_lines(Path(path)) as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except UnicodeDecodeError:
                yield {"problem": "record with broken encoding"}
            except (ValueError, RecursionError):
                yield {"problem": "line is not JSON"}


def _dataset_records(path: str) -> Iterator[Any]:
    """Yield the records of a dataset by name, of a folder of its files, or of one that `save_to_disk` wrote."""
    try:
        from datasets import load_dataset, load_from_disk
    except ImportError:
        raise ValueError("reader 'huggingface' needs the package datasets: pip install datasets") from None
    if (Path(path).expanduser() / "state.json").exists():
        yield from load_from_disk(str(Path(path).expanduser()))
    else:
        yield from load_dataset(path, split="train", streaming=True)


def _generated(source: Source, seed: int) -> Iterator[Document]:
    from glm45.corpus.reasoning import arithmetic_documents

    yield from arithmetic_documents(source.name, seed, source.limit)
