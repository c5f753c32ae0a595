"""Repository-level contexts: files of one package in dependency order, and releases as commits with their changelog.

Issues and pull requests are not within a package manager's reach; a release's changelog entry stands for them, in one
context with the differences that it speaks of.
"""

import difflib
import re
from collections.abc import Iterator, Set
from graphlib import CycleError, TopologicalSorter
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from glm45.config import configuration
from glm45.corpus.document import DropLog
from glm45.corpus.extract import Skip, decode, kind_of
from glm45.corpus.sources import Source, Unit, read_releases

CHANGELOG = re.compile(r"(?:^|/)(?:changes|changelog|history|news)[^/]*$", re.IGNORECASE)

IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import[ \t]*(\([^)]*\)|(?:[^\n\\#]|\\\n)*)|import[ \t]+((?:[^\n\\#]|\\\n)*))",
    re.MULTILINE,
)
COMMENT = re.compile(r"#.*")
MAX_HELD_CHARACTERS = 50_000_000  # of a package, in memory at once


@configuration
class Repositories:
    """Repository contexts. The report gives their contents and the stage's 32,768 tokens, no more."""

    context_characters: int = 100_000
    """Most characters of a context: about 32,768 tokens of code. Not in the report."""
    max_contexts: int = 0
    """Most contexts of one package's files; 0 is no limit. Not in the report."""
    min_files: int = 2
    """Packages with fewer files give no context. Not in the report."""
    max_diff_characters: int = 20_000
    """Differences of one file beyond this are left out: generated or vendored. Not in the report."""


class RepositoryContexts(PipelineStep):
    """Passes documents on and adds, after each package, its kept source files as contexts."""

    type = "🗃 - CONTEXT"
    name = "repositories"

    def __init__(self, config: Repositories) -> None:
        super().__init__()
        self.config = config

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Documents of a package arrive together: its unit is read by one task. A giant is contexts by instalments."""
        sources: dict[str, str] = {}  # texts, not documents: a later step may cut those it has been passed
        metadata: dict[str, Any] = {}
        held = part = 0
        for document in data or ():
            another = _package(document.metadata) != _package(metadata) if sources else False
            if another or held > MAX_HELD_CHARACTERS:
                yield from self._contexts(sources, metadata, part)
                sources, held, part = {}, 0, 0 if another else part + 1
            about = document.metadata
            if about["kind"] == "code" and about["package"] and about.get("bucket") != "heldout":
                metadata = about
                sources[metadata["path"]] = document.text
                held += len(document.text)
            yield document
        yield from self._contexts(sources, metadata, part)

    def _contexts(self, sources: dict[str, str], first: dict[str, Any], part: int) -> Iterator[Document]:
        if len(sources) < self.config.min_files:
            return
        contexts = pack_files(dependency_order(sources), sources, self.config.context_characters)
        for number, text in enumerate(islice(contexts, self.config.max_contexts or None)):
            path = f"#repository/{part}/{number}"
            metadata = {key: first[key] for key in ("source", "license", "package", "version", "language")}
            metadata |= {"kind": "repository", "path": path, "bucket": "medium"}
            yield Document(text, f"{first['source']}/{first['package']}/{path}", metadata=metadata)


def _package(metadata: dict[str, Any]) -> tuple[str, str]:
    return metadata["source"], metadata["package"]


def dependency_order(sources: dict[str, str]) -> list[str]:
    """Return the paths of a package so that a Python file comes after the files of the package that it imports.

    Where imports form a circle, the circle is opened at its first path; other languages follow in order of path.
    """
    modules = {_module_name(path): path for path in sorted(sources) if path.endswith(".py")}
    depends = {path: _imported_paths(sources[path], path, modules) - {path} for path in modules.values()}
    while True:
        try:
            order = list(
                TopologicalSorter({path: sorted(needed) for path, needed in sorted(depends.items())}).static_order()
            )
            break
        except CycleError as error:
            circle = error.args[1]
            opened = min(circle)
            depends[opened] -= set(circle)
    return order + sorted(set(sources) - set(order))


def _module_name(path: str) -> str:
    return (
        path.removesuffix(".py").removesuffix("/__init__").removeprefix("src/").removeprefix("lib/").replace("/", ".")
    )


def imported_names(text: str) -> set[str]:
    """Return what a Python file imports, dotted, relative imports with their dots; `from a import b` gives a and a.b.

    Found by pattern, ten times as fast as by parsing; an example in a docstring counts as well.
    """
    names = set()
    for base, imported, modules in IMPORT.findall(text):
        listed = COMMENT.sub("", imported or modules).strip("()").replace("\\", "").split(",")
        found = [words[0] for name in listed if (words := name.split())]
        prefix = base if base.endswith(".") or not base else f"{base}."
        names |= {base} if base else set()
        names |= {f"{prefix}{name}" for name in found}
    return names


def _imported_paths(text: str, path: str, modules: dict[str, str]) -> set[str]:
    here = _module_name(path).split(".")
    package = here if path.endswith("__init__.py") else here[:-1]
    paths = set()
    for name in imported_names(text):
        level = len(name) - len(name.lstrip("."))
        base = package[: len(package) - level + 1] if level else []
        paths.add(modules.get(".".join([*base, *filter(None, [name[level:]])])))
    return {found for found in paths if found is not None}


def pack_files(order: list[str], sources: dict[str, str], max_characters: int) -> Iterator[str]:
    """Yield contexts of whole files in order; a file longer than a context is one of its own."""
    context: list[str] = []
    size = 0
    for path in order:
        piece = f"# File: {path}\n{sources[path].strip()}\n\n"
        if context and size + len(piece) > max_characters:
            yield "".join(context)
            context, size = [], 0
        context.append(piece)
        size += len(piece)
    if context:
        yield "".join(context)


def release_documents(
    source: Source, unit: Unit, config: Repositories, held_out: Set[str], log: DropLog
) -> Iterator[Document]:
    """Yield consecutive releases of a package as commits: changelog entry first, then the differences.

    Files of the newest release that are `held_out`, by path, are left out of all, whatever their ending was: a page may
    have been `.rst` before it was `.md`.
    """
    kept_from_training = {_without_ending(path) for path in held_out}
    previous: tuple[str, dict[str, str]] | None = None
    for version, files in read_releases(source, unit):
        texts = {path: text for path, text in _readable(files) if _without_ending(path) not in kept_from_training}
        if previous is not None:
            identifier = f"{source.name}/{unit.package}/#release/{version}"
            pieces = list(release_contexts(unit.package, previous, (version, texts), config))
            if not pieces:
                log.add(source.name, "release without readable differences", identifier, "")
            for number, text in enumerate(pieces):
                metadata = {"source": source.name, "kind": "repository", "language": "diff", "license": unit.license}
                metadata |= {
                    "package": unit.package,
                    "version": version,
                    "path": f"#release/{version}/{number}",
                    "bucket": "medium",
                }
                yield Document(text, f"{identifier}/{number}", metadata=metadata)
        previous = version, texts


def release_contexts(
    package: str, old: tuple[str, dict[str, str]], new: tuple[str, dict[str, str]], config: Repositories
) -> Iterator[str]:
    """Yield the change from one release, `(version, files)`, to the next as contexts; each repeats the entry."""
    entry = changelog_entry(new[1], new[0]) or f"Release {package} {new[0]}."
    header = f"Issue: {package} {new[0]}\n\n{entry[: config.context_characters // 4]}\n\n"
    context, size = [header], len(header)
    for path in sorted(old[1].keys() | new[1].keys()):
        difference = "" if CHANGELOG.search(path) else unified_diff(old[1].get(path, ""), new[1].get(path, ""), path)
        if not difference or len(difference) > config.max_diff_characters:
            continue
        if len(context) > 1 and size + len(difference) > config.context_characters:
            yield "".join(context)
            context, size = [header], len(header)
        context.append(difference)
        size += len(difference)
    if len(context) > 1:
        yield "".join(context)


def unified_diff(old: str, new: str, path: str) -> str:
    """Return the difference of two versions of a file as `git diff` writes it; empty if there is none."""
    if old == new:
        return ""
    lines = difflib.unified_diff(
        old.splitlines(keepends=True),
        new.splitlines(keepends=True),
        f"a/{path}" if old else "/dev/null",
        f"b/{path}" if new else "/dev/null",
    )
    body = "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)
    return f"diff --git a/{path} b/{path}\n{body}\n"


def changelog_entry(files: dict[str, str], version: str) -> str:
    """Return the part of the package's changelog under the heading of `version`, or an empty string."""
    for path in sorted((path for path in files if CHANGELOG.search(path)), key=lambda path: (path.count("/"), path)):
        lines = files[path].splitlines()
        starts = [i for i, line in enumerate(lines) if _is_heading(lines, i)]
        for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
            if re.search(rf"(?<![\d.]){re.escape(version)}(?![\d])", lines[start]):
                return "\n".join(lines[start:end]).strip()
    return ""


def _is_heading(lines: list[str], index: int) -> bool:
    line = lines[index]
    if not re.search(r"\d+\.\d+", line) or len(line) > 80:
        return False
    underlined = index + 1 < len(lines) and re.fullmatch(r"([=\-~^#*])\1{2,}", lines[index + 1].strip()) is not None
    return underlined or line.startswith("#")


def _without_ending(path: str) -> PurePosixPath:
    return PurePosixPath(path).with_suffix("")


def _readable(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    for path, content in files.items():
        try:
            if kind_of(path)[0] in ("code", "prose") and "egg-info" not in PurePosixPath(path).parts[0]:
                yield path, decode(content, path)
        except Skip:
            continue  # counted when the newest release was read as documents
