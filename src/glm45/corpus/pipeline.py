"""The chain of steps of a corpus, from sources to documents by dataset."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from glm45.config import to_dict
from glm45.corpus import dedup
from glm45.corpus.document import DropLog, Tally, TaskReader, writer
from glm45.corpus.read import Plan, ReadUnits
from glm45.corpus.recipe import CorpusRecipe
from glm45.corpus.rules import RuleFilter
from glm45.corpus.steps import Chain
from glm45.data.splits import is_held_out


@dataclass(frozen=True)
class CorpusChain:
    """The chain, and the folder of every step that leaves something for the manifest, in order."""

    chain: Chain
    folders: dict[str, Path]


def corpus_chain(recipe: CorpusRecipe, work: Path, downloads: Path) -> CorpusChain:
    """Return the steps of a recipe. Pure: nothing is read or written before the chain runs."""
    chain = Chain(work, [to_dict(recipe)["sources"], recipe.seed])
    tasks, hashing = recipe.num_tasks, recipe.minhash
    plan = work / f"plan-{chain.key}.json"
    chain.add("plan", 1, lambda folder: [Plan(recipe.sources, downloads, tasks, plan)])
    read = chain.add(
        "read",
        tasks,
        lambda folder: [
            ReadUnits(recipe.sources, plan, folder / "skipped", recipe.seed),
            Tally(folder / "in"),
            RuleFilter(recipe.rules, DropLog(folder / "drops")),
            Tally(folder / "out"),
            writer(folder / "documents"),
            dedup.exact_signature(folder / "signatures"),
        ],
        recipe.rules,
    )
    pairs = chain.add("exact-find", 1, lambda folder: [dedup.exact_find(read / "signatures", folder / "duplicates")])
    exact = chain.add(
        "exact",
        tasks,
        lambda folder: [
            TaskReader(read / "documents"),
            dedup.exact_filter(pairs / "duplicates", folder / "drops"),
            Tally(folder / "out"),
            writer(folder / "documents"),
            dedup.minhash_signature(folder / "signatures", hashing),
        ],
        hashing,
    )
    bands = chain.add(
        "minhash-pairs",
        hashing.num_buckets,
        lambda folder: [dedup.minhash_buckets(exact / "signatures", folder / "pairs", hashing)],
    )
    clusters = chain.add(
        "minhash-cluster", 1, lambda folder: [dedup.minhash_cluster(bands / "pairs", folder / "remove", hashing)]
    )
    finish = chain.add(
        "finish",
        tasks,
        lambda folder: [
            TaskReader(exact / "documents"),
            dedup.minhash_filter(clusters / "remove", folder / "drops"),
            AssignDataset(recipe.held_out_fraction),
            Tally(folder / "out"),
            writer(folder / "documents", "${dataset}/${rank}.jsonl"),
        ],
        recipe.held_out_fraction,
    )
    return CorpusChain(chain, {"read": read, "exact": exact, "finish": finish})


class AssignDataset(PipelineStep):
    """Says which dataset a document goes to: `<source>.<bucket>`, or `<source>.heldout` by the hash of its id."""

    type = "🗂 - SORT"
    name = "dataset"

    def __init__(self, held_out_fraction: float) -> None:
        super().__init__()
        self.held_out_fraction = held_out_fraction

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Set `bucket` and `dataset` of every document."""
        for document in data or ():
            metadata = document.metadata
            prompt = metadata.get("prompt", document.id)
            held_out = is_held_out(prompt, self.held_out_fraction)
            metadata["bucket"] = "heldout" if held_out else metadata.get("bucket", "medium")
            metadata["dataset"] = f"{metadata['source']}.{metadata['bucket']}"
            yield document
