"""Where raw text comes from: the interpreter, installed packages, source distributions, Debian, your own files.

A source is divided into units, the smallest pieces that one task reads whole: a package with all its releases, or a
file of a JSONL or Parquet source. Keeping a package together lets repository contexts be built without another pass.
"""

import fnmatch
import gzip
import importlib.metadata
import os
import sysconfig
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from glm45.config import configuration
from glm45.corpus.downloads import sdist_archives

Reader = Literal["stdlib", "installed", "sdists", "debian", "folder", "jsonl", "parquet", "huggingface", "generated"]


PACKED = (".gz", ".dz")
TOO_LARGE = b"\0too large"  # stands for the content of a file beyond `max_file_bytes`
UNREADABLE = b"\0unreadable"  # stands for the content of a file that could not be read; counted by who decodes it


@configuration
class Source:
    """One origin of documents."""

    name: str
    """First part of its datasets' names, such as `stdlib`; no dots."""
    reader: Reader
    """How it is read. `generated` is procedural arithmetic with worked steps."""
    path: str = ""
    """Folder or file of `folder`, `jsonl` and `parquet`; dataset of `huggingface`; archive manifest of `sdists`
    (empty: the one that the project ships)."""
    packages: tuple[str, ...] = ()
    """Packages of `installed`, `sdists` (empty: all of the manifest) and `debian`."""
    include: tuple[str, ...] = ("*",)
    """Patterns of paths that are read."""
    exclude: tuple[str, ...] = ()
    """Patterns of paths, with or without the package before them, that are not read."""
    license: str = "unknown"
    """Licence noted for documents whose package does not say its own."""
    text_key: str = "text"
    """Field that holds the text, in `jsonl`, `parquet` and `huggingface`."""
    docstrings_only: bool = False
    """Read Python modules as the prose of their docstrings instead of as code."""
    max_file_bytes: int = 2_000_000
    """Larger files are skipped and counted. Not in the report."""
    limit: int = 0
    """Most documents of `generated`, and of a file or dataset of records; 0 is no limit for the latter."""

    def __post_init__(self) -> None:
        if not self.name or "." in self.name or "/" in self.name:
            raise ValueError(
                f"source name {self.name!r}: need a name without '.' and '/', it becomes part of a file name"
            )
        if self.reader in ("folder", "jsonl", "parquet", "huggingface") and not self.path:
            raise ValueError(f"source {self.name}: reader {self.reader!r} needs a path")
        if self.reader in ("installed", "debian") and not self.packages:
            raise ValueError(f"source {self.name}: reader {self.reader!r} needs packages")


@dataclass(frozen=True)
class Unit:
    """What one task reads whole: `paths` are folders, files or, for sdists, archives from the oldest release on."""

    source: str
    package: str
    version: str
    license: str
    size: int
    paths: tuple[str, ...]


@dataclass(frozen=True)
class RawFile:
    """One file as it was found; `content` is not yet known to be text."""

    path: str
    content: bytes


def list_units(source: Source, downloads: Path) -> list[Unit]:
    """Return the units of a source, whose downloads must have been fetched.

    Raises ValueError if the source gives nothing: a corpus that silently lacks a source is not the one asked for.
    """
    units = _LISTERS[source.reader](source, downloads)
    if not units:
        raise ValueError(f"source {source.name}: nothing to read ({_describe(source)})")
    return units


def read_unit(source: Source, unit: Unit) -> Iterator[RawFile]:
    """Yield the files of a unit (of sdists, of its newest release) in a fixed order, filtered by path."""
    for path, content in _read_files(source, unit, unit.paths[-1]):
        yield RawFile(path, content)


def read_releases(source: Source, unit: Unit) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield `(version, files)` of every release of an sdist unit, the oldest first; paths lack the top folder."""
    for archive in unit.paths:
        yield _archive_version(archive), dict(_read_files(source, unit, archive))


def _read_files(source: Source, unit: Unit, path: str) -> Iterator[tuple[str, bytes]]:
    def wanted(name: str) -> bool:
        whole = f"{unit.package}/{name}"
        included = any(fnmatch.fnmatch(name, pattern) for pattern in source.include)
        return included and not any(fnmatch.fnmatch(whole, p) or fnmatch.fnmatch(name, p) for p in source.exclude)

    limit = source.max_file_bytes + 1  # read no more of a file than shows that it is too large
    if path.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
        files = _read_archive(Path(path), wanted, limit)
    elif source.reader == "installed":
        files = _read_listed(Path(path), _installed_files(unit.package), wanted, limit)
    elif Path(path).is_file():
        files = _read_listed(Path(path).parent, [Path(path).name], wanted, limit)
    else:
        files = _read_listed(Path(path), _walk(Path(path), top_only=unit.package == "(files)"), wanted, limit)
    for name, content in files:
        yield printable(name), content if len(content) <= source.max_file_bytes else TOO_LARGE


def printable(name: str) -> str:
    """Return a file's name without the surrogates that stand for bytes of another encoding: they cannot be written."""
    return name.encode("utf-8", "backslashreplace").decode()


def _read_archive(archive: Path, wanted: Callable[[str], bool], limit: int) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if member.isfile() and wanted(name):
                extracted = tar.extractfile(member)
                assert extracted is not None
                yield name, extracted.read(limit)


def _read_listed(
    root: Path, names: list[str], wanted: Callable[[str], bool], limit: int
) -> Iterator[tuple[str, bytes]]:
    for name in names:
        if wanted(name):
            try:
                with (gzip.open if name.endswith(PACKED) else open)(root / name, "rb") as file:
                    unpacked = file.read(limit)
            except (OSError, EOFError, zlib.error):  # a broken link, no permission, a damaged archive
                unpacked = UNREADABLE
            yield name.removesuffix(".gz").removesuffix(".dz"), unpacked


def _walk(root: Path, top_only: bool = False) -> list[str]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [] if top_only else sorted(f for f in folders if f not in ("__pycache__", ".git", "site-packages"))
        found += [os.path.relpath(os.path.join(folder, file), root) for file in sorted(files)]
    return found


def _size(root: Path, names: list[str]) -> int:
    return sum((root / name).stat().st_size for name in names if (root / name).is_file())


def _list_folders(source: Source, root: Path, version: str) -> list[Unit]:
    """One unit a sub-folder, and one for the files beside them."""
    if not root.is_dir():
        raise ValueError(f"source {source.name}: {root} is not a folder")
    units = []
    for child in sorted(root.iterdir()):
        if child.is_dir() and child.name not in ("__pycache__", ".git", "site-packages", "dist-packages"):
            size = _size(child, _walk(child))
            units.append(Unit(source.name, printable(child.name), version, source.license, size, (str(child),)))
    loose = _walk(root, top_only=True)
    if loose:
        units.append(Unit(source.name, "(files)", version, source.license, _size(root, loose), (str(root),)))
    return [unit for unit in units if unit.size]


def _list_stdlib(source: Source, downloads: Path) -> list[Unit]:
    version = sysconfig.get_python_version()
    return _list_folders(source, Path(sysconfig.get_paths()["stdlib"]), version)


def _list_folder(source: Source, downloads: Path) -> list[Unit]:
    path = Path(source.path).expanduser()
    if path.is_file():
        return [Unit(source.name, path.name, "", source.license, path.stat().st_size, (str(path),))]
    return _list_folders(source, path, "")


def _list_files(source: Source, downloads: Path) -> list[Unit]:
    path = Path(source.path).expanduser()
    if not path.exists():
        raise ValueError(f"source {source.name}: {path} does not exist")
    files = [path] if path.is_file() else sorted(p for p in path.rglob(f"*.{source.reader}*") if p.is_file())
    root = path.parent if path.is_file() else path
    return [
        Unit(source.name, printable(str(p.relative_to(root))), "", source.license, p.stat().st_size, (str(p),))
        for p in files
    ]


def _installed_files(package: str) -> list[str]:
    files = importlib.metadata.files(package) or []
    return sorted(str(file) for file in files if not str(file).startswith("..") and "__pycache__" not in str(file))


def _list_installed(source: Source, downloads: Path) -> list[Unit]:
    """Packages that this interpreter does not have are left out: what is installed is part of the recipe's input."""
    units = []
    for package in source.packages:
        try:
            distribution = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        root = Path(str(distribution.locate_file("")))
        fields = dict(distribution.metadata.items())  # type: ignore[attr-defined]
        license_name = fields.get("License-Expression") or fields.get("License") or ""
        short = license_name.strip().split("\n")[0][:60] or source.license
        size = _size(
            root, [name for name in _installed_files(package) if name.endswith((".py", ".md", ".rst", ".txt"))]
        )
        units.append(Unit(source.name, package, distribution.version, short, size, (str(root),)))
    return units


def _list_sdists(source: Source, downloads: Path) -> list[Unit]:
    units = []
    for package, archives in sdist_archives(source.path, source.packages, downloads).items():
        newest = archives[-1]
        paths = tuple(str(archive.path) for archive in archives)
        size = sum(archive.path.stat().st_size for archive in archives) * 4  # text is about four times its archive
        units.append(Unit(source.name, package, newest.version, newest.license, size, paths))
    return units


def _archive_version(archive: str) -> str:
    return Path(archive).name.removesuffix(".tar.gz").rpartition("-")[2]


def _list_debian(source: Source, downloads: Path) -> list[Unit]:
    units = []
    for package in source.packages:
        root = downloads / "debian" / package
        names = _walk(root / "files")
        version = (root / "version").read_text().strip()
        size = _size(root / "files", names)
        units.append(Unit(source.name, package, version, source.license, size, (str(root / "files"),)))
    return units


def _list_virtual(source: Source, downloads: Path) -> list[Unit]:
    return [Unit(source.name, source.path or source.name, "", source.license, 1_000_000, (source.path,))]


def _describe(source: Source) -> str:
    where = source.path or ", ".join(source.packages)
    return f"reader {source.reader}" + (f" of {where}" if where else "")


_LISTERS: dict[str, Callable[[Source, Path], list[Unit]]] = {
    "stdlib": _list_stdlib,
    "installed": _list_installed,
    "sdists": _list_sdists,
    "debian": _list_debian,
    "folder": _list_folder,
    "jsonl": _list_files,
    "parquet": _list_files,
    "huggingface": _list_virtual,
    "generated": _list_virtual,
}


def share_out(units: list[Unit], num_tasks: int) -> list[list[Unit]]:
    """Divide units among tasks so that every task reads about as much: largest first, to the least loaded."""
    tasks: list[list[Unit]] = [[] for _ in range(num_tasks)]
    loads = [0] * num_tasks
    for unit in sorted(units, key=lambda unit: (-unit.size, unit.source, unit.package)):
        least = loads.index(min(loads))
        tasks[least].append(unit)
        loads[least] += unit.size
    return tasks
