"""A data folder: `manifest.json`, `tokenizer/` and `shards/<dataset>.bin|.idx`."""

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from glm45.data.mixture import HELD_OUT
from glm45.data.shards import Documents, Shard, verify

MANIFEST = "manifest.json"


class DataFolder:
    """The datasets of a data folder, opened and checked once; also wraps datasets that live in memory.

    Attributes: `datasets` (name to documents), `tokens` (name to number of tokens), `manifest`.
    """

    def __init__(self, datasets: Mapping[str, Documents], manifest: Mapping[str, Any] | None = None) -> None:
        self.datasets = dict(sorted(datasets.items()))
        self.tokens = {name: documents.num_tokens for name, documents in self.datasets.items()}
        self.manifest = dict(manifest or {})

    @classmethod
    def open(cls, path: Path | str, *, check: bool = True) -> "DataFolder":
        """Open the data folder at `path`; `check` reads every shard and compares its checksum, on all cores.

        Raises FileNotFoundError without a manifest, ValueError for a shard that is missing, cut short or damaged.
        """
        path = Path(path)
        manifest_path = path / MANIFEST
        if not manifest_path.exists():
            raise FileNotFoundError(f"{path} is not a data folder, it has no {MANIFEST}: run glm45 data build")
        manifest = json.loads(manifest_path.read_text())
        if "datasets" not in manifest:
            raise ValueError(f"{manifest_path} lists no datasets: the build was not finished, run it again")
        shards = path / "shards"
        if check:
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda entry: verify(shards, entry), manifest["datasets"].values()))
        return cls({name: Shard(shards / name) for name in manifest["datasets"]}, manifest)

    @property
    def held_out(self) -> dict[str, str]:
        """Source to the name of its held-out dataset."""
        return {name.removesuffix(f".{HELD_OUT}"): name for name in self.datasets if name.endswith(f".{HELD_OUT}")}


def update_manifest(folder: Path, entries: Mapping[str, Any]) -> None:
    """Add top-level `entries` to a folder's manifest: the old file or the new one survives a kill, nothing between."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text()) if path.exists() else {}
    temporary = folder / f"{MANIFEST}.tmp"
    with temporary.open("w") as file:
        json.dump({**manifest, **entries}, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
