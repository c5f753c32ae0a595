"""Files that are whole or not there, and what tells their contents."""

import hashlib
import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a file such that a kill leaves the old one or the new one, and two processes one of theirs."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def fingerprint(path: str | Path) -> str:
    """Return a hash of a file's contents, or of those of a folder's files with their names; empty for an empty path.

    Every byte is read, about a second a gigabyte.
    """
    if not path:
        return ""
    folder = Path(path)
    names = sorted(file.name for file in folder.iterdir() if file.is_file()) if folder.is_dir() else [""]
    found = hashlib.sha256()
    for name in names:
        with (folder / name).open("rb") as source:
            found.update(f"{name} {hashlib.file_digest(source, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()
