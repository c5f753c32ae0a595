"""A corpus from its recipe: run the chain, tokenize, and write the manifest that describes what came of it."""

import json
import os
import shutil
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from glm45 import __version__
from glm45.config import to_dict
from glm45.corpus.decontaminate import evaluation_files, evaluation_items
from glm45.corpus.document import merge_drops, merge_tallies
from glm45.corpus.downloads import describe_downloads, fetch_debian, fetch_sdists, sdist_archives
from glm45.corpus.inputs import installed_version
from glm45.corpus.pipeline import CorpusChain, corpus_chain
from glm45.corpus.quality import SCORERS
from glm45.corpus.read import load_plan
from glm45.corpus.recipe import CorpusRecipe as CorpusRecipe
from glm45.corpus.tokenize import tokenize_datasets
from glm45.data.folder import update_manifest
from glm45.pipeline import locked
from glm45.text.tokenizer import Tokenizer

MIN_FREE_BYTES = 1_000_000_000
LIBRARIES = ("datatrove", "fasttext-community", "py3langid", "resiliparse", "scikit-learn", "xxhash", "tokenizers")


def build(recipe: CorpusRecipe, out: Path, report: Callable[[str], None] = print) -> Path:
    """Build the corpus into `out` and return the path of its manifest; go on where an earlier build stopped.

    `out` then holds `manifest.json`, `tokenizer/`, `shards/` and, for the next build, `work/`. The manifest is written
    last: a folder without one is unfinished. Under Slurm the first call only submits the steps.

    Raises ValueError for a recipe that gives nothing, OSError without disk space, network or tools.
    """
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    downloads = Path(recipe.downloads).expanduser() if recipe.downloads else work / "downloads"
    with locked(work / "lock", f"{out} is being built by another process: wait for it or stop it"):
        started = time.monotonic()
        corpus = corpus_chain(recipe, work, downloads)
        key = corpus_key(recipe, corpus)
        manifest_path = out / "manifest.json"
        if _built_key(manifest_path) == key:
            report(f"{out} is built already")
            return manifest_path
        _check_space(out)
        manifest_path.unlink(missing_ok=True)
        for name, absent in not_installed(recipe).items():
            report(f"{name}: not installed here, left out: {', '.join(absent)}")
        fetched = fetch(recipe, downloads, report)
        report(f"download: {time.monotonic() - started:.1f} s")
        if unfinished := corpus.chain.run(recipe.executor, report):
            report(f"{', '.join(unfinished)}: submitted; give the same command again when these jobs have ended")
            return manifest_path
        entries = _tokenize(recipe, corpus.documents, out, report)
        described = describe(recipe, corpus, fetched)
        seconds = round(time.monotonic() - started, 1)
        update_manifest(out, {"key": key, "seconds": seconds} | described | entries)
        report(f"built {out} in {seconds} s")
    return manifest_path


def corpus_key(recipe: CorpusRecipe, corpus: CorpusChain) -> str:
    """Return what tells a finished corpus: all steps with their inputs, and the tokenizer."""
    given = Tokenizer.load(Path(recipe.tokenizer).expanduser()).fingerprint if recipe.tokenizer else None
    return f"{corpus.chain.key}-{given or recipe.vocab_size}"


def not_installed(recipe: CorpusRecipe) -> dict[str, list[str]]:
    """Return the packages that sources name and this interpreter lacks, by source."""
    absent = {
        source.name: [package for package in source.packages if installed_version(package) is None]
        for source in recipe.sources
        if source.reader == "installed"
    }
    return {name: packages for name, packages in absent.items() if packages}


def fetch(recipe: CorpusRecipe, downloads: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Download what the sources need and return versions and hashes for the manifest."""
    fetched: dict[str, Any] = {}
    for source in recipe.sources:
        if source.reader == "sdists":
            archives = [a for each in sdist_archives(source.path, source.packages, downloads).values() for a in each]
            report(f"{source.name}: {len(archives)} source distributions")
            fetch_sdists(archives, downloads)
            fetched[source.name] = describe_downloads(archives)
        elif source.reader == "debian":
            report(f"{source.name}: {len(source.packages)} Debian packages")
            fetched[source.name] = fetch_debian(source.packages, downloads)
    return fetched


def describe(recipe: CorpusRecipe, corpus: CorpusChain, fetched: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest's account: recipe, versions, units, and what went in and out of every step and why."""
    units = [unit for task in load_plan(corpus.plan) for unit in task]
    compared = evaluation_files(recipe.decontamination.files)
    steps = []
    for account in corpus.accounts:
        dropped = {reason: entry for folder in account.drops for reason, entry in merge_drops(folder).items()}
        steps.append({"step": account.name, "out": merge_tallies(account.out), "dropped": dropped})
    return {
        "glm45": __version__,
        "recipe": to_dict(recipe),
        "libraries": {name: version(name) for name in LIBRARIES},
        "downloads": fetched,
        "units": [
            {"source": unit.source, "package": unit.package, "version": unit.version, "license": unit.license}
            for unit in sorted(units, key=lambda unit: (unit.source, unit.package))
        ],
        "not_installed": not_installed(recipe),
        "decontamination": {
            "compared": {path.name: sum(1 for _ in evaluation_items(path)) for path in compared},
            "not_compared": recipe.decontamination.not_compared,
        },
        "documents": os.path.relpath(corpus.documents, corpus.chain.work.parent),
        "steps": steps,
        "scorers": {name: json.loads((corpus.scorers / f"{name}.json").read_text()) for name in SCORERS},
        "thresholds": json.loads(corpus.thresholds.read_text()),
        "mixture": {"repeats": {f"*.{recipe.quality.buckets[-1]}": recipe.quality.top_repeats}},
    }


def _built_key(manifest: Path) -> str | None:
    try:
        return json.loads(manifest.read_text())["key"]
    except (OSError, ValueError, KeyError):
        return None


def _check_space(out: Path) -> None:
    free = shutil.disk_usage(out).free
    if free < MIN_FREE_BYTES:
        raise OSError(f"{out}: {free / 1e6:.0f} MB free, a build needs at least {MIN_FREE_BYTES / 1e6:.0f} MB")


def _tokenize(recipe: CorpusRecipe, documents: Path, out: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Tokenize the documents, unless the recipe leaves that to a later step, and return the manifest's entries."""
    if not (recipe.vocab_size or recipe.tokenizer):
        return {"datasets": {}}
    started = time.monotonic()
    entries = tokenize_datasets(
        documents,
        out,
        vocab_size=recipe.vocab_size,
        workers=recipe.executor.workers,
        tokenizer=Path(recipe.tokenizer).expanduser() if recipe.tokenizer else None,
    )
    report(f"tokenize: {time.monotonic() - started:.1f} s")
    return entries
