"""The quality recipe against the unfiltered mix at equal tokens: on what does a tiny model reach the lower loss?

A proof: `pytest -m proof tests/corpus/test_study.py`, about twenty minutes on one core. The folder GLM45_STUDY keeps
corpus and runs, so that a stopped study goes on; GLM45_DOWNLOADS holds archives fetched before. Results go to the log.
"""

import dataclasses
import json
import os
import statistics
from contextlib import ExitStack
from pathlib import Path

import pytest

from glm45.config import override
from glm45.corpus.build import build
from glm45.corpus.document import FOUND_KINDS, DropLog, reader
from glm45.corpus.pipeline import corpus_chain
from glm45.corpus.quality import scorer_of
from glm45.corpus.read import load_plan, read_documents
from glm45.corpus.recipe import demo
from glm45.corpus.tokenize import tokenize_folder
from glm45.data.mixture import Mixture
from glm45.data.splits import is_held_out
from glm45.model.config import preset
from glm45.text.tokenizer import Tokenizer
from glm45.training.checkpoint import Retention
from glm45.training.evaluation import EvaluationConfig
from glm45.training.loop import train
from glm45.training.metrics import read_record
from glm45.training.optimizers import OptimizerConfig
from glm45.training.run import Run, TrainConfig
from glm45.training.schedule import LearningRate
from glm45.training.stages import Stage

SEEDS = (0, 1, 2)
STEPS, BATCH, LENGTH = 400, 2048, 256
HELD_OUT = 0.04
ARMS = {
    "quality": Mixture(weights={"kept-*": 1.0}, repeats={"*.high": 3.2}),
    "unfiltered": Mixture(weights={"raw-*": 1.0}),
}
MODEL = dataclasses.replace(
    preset("demo"), hidden_size=64, intermediate_size=192, moe_intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, rope_theta=10_000.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Path(os.environ.get("GLM45_STUDY") or tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def data(folder):
    """Both arms' documents and the held-out ones, as one data folder with the tokenizer of the filtered corpus."""
    recipe = override(demo(), ["vocab_size=2048", f"held_out_fraction={HELD_OUT}", "fill_in_the_middle.rate=0"])
    recipe = dataclasses.replace(recipe, downloads=os.environ.get("GLM45_DOWNLOADS", ""))
    corpus, documents = folder / "corpus", folder / "documents"
    manifest = json.loads(build(recipe, corpus).read_text())
    if not (folder / "manifest.json").exists():
        documents.mkdir(exist_ok=True)
        write_filtered(corpus / manifest["documents"], manifest["thresholds"], documents)
        write_unfiltered(recipe, corpus, documents)
        tokenize_folder(documents, folder, vocab_size=0, workers=1, tokenizer=corpus / "tokenizer")
    return folder


def write_filtered(found: Path, thresholds, documents: Path):
    """What the recipe keeps, as `kept-*`; held-out documents with the score of a top bucket, as `good-*`."""
    with Writers(documents) as writers:
        for document in reader(found).run():
            metadata = document.metadata
            if metadata["kind"] not in FOUND_KINDS:
                continue
            scorer = scorer_of(metadata["kind"], metadata["language"])
            edges = thresholds.get(f"{scorer}/{metadata['language']}") or thresholds[scorer]
            if metadata["bucket"] != "heldout":
                writers.write(f"kept-{metadata['source']}-{metadata['kind']}.{metadata['bucket']}", document)
            elif metadata["quality"] >= edges[-1]:
                writers.write(f"good-{metadata['source']}-{metadata['kind']}.heldout", document)


def write_unfiltered(recipe, corpus: Path, documents: Path):
    """Everything that the same sources hold, before any rule, as `raw-*`; of it, what is held out, as `any-*`.

    Copies of held-out texts are left out of `raw-*`: it is not deduplicated, and would be asked what it has read.
    """
    chain = corpus_chain(recipe, corpus / "work", Path(recipe.downloads or corpus / "work" / "downloads"))
    sources = {source.name: source for source in recipe.sources}
    held_out, training = [], []
    with DropLog(corpus / "unread") as log:
        for unit in (unit for task in load_plan(chain.plan) for unit in task):
            for document in read_documents(
                sources[unit.source], unit, log, recipe.repositories, recipe.held_out_fraction, recipe.seed
            ):
                if (kind := document.metadata["kind"]) in FOUND_KINDS:
                    found = held_out if is_held_out(document.id, HELD_OUT) else training
                    found.append((f"{unit.source}-{kind}", document))
    known = {document.text for _, document in held_out}
    with Writers(documents) as writers:
        for name, document in held_out:
            writers.write(f"any-{name}.heldout", document)
        for name, document in training:
            if document.text not in known:
                writers.write(f"raw-{name}.medium", document)


class Writers(ExitStack):
    """One JSONL file a dataset."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.files = folder, {}

    def write(self, dataset, document):
        if dataset not in self.files:
            self.files[dataset] = self.enter_context((self.folder / f"{dataset}.jsonl").open("w"))
        self.files[dataset].write(json.dumps({"text": document.text}) + "\n")


def config(data: Path, arm: str, seed: int) -> TrainConfig:
    stage = Stage(
        name="general", tokens=STEPS * BATCH, sequence_length=LENGTH, batch_tokens=BATCH, mixture=ARMS[arm],
        router_bias_rate=0.01,
    )  # fmt: skip
    model = dataclasses.replace(MODEL, vocab_size=Tokenizer.load(data / "tokenizer").padded_vocab_size)
    return TrainConfig(
        name="study", model=model, stages=(stage,), data=str(data), seed=seed,
        learning_rate=LearningRate(peak=1e-2, final=1e-3, warmup_fraction=0.05),
        optimizer=OptimizerConfig(adamw_ratio=0.5), micro_batch_tokens=BATCH, checkpoints=Retention(every=100),
        evaluation=EvaluationConfig(every=STEPS, rows=32), log_every=100,
    )  # fmt: skip


@pytest.mark.proof
@pytest.mark.timeout(7200)
def test_quality_recipe_against_unfiltered_mix(data):
    """Final losses on held-out documents of the top bucket (`good-*`) and on all held-out ones (`any-*`), by source."""
    finals = {}
    for seed in SEEDS:
        for arm in ARMS:
            run = Run.open(data / "runs" / f"{arm}{seed}", config(data, arm, seed))
            train(run)
            finals[arm, seed] = [e for e in read_record(run.folder) if e.get("event") == "evaluation"][-1]
    for held_out in ("good", "any"):
        sources = [name for name in finals["quality", 0] if name.startswith(f"{held_out}-")]
        print(f"\n{held_out}: {', '.join(sources)}")
        differences = []
        for seed in SEEDS:
            means = {arm: statistics.mean(finals[arm, seed][name] for name in sources) for arm in ARMS}
            differences.append(means["quality"] - means["unfiltered"])
            print(f"seed {seed}: " + ", ".join(f"{arm} {mean:.4f}" for arm, mean in means.items()))
        spread = statistics.stdev(differences)
        print(f"quality - unfiltered: {statistics.mean(differences):+.4f} +- {spread:.4f} (deviation over seeds)")
        for name in sources:
            print(name, *(f"{finals['quality', s][name] - finals['unfiltered', s][name]:+.3f}" for s in SEEDS))
