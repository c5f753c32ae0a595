"""What a build reads beside its recipe, as fingerprints: a changed input makes stale what was built from it."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from glm45.corpus.downloads import sdist_archives
from glm45.corpus.sources import Source


def source_stamp(source: Source, downloads: Path) -> Any:
    """Return what tells a source's content without reading it: versions, archives' hashes, files' sizes and times.

    A Debian package stays as it was downloaded, and a Hugging Face dataset is known by its name alone.
    """
    if source.reader == "stdlib":
        return platform.python_version()
    if source.reader == "installed":
        return [installed_version(package) for package in source.packages]
    if source.reader == "sdists":
        archives = sdist_archives(source.path, source.packages, downloads)
        return [(each.package, each.sha256, each.license) for several in archives.values() for each in several]
    return file_stamps(source.path)


def file_stamps(path: str) -> list[tuple[str, int, int]]:
    """Return path, size and time of change of a file, or of every file in a folder."""
    root = Path(path).expanduser()
    if not path or not root.exists():
        return []
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    return [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]


def content_hashes(files: Iterable[Path | Traversable]) -> list[tuple[str, str]]:
    """Return name and SHA-256 of small files."""
    return [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]


def installed_version(package: str) -> str | None:
    """Return the version of a package of this interpreter, None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
