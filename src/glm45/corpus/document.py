"""What a document is, how steps of the pipeline read, write and count documents, and what a word is.

A document is datatrove's `Document`: `text`, a stable `id` (`source/package/path`) and `metadata` with the keys below.
Between steps documents lie in `NNNNN.jsonl.zst`, one file a task.

    source    name of the recipe's source that gave it
    kind      "prose", "web" or "code": which rules and which quality scorer apply; "repository", "reasoning" and
              "chat" are made, not found, and are neither held to the rules nor scored
    language  ISO 639-1 code of prose, programming language of code
    license, package, version, path   where the text comes from
    special_tokens                    special tokens that were put into `text` on purpose and must be read as such
"""

import json
import re
import string
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.word_tokenizers import WordTokenizer

FOUND_KINDS = ("prose", "web", "code")
NUM_EXAMPLES = 5  # dropped documents shown in the manifest for each reason

UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")  # kana and Han: written without spaces
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
_SENTENCE = re.compile(r"(?<=[.!?。！？])\s+|\n{2,}")


class Words(WordTokenizer):
    """Splits text at white space, and text without spaces into characters.

    datatrove's own tokenizers need spaCy or models fetched at run time; this one is ten times faster and works
    offline. Pass an instance wherever datatrove takes a `language`.
    """

    def word_tokenize(self, text: str) -> list[str]:
        """Return the words of `text`, punctuation attached."""
        return _WORD.findall(text) if UNSPACED.search(text) else text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        """Return the sentences of `text`."""
        return [part for part in _SENTENCE.split(text) if part and not part.isspace()]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Return where the sentences of `text` lie."""
        spans, start = [], 0
        for sentence in self.sent_tokenize(text):
            start = text.index(sentence, start)
            spans.append((start, start + len(sentence)))
            start += len(sentence)
        return spans

    def __eq__(self, other: object) -> bool:
        return type(other) is Words

    def __hash__(self) -> int:  # datatrove caches word lists by (text, tokenizer): equal across pickled copies
        return hash(Words)


WORDS = Words()


def reader(folder: Path) -> JsonlReader:
    """Read the documents that `writer` wrote into `folder`: each task its own file, in order."""
    return JsonlReader(str(folder), compression="zstd", add_file_path=False, glob_pattern="*.jsonl.zst")


def writer(folder: Path) -> JsonlWriter:
    """Write documents to `folder`, one zstd-compressed JSONL file a task."""
    return JsonlWriter(str(folder), "${rank}.jsonl", compression="zstd", adapter=_without_media)


def dataset_writer(folder: Path) -> JsonlWriter:
    """Write documents to `folder`, one file for each dataset and task: `<dataset>-NNNNN.jsonl.zst`."""
    return JsonlWriter(str(folder), "${dataset}-${rank}.jsonl", compression="zstd", adapter=_final_record)


def _without_media(_: JsonlWriter, document: Document) -> dict[str, Any]:
    return {"text": document.text, "id": document.id, "metadata": document.metadata}


def _final_record(_: JsonlWriter, document: Document) -> dict[str, Any]:
    """What the tokenizing step reads: conversations as `messages`, everything else as `text`."""
    metadata = dict(document.metadata)
    messages, tools = metadata.pop("messages", None), metadata.pop("tools", None)
    body = {"text": document.text} if messages is None else {"messages": messages, "tools": tools}
    return body | {"id": document.id, "metadata": metadata}


def count_letters(text: str) -> int:
    """Return how many characters of `text` are letters of any script."""
    if text.isascii():
        return len(text) - len(text.encode().translate(None, string.ascii_letters.encode()))
    return sum(map(str.isalpha, text))


class TaskReader(PipelineStep):
    """Reads exactly the file of this task, or nothing if the step before wrote none for it.

    datatrove's reader shares the files that exist among the tasks, so that a task without documents would shift all
    that come after it away from their own signatures and duplicate lists.
    """

    type = "📖 - READER"
    name = "documents of this task"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents of `rank` in the order in which they were written."""
        yield from read_task(self.folder, rank)


def read_task(folder: Path, rank: int) -> Iterator[Document]:
    """Yield the documents that task `rank` wrote into `folder`."""
    if (folder / f"{rank:05d}.jsonl.zst").exists():
        yield from reader(folder).read_file(f"{rank:05d}.jsonl.zst")


class DropLog:
    """Where filters put what they remove: counts by source and reason, and a few documents of each.

    Stands where datatrove takes an exclusion writer. One JSON file a task; `merge_drops` adds them up.
    """

    def __init__(self, folder: Path, default_reason: str = "dropped") -> None:
        self.folder, self.default_reason, self.rank = folder, default_reason, 0
        self.counts: Counter[str] = Counter()
        self.characters: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, str]]] = {}

    def write(self, document: Document, rank: int = 0) -> None:
        """Record that `document` was removed; the reason is its `filter_reason`."""
        self.rank = rank
        reason = document.metadata.get("filter_reason") or self.default_reason
        self.add(str(document.metadata.get("source")), reason, document.id, document.text)

    def add(self, source: str, reason: str, identifier: str, text: str) -> None:
        """Record one removal that never was a document, such as an unreadable file."""
        self.counts[f"{source}\t{reason}"] += 1
        self.characters[f"{source}\t{reason}"] += len(text)
        shown = self.examples.setdefault(reason, [])
        shown.append({"id": identifier, "text": text[:300]})
        if len(shown) > NUM_EXAMPLES:
            shown.remove(max(shown, key=_by_chance))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.counts:
            self.save()

    def save(self) -> None:
        """Write the log of this task."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"counts": self.counts, "characters": self.characters, "examples": self.examples}
        (self.folder / f"{self.rank:05d}.json").write_text(json.dumps(content))


def _by_chance(example: dict[str, str]) -> int:
    """Order examples so that those kept are of no one package, and the same every time."""
    return zlib.crc32(example["id"].encode("utf-8", "surrogateescape"))


def merge_drops(folder: Path) -> dict[str, Any]:
    """Add up the logs of all tasks: `{reason: {documents, characters, sources, examples}}`, most frequent first."""
    reasons: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        for key, count in content["counts"].items():
            source, reason = key.split("\t")
            entry = reasons.setdefault(reason, {"documents": 0, "characters": 0, "sources": {}, "examples": []})
            entry["documents"] += count
            entry["characters"] += content["characters"][key]
            entry["sources"][source] = entry["sources"].get(source, 0) + count
        for reason, examples in content["examples"].items():
            together = reasons[reason]["examples"] + examples
            reasons[reason]["examples"] = sorted(together, key=_by_chance)[:NUM_EXAMPLES]
    return dict(sorted(reasons.items(), key=lambda item: -item[1]["documents"]))


class Tally(PipelineStep):
    """Counts documents and characters that pass, by source, kind and language; one JSON file a task."""

    type = "📊 - COUNT"
    name = "tally"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Pass documents on and count them."""
        documents: Counter[str] = Counter()
        characters: Counter[str] = Counter()
        for document in data or ():
            metadata = document.metadata
            keys = (metadata["source"], metadata["kind"], metadata.get("language", "?"), metadata.get("bucket", ""))
            documents["\t".join(keys)] += 1
            characters["\t".join(keys)] += len(document.text)
            yield document
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"documents": documents, "characters": characters}
        (self.folder / f"{rank:05d}.json").write_text(json.dumps(content))


def merge_tallies(folder: Path) -> list[dict[str, Any]]:
    """Add up the tallies of all tasks: rows with source, kind, language, bucket, documents and characters."""
    documents: Counter[str] = Counter()
    characters: Counter[str] = Counter()
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        documents.update(content["documents"])
        characters.update(content["characters"])
    names = ("source", "kind", "language", "bucket")
    return [
        dict(zip(names, key.split("\t"), strict=True)) | {"documents": count, "characters": characters[key]}
        for key, count in sorted(documents.items())
    ]


def split_special(text: str, special_tokens: list[str]) -> list[tuple[str, bool]]:
    """Cut a text into `(piece, is_special)`: the special tokens put there on purpose, and plain text between them.

    Nothing but the tokens named becomes special, so that text that merely spells one stays text.
    """
    if not special_tokens:
        return [(text, False)] if text else []
    pieces = re.split("(" + "|".join(map(re.escape, special_tokens)) + ")", text)
    return [(piece, index % 2 == 1) for index, piece in enumerate(pieces) if piece]
