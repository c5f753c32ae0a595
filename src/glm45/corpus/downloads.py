"""Fetching what a source needs: source distributions by `pip download`, Debian packages by `apt-get download`.

Everything lands under one folder, under a temporary name until its hash is right, and is not fetched twice.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

NUM_CONNECTIONS = 4  # pip calls at once; they mostly wait


@dataclass(frozen=True)
class Archive:
    """A pinned source distribution."""

    package: str
    version: str
    sha256: str
    license: str
    path: Path


def sdist_archives(manifest: str, packages: Sequence[str], downloads: Path) -> dict[str, list[Archive]]:
    """Return the archives of a manifest by package, releases from the oldest on; all packages if none are named.

    Raises ValueError for a package that the manifest lacks.
    """
    text = (
        Path(manifest).read_text() if manifest else resources.files("glm45.corpus").joinpath("sdists.json").read_text()
    )
    entries = json.loads(text)
    unknown = sorted(set(packages) - set(entries))
    if unknown:
        raise ValueError(f"sdists: {', '.join(unknown)} not in the manifest, which has {', '.join(sorted(entries))}")
    return {
        package: [
            Archive(
                package, release["version"], release["sha256"], entry["license"], downloads / "sdists" / release["file"]
            )
            for release in entry["releases"]
        ]
        for package, entry in entries.items()
        if not packages or package in packages
    }


def fetch_sdists(archives: Sequence[Archive], downloads: Path) -> None:
    """Download the archives that are not there yet, each held to its hash.

    Nothing of an archive is run: a backend of ours (`stand_in`) gives pip the metadata that it wants to see.
    Raises OSError if pip fails, for example without network, with what it said.
    """
    folder = downloads / "sdists"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [archive for archive in archives if not _is_right(archive)]
    # Releases of a package are neighbours in the list and must not meet in one call of pip.
    num_calls = max([NUM_CONNECTIONS, *Counter(archive.package for archive in missing).values()])
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        calls = [missing[first::num_calls] for first in range(min(num_calls, len(missing)))]
        list(pool.map(lambda call: _pip_download(call, folder), calls))


def _pip_download(archives: Sequence[Archive], folder: Path) -> None:
    requirements = "".join(f"{each.package}=={each.version} --hash=sha256:{each.sha256}\n" for each in archives)
    with TemporaryDirectory(dir=folder, suffix=".part") as staging:
        listed = Path(staging, "requirements.txt")
        listed.write_text(requirements)
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary=:all:", "--no-build-isolation"]
        command = [
            sys.executable,
            "-P",
            "-m",
            "pip",
            "download",
            *options,
            f"--dest={staging}/got",
            f"--requirement={listed}",
        ]
        backend = {"PYTHONPATH": str(resources.files("glm45.corpus") / "stand_in"), "PIP_USE_PEP517": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | backend)
        if result.returncode:
            lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
            said = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "nothing")
            names = ", ".join(f"{each.package} {each.version}" for each in archives)
            raise OSError(f"pip could not download {names}: {said} (is there network?)")
        by_hash = {file_sha256(path): path for path in Path(staging, "got").iterdir()}
        for archive in archives:
            by_hash[archive.sha256].rename(archive.path)


def _is_right(archive: Archive) -> bool:
    return archive.path.exists() and file_sha256(archive.path) == archive.sha256


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch_debian(packages: Sequence[str], downloads: Path) -> dict[str, str]:
    """Download and unpack Debian packages without root; return the SHA-256 of each package's file.

    Raises OSError if apt-get or dpkg-deb is missing or fails.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            raise OSError(f"Debian sources need {tool}; leave them out of the recipe on this system")
    hashes: dict[str, str] = {}
    for package in packages:
        root = downloads / "debian" / package
        if not (root / "sha256").exists():
            _fetch_debian_package(package, root)
        hashes[package] = (root / "sha256").read_text().strip()
    return hashes


def _fetch_debian_package(package: str, root: Path) -> None:
    staging = root.with_name(f"{package}.part")
    for stale in (staging, root):
        shutil.rmtree(stale, ignore_errors=True)
    staging.mkdir(parents=True)
    result = subprocess.run(["apt-get", "download", package], cwd=staging, capture_output=True, text=True)
    found = list(staging.glob("*.deb"))
    if result.returncode or len(found) != 1:
        raise OSError(f"could not download {package}: {result.stderr.strip().splitlines()[-1:]} (try apt-get update)")
    subprocess.run(["dpkg-deb", "-x", str(found[0]), str(staging / "files")], check=True)
    (staging / "version").write_text(found[0].name.split("_")[1].replace("%3a", ":"))
    (staging / "sha256").write_text(file_sha256(found[0]))
    found[0].unlink()
    staging.rename(root)


def describe_downloads(archives: Sequence[Archive]) -> dict[str, list[dict[str, str]]]:
    """Return version, hash and licence of every archive by package, for a corpus's manifest."""
    described = defaultdict(list)
    for archive in archives:
        described[archive.package].append(
            {"version": archive.version, "sha256": archive.sha256, "license": archive.license}
        )
    return dict(described)
