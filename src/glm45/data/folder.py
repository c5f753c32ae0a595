"""A data folder: `manifest.json`, `tokenizer/` and `shards/<dataset>.bin|.idx`."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from glm45.data.mixture import HELD_OUT
from glm45.data.shards import Documents, Shard, ShardChain, describe, verify
from glm45.text.tokenizer import Tokenizer

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
        return cls({name: _open_dataset(shards, name, entry) for name, entry in manifest["datasets"].items()}, manifest)

    @property
    def held_out(self) -> dict[str, str]:
        """Source to the name of its held-out dataset."""
        return {name.removesuffix(f".{HELD_OUT}"): name for name in self.datasets if name.endswith(f".{HELD_OUT}")}


def adopt(path: Path) -> dict[str, Any]:
    """Describe shards that another system made, so that training accepts the folder; return the manifest's entries.

    `path` holds `tokenizer/` and, in `shards/`, Megatron's `.bin`/`.idx` pairs. A pair bears the name of its dataset,
    such as `web.high`; pairs that differ only in a final number after `-` or `.`
    (`web.high-00000`, ...) are one dataset.

    Raises ValueError if there are none, or for a token that the tokenizer does not have.
    """
    tokenizer = Tokenizer.load(path / "tokenizer")
    datasets: dict[str, dict[str, Any]] = {}
    for index in sorted((path / "shards").glob("*.idx")):
        prefix = index.parent / index.name.removesuffix(".idx")
        highest = max((int(tokens.max()) for tokens in _stretches(Shard(prefix).tokens)), default=0)
        if highest >= tokenizer.vocab_size:
            raise ValueError(
                f"{prefix}.bin holds token {highest}, the tokenizer has {tokenizer.vocab_size}: it is another's"
            )
        entry, name = describe(prefix), re.sub(r"[-.]\d+$", "", prefix.name)
        known = datasets.setdefault(name, {"documents": 0, "tokens": 0, "shards": [], "files": {}})
        known["documents"] += entry["documents"]
        known["tokens"] += entry["tokens"]
        known["shards"].append(prefix.name)
        known["files"] |= entry["files"]
    if not datasets:
        raise ValueError(f"{path / 'shards'} holds no .bin/.idx pairs: put Megatron's shards there")
    entries = {"tokenizer": describe_tokenizer(tokenizer), "datasets": datasets}
    update_manifest(path, entries)
    return entries


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a tokenizer's entry of the manifest."""
    return {
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "padded_vocab_size": tokenizer.padded_vocab_size,
    }


def tokenizer_fingerprint(path: Path | str) -> str | None:
    """Return the fingerprint of the tokenizer that a folder's shards were made with; None where the manifest is silent.

    What lies in `tokenizer/` may have been exchanged since.
    """
    manifest = Path(path) / MANIFEST
    entries = json.loads(manifest.read_text()) if manifest.exists() else {}
    return entries.get("tokenizer", {}).get("fingerprint")


def _open_dataset(shards: Path, name: str, entry: Mapping[str, Any]) -> Documents:
    parts = [Shard(shards / part) for part in entry.get("shards", [name])]
    return parts[0] if len(parts) == 1 else ShardChain(parts)


def _stretches(tokens: np.ndarray) -> Iterator[np.ndarray]:
    return (tokens[first : first + (1 << 24)] for first in range(0, len(tokens), 1 << 24))


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
