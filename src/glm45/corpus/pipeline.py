"""The chain of steps of a corpus, from sources to documents by dataset."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from glm45.config import to_dict
from glm45.corpus import dedup
from glm45.corpus.decontaminate import Decontaminate, evaluation_files
from glm45.corpus.document import DropLog, Tally, TaskReader, dataset_writer, writer
from glm45.corpus.fim import FillInTheMiddleStep
from glm45.corpus.inputs import content_hashes, file_stamps, source_stamp
from glm45.corpus.quality import AssignBuckets, Score, TrainScorers, label_files
from glm45.corpus.read import Plan, ReadUnits, RequireDocuments
from glm45.corpus.recipe import CorpusRecipe
from glm45.corpus.repositories import RepositoryContexts
from glm45.corpus.rules import RuleFilter
from glm45.corpus.semantic import Embed, FindSemanticDuplicates, FitEmbedder, RemoveSemanticDuplicates
from glm45.corpus.steps import Chain
from glm45.data.splits import is_held_out


@dataclass(frozen=True)
class Account:
    """Where a step left its counts: what came out, and what was dropped and why."""

    name: str
    out: Path
    drops: tuple[Path, ...]


@dataclass(frozen=True)
class CorpusChain:
    """The chain, and where its results and accounts lie."""

    chain: Chain
    plan: Path
    documents: Path
    scorers: Path
    thresholds: Path
    accounts: tuple[Account, ...]


def corpus_chain(recipe: CorpusRecipe, work: Path, downloads: Path) -> CorpusChain:
    """Return the steps of a recipe on its inputs as they are now. Nothing is written before the chain runs.

    Raises ValueError for a package that a manifest lacks and for evaluation files that are not there.
    """
    stamps = [source_stamp(source, downloads) for source in recipe.sources]
    chain = Chain(work, [to_dict(recipe)["sources"], stamps, to_dict(recipe.repositories), recipe.seed])
    plan, read = _add_reading(chain, recipe, downloads)
    exact, unique = _add_deduplication(chain, recipe, read)
    fitted, scored = _add_scoring(chain, recipe, unique)
    lists = chain.add(
        "semdedup",
        1,
        lambda folder: [
            FindSemanticDuplicates(
                scored / "embeddings", recipe.num_tasks, recipe.semdedup, recipe.quality, folder, recipe.seed
            )
        ],
        [to_dict(recipe.semdedup), to_dict(recipe.quality)],
    )
    finish = chain.add(
        "finish",
        recipe.num_tasks,
        lambda folder: [
            TaskReader(scored / "documents"),
            RemoveSemanticDuplicates(lists, folder / "semantic"),
            Tally(folder / "unique"),
            AssignBuckets(lists / "thresholds.json", recipe.quality, folder / "low"),
            AssignDataset(recipe.held_out_fraction, recipe.long_characters),
            RepositoryContexts(recipe.repositories),
            AssignDataset(recipe.held_out_fraction, recipe.long_characters),
            Tally(folder / "out"),
            FillInTheMiddleStep(recipe.fill_in_the_middle, recipe.seed),
            dataset_writer(folder / "documents"),
        ],
        [recipe.long_characters, to_dict(recipe.fill_in_the_middle)],
    )
    accounts = (
        Account("read", read / "in", (read / "skipped",)),
        Account("rules", read / "out", (read / "drops",)),
        Account("exact duplicates", exact / "out", (exact / "drops",)),
        Account("MinHash", unique / "near-out", (unique / "near",)),
        Account("decontamination", unique / "out", (unique / "contaminated",)),
        Account("SemDedup", finish / "unique", (finish / "semantic",)),
        Account("buckets and contexts", finish / "out", (finish / "low",)),
    )
    return CorpusChain(chain, plan, finish / "documents", fitted, lists / "thresholds.json", accounts)


def _add_reading(chain: Chain, recipe: CorpusRecipe, downloads: Path) -> tuple[Path, Path]:
    """Units are shared out and read; returns the file of the plan and the folder of what was read."""
    planned = chain.add(
        "plan",
        1,
        lambda folder: [Plan(recipe.sources, downloads, recipe.num_tasks, folder / "plan.json")],
        recipe.num_tasks,
    )
    plan = planned / "plan.json"
    read = chain.add(
        "read",
        recipe.num_tasks,
        lambda folder: [
            ReadUnits(
                recipe.sources, plan, folder / "skipped", recipe.repositories, recipe.held_out_fraction, recipe.seed
            ),
            Tally(folder / "in"),
            RuleFilter(recipe.rules, DropLog(folder / "drops")),
            Tally(folder / "out"),
            writer(folder / "documents"),
            dedup.exact_signature(folder / "signatures"),
        ],
        [to_dict(recipe.rules), recipe.held_out_fraction],
    )
    return plan, read


def _add_deduplication(chain: Chain, recipe: CorpusRecipe, read: Path) -> tuple[Path, Path]:
    """Exact duplicates, then MinHash and decontamination; returns the folders of what each leaves."""
    hashing = recipe.minhash
    found = chain.add(
        "exact-find",
        1,
        lambda folder: [
            RequireDocuments(recipe.sources, read / "in", read / "skipped"),
            dedup.exact_find(read / "signatures", folder / "duplicates"),
        ],
    )
    exact = chain.add(
        "exact",
        recipe.num_tasks,
        lambda folder: [
            TaskReader(read / "documents"),
            dedup.exact_filter(found / "duplicates", folder / "drops"),
            Tally(folder / "out"),
            *dedup.minhash_signature(folder / "signatures", hashing),
        ],
        to_dict(hashing),
    )
    bands = chain.add(
        "minhash-pairs",
        hashing.num_buckets,
        lambda folder: [dedup.minhash_buckets(exact / "signatures", folder / "pairs", hashing)],
    )
    clusters = chain.add(
        "minhash-cluster", 1, lambda folder: [dedup.minhash_cluster(bands / "pairs", folder / "remove", hashing)]
    )
    unique = chain.add(
        "unique",
        recipe.num_tasks,
        lambda folder: [
            TaskReader(read / "documents"),
            dedup.exact_filter(found / "duplicates", folder / "exact"),  # again: reading costs less than writing
            dedup.minhash_filter(clusters / "remove", folder / "near"),
            Tally(folder / "near-out"),
            Decontaminate(recipe.decontamination, folder / "contaminated"),
            Tally(folder / "out"),
            writer(folder / "documents"),
        ],
        [
            _without(recipe.decontamination, "files", "not_compared"),
            content_hashes(evaluation_files(recipe.decontamination.files)),
        ],
    )
    return exact, unique


def _add_scoring(chain: Chain, recipe: CorpusRecipe, unique: Path) -> tuple[Path, Path]:
    """Scorers and embedder are fitted, then applied; returns the folders of models and of scored documents."""
    documents, tasks = unique / "documents", recipe.num_tasks
    fitted = chain.add(
        "fit",
        2,  # tasks; each trains half of the scorers
        lambda folder: [
            TrainScorers(documents, tasks, recipe.quality, folder, recipe.seed),
            FitEmbedder(documents, tasks, recipe.semdedup, folder, recipe.seed),
        ],
        [
            _without(
                recipe.quality, "buckets", "quantiles", "top_repeats", "mathematics_threshold", "code_related_threshold"
            ),
            _without(recipe.semdedup, "documents_per_cluster", "threshold"),
            content_hashes(label_files(recipe.quality.seeds)),
            file_stamps(recipe.semdedup.model),
        ],
    )
    scored = chain.add(
        "scored",
        tasks,
        lambda folder: [
            TaskReader(documents),
            Score(fitted, recipe.quality.code_related_threshold),
            Embed(fitted, recipe.semdedup, folder / "embeddings"),
            writer(folder / "documents"),
        ],
        recipe.quality.code_related_threshold,
    )
    return fitted, scored


def _without(config: Any, *later: str) -> dict[str, Any]:
    """Return the settings of a configuration but for those that only a later step reads."""
    return {key: value for key, value in to_dict(config).items() if key not in later}


class AssignDataset(PipelineStep):
    """Says which dataset a document goes to: `<source>-<kind>.<bucket>`, or `.heldout` by hash.

    Web pages that speak of code are of kind `codeweb`, and documents of at least `long_characters` get `-long` before
    the bucket, so that a mixture can up-sample them.
    """

    type = "🗂 - SORT"
    name = "dataset"

    def __init__(self, held_out_fraction: float, long_characters: int) -> None:
        super().__init__()
        self.held_out_fraction, self.long_characters = held_out_fraction, long_characters

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Set `bucket` and `dataset` of every document."""
        for document in data or ():
            metadata = document.metadata
            if "prompt" in metadata:  # divided as environments and evaluation divide the same questions
                held_out = is_held_out(metadata.get("question") or metadata["prompt"])
            else:
                held_out = metadata["kind"] != "repository" and is_held_out(document.id, self.held_out_fraction)
            if held_out:
                metadata["bucket"] = "heldout"
            kind = "codeweb" if metadata["kind"] == "web" and metadata.get("code_related") else metadata["kind"]
            long = "-long" if "quality" in metadata and len(document.text) >= self.long_characters else ""
            if metadata["bucket"] == "heldout":
                kind, long = metadata["kind"], ""
            metadata["dataset"] = f"{metadata['source']}-{kind}{long}.{metadata['bucket']}"
            yield document
