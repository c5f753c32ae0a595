"""The first step of the pipeline: every task reads its units and turns files into documents."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import HuggingFaceDatasetReader, JsonlReader, ParquetReader

from glm45.corpus.document import DropLog
from glm45.corpus.extract import Skip, extract
from glm45.corpus.sources import Source, Unit, list_units, read_unit, share_out

CODE_FENCE = re.compile(r"^```", re.MULTILINE)


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

    def __init__(self, sources: tuple[Source, ...], plan: Path, drops: Path, seed: int) -> None:
        super().__init__()
        self.sources = {source.name: source for source in sources}
        self.plan, self.drops, self.seed = plan, drops, seed

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents of this task's units."""
        with DropLog(self.drops) as log:
            log.rank = rank
            for unit in load_plan(self.plan)[rank]:
                yield from read_documents(self.sources[unit.source], unit, log, self.seed)


def read_documents(source: Source, unit: Unit, log: DropLog, seed: int = 0) -> Iterator[Document]:
    """Yield the documents of one unit and log the files that give none."""
    if source.reader == "generated":
        yield from _generated(source, seed)
    elif source.reader in ("jsonl", "parquet", "huggingface"):
        yield from _ready_made(source, unit, log)
    else:
        for file in read_unit(source, unit):
            identifier = f"{source.name}/{unit.package}/{file.path}"
            try:
                text, kind, language = extract(f"{unit.package}/{file.path}", file.content, source.docstrings_only)
            except Skip as skip:
                log.add(source.name, str(skip), identifier, "")
                continue
            metadata = _metadata(source, kind, language, unit) | {"path": file.path}
            if kind != "code":
                metadata["has_code"] = bool(CODE_FENCE.search(text) or ">>> " in text)
            yield Document(text=text, id=identifier, metadata=metadata)


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
    """Documents of a JSONL, Parquet or Hugging Face source: prose unless their metadata say otherwise."""
    path = unit.paths[0]
    if source.reader == "huggingface":
        reader = HuggingFaceDatasetReader(path, {"split": "train"}, limit=source.limit or -1, text_key=source.text_key)
        documents = reader.run()
    else:
        kind = JsonlReader if source.reader == "jsonl" else ParquetReader
        documents = kind(str(Path(path).parent), text_key=source.text_key).read_file(Path(path).name)
    for index, document in enumerate(documents):
        identifier = f"{source.name}/{unit.package}/{index}"
        if not isinstance(document.text, str) or not document.text.strip():
            log.add(source.name, "empty or not text", identifier, "")
            continue
        given = document.metadata
        kind_given = given["kind"] if given.get("kind") in ("prose", "web", "code") else "prose"
        metadata = _metadata(source, kind_given, str(given.get("language", "")), unit)
        metadata["license"] = str(given.get("license", source.license))
        metadata["path"] = str(given.get("path", index))
        yield Document(text=document.text, id=identifier, metadata=metadata)


def _generated(source: Source, seed: int) -> Iterator[Document]:
    from glm45.corpus.reasoning import arithmetic_documents

    yield from arithmetic_documents(source.name, seed, source.limit)
