"""Quality scorers: small fastText classifiers, one for each kind of text, trained in the build from labelled seeds.

    prose          English prose and web pages: would a reader learn something from this?
    multilingual   the same for other languages
    mathematics    how much of a text teaches mathematics or science
    code-python    tiers of Python files; `code` serves every other programming language
    code-related   does a page without code blocks speak of code? Its labels are the pages that have them

Seeds come from three places: short texts that the project ships (`seeds.jsonl`), labels by path of documents in the
corpus (`labels.json`; whole packages are kept for evaluation only), and a user's own file. Scores are probabilities
of the good class; buckets are quantiles of them.
"""

import fnmatch
import hashlib
import heapq
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from glm45.config import configuration
from glm45.corpus.document import FOUND_KINDS, DropLog, read_task
from glm45.corpus.features import code_line, prose_line
from glm45.data.mixture import HELD_OUT
from glm45.data.splits import is_held_out

SCORERS = ("prose", "multilingual", "mathematics", "code-python", "code", "code-related")
EVALUATED_SHARE = 0.2  # of the pages whose code blocks label them
BUCKET_NAME = re.compile(r"[A-Za-z]\w*")  # no '-' or '.': what follows one in a dataset's files is their number
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_SESSION = re.compile(r"^\s*(?:>>>|\.\.\.).*\n?", re.MULTILINE)
NUM_SEARCHED = 24_000  # characters of a page in which text beside its code blocks is looked for
MIN_GROUP = 50  # a language with fewer documents is parted by the thresholds of all that its scorer judges


@configuration
class Quality:
    """Scorers and buckets. The report has buckets, discards the lowest and repeats the highest; no number but 3.2."""

    buckets: tuple[str, ...] = ("low", "medium", "high")
    """Names of the buckets from the lowest, which is discarded, to the highest. Not in the report for prose; three
    tiers for code are."""
    quantiles: tuple[float, ...] = (0.15, 0.65)
    """Where the buckets part, as shares of the characters of a kind of text. Not in the report."""
    top_repeats: float = 3.2
    """Epochs that the highest bucket is meant for; goes to the manifest's mixture."""
    mathematics_threshold: float = 0.8
    """Documents that score higher on mathematics and science go to the highest bucket. Not in the report."""
    seeds: str = ""
    """JSONL file of further labelled examples, each with `scorer`, `text` and a `score` from 0 to 1; for example what
    `glm45 data score` wrote for documents of your own. Not in the report."""
    seed_threshold: float = 0.5
    """Score from which a seed is an example of good text. Not in the report."""
    code_related_threshold: float = 0.5
    """Probability from which a page without code blocks counts as speaking of code. Not in the report."""
    dimension: int = 16
    """Size of fastText's word vectors. Not in the report."""
    examples_shown: int = 16_000
    """Labelled examples that fastText sees, in as many passes as that takes: few seeds need more passes than many. Not
    in the report."""
    learning_rate: float = 0.1
    """fastText's learning rate. Not in the report."""
    max_examples: int = 3000
    """Most labelled documents of the corpus for one scorer. Not in the report."""

    def __post_init__(self) -> None:
        wrong = [name for name in self.buckets if not BUCKET_NAME.fullmatch(name) or name == HELD_OUT]
        if wrong:
            raise ValueError(
                f"buckets {wrong}: need letters, digits and '_' after a first letter, and {HELD_OUT!r} is taken"
            )
        if len(self.quantiles) != len(self.buckets) - 1 or list(self.quantiles) != sorted(self.quantiles):
            raise ValueError(
                f"quantiles = {self.quantiles}: need {len(self.buckets) - 1} rising numbers for {self.buckets}"
            )


def scorer_of(kind: str, language: str) -> str:
    """Return the name of the scorer that judges documents of this kind and language."""
    if kind == "code":
        return "code-python" if language == "python" else "code"
    return "prose" if language == "en" else "multilingual"


def scorers_of(document: Document) -> list[str]:
    """Return the names of all scorers that judge a document: none for one that was made, not found."""
    kind = document.metadata["kind"]
    if kind not in FOUND_KINDS:
        return []
    return [scorer_of(kind, document.metadata["language"])] + (
        ["mathematics", "code-related"] if kind != "code" else []
    )


def input_line(scorer: str, text: str) -> str:
    """Return what a scorer reads of a text."""
    if scorer == "code-related":
        return prose_line(without_code(text[:NUM_SEARCHED]))
    return code_line(text) if scorer.startswith("code") else prose_line(text)


class Labels:
    """Labels by path: patterns for training, and exact documents, labelled by reading them, for evaluation."""

    def __init__(self) -> None:
        self.rules = json.loads(resources.files("glm45.corpus").joinpath("labels.json").read_text())

    def training_label(self, scorer: str, path: str) -> int | None:
        """Return 1, 0 or None; nothing of a package that is kept for evaluation is ever trained on."""
        rules = self.rules.get(scorer)
        if rules is None or any(f"/{package}/" in f"/{path}" for package in rules["evaluation_packages"]):
            return None
        for label in (0, 1):  # a changelog inside a tutorial folder is still a changelog
            if any(fnmatch.fnmatch(path, pattern) for pattern in rules["train"][str(label)]):
                return label
        return None

    def of(self, scorer: str, path: str, document: Document) -> tuple[int | None, bool]:
        """Return a document's label, if it has one, and whether it is for measuring: read by a person, or held out."""
        if scorer == "code-related":  # found, not read: pages with code blocks, which are taken out
            return int(document.metadata["has_code"]), is_held_out(path, EVALUATED_SHARE)
        read = self.rules.get(scorer, {}).get("evaluation", {}).get(path)
        return (self.training_label(scorer, path), False) if read is None else (read, True)


def path_of(document: Document) -> str:
    """Return `package/path`, by which labels know a document whatever its source is called."""
    return document.id.partition("/")[2]


class TrainScorers(PipelineStep):
    """Trains every scorer and measures it; one task that scans the documents of all tasks."""

    type = "🎓 - TRAIN"
    name = "quality scorers"

    def __init__(self, documents: Path, num_tasks: int, config: Quality, folder: Path, seed: int) -> None:
        super().__init__()
        self.documents, self.num_tasks, self.config, self.folder, self.seed = documents, num_tasks, config, folder, seed

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Write `<scorer>.bin` and `<scorer>.json`, its measures, for this task's share of the scorers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        scorers = SCORERS[rank::world_size]
        training, evaluation = self._collect(scorers)
        for scorer in scorers:
            examples = [(line, label) for _, line, label in training[scorer].all()]
            examples += labelled_seeds(scorer, self.config)
            model = train(examples, self.folder / f"{scorer}.bin", self.config, self.seed)
            measures = {"examples": len(examples)} | measure(model, evaluation[scorer].all())
            (self.folder / f"{scorer}.json").write_text(json.dumps(measures))

    def _collect(self, scorers: Sequence[str]) -> tuple[dict[str, "Examples"], dict[str, "Examples"]]:
        """Return what each scorer is to be trained on, and measured on."""
        labels = Labels()
        training, evaluation = (
            {scorer: Examples(scorer, self.config.max_examples) for scorer in scorers} for _ in range(2)
        )
        for task in range(self.num_tasks):
            for document in read_task(self.documents, task):
                path = path_of(document)
                for scorer in set(scorers_of(document)) & training.keys():
                    label, measured = labels.of(scorer, path, document)
                    if label is not None:
                        (evaluation if measured else training)[scorer].offer(path, document.text, label)
        return training, evaluation


class Examples:
    """Labelled documents as a scorer reads them: the `size` whose paths have the least hashes, in whatever order."""

    def __init__(self, scorer: str, size: int) -> None:
        self.scorer, self.size = scorer, size
        self._heap: list[tuple[int, str, str, int]] = []  # the greatest hash first, so negative

    def offer(self, path: str, text: str, label: int) -> None:
        """Take the document if the hash of its path is among the least so far."""
        rank = -int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big")
        if len(self._heap) < self.size or rank > self._heap[0][0]:
            example = (rank, path, input_line(self.scorer, text), label)
            (heapq.heappushpop if len(self._heap) == self.size else heapq.heappush)(self._heap, example)

    def all(self) -> list[tuple[str, str, int]]:
        """Return `(path, line, label)` of every document taken."""
        return [example[1:] for example in sorted(self._heap)]


def label_files(users_file: str) -> list[Path | Traversable]:
    """Return the files that say what scorers learn, the user's seeds among them if there are any."""
    shipped = [resources.files("glm45.corpus").joinpath(name) for name in ("labels.json", "seeds.jsonl")]
    return [*shipped, *([Path(users_file).expanduser()] if users_file else [])]


def labelled_seeds(scorer: str, config: Quality) -> Iterator[tuple[str, int]]:
    """Yield `(line, label)` of the seeds that the project ships and of the user's own.

    Raises ValueError, naming the line, for a seed without scorer, text or score.
    """
    for file in label_files(config.seeds)[1:]:
        for number, line in enumerate(file.read_text(encoding="utf-8").strip().split("\n"), 1):
            try:
                seed = json.loads(line)
                if seed["scorer"] == scorer:
                    yield input_line(scorer, seed["text"]), int(float(seed["score"]) >= config.seed_threshold)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file.name}, line {number}: {error!r}; a seed needs scorer, text and score"
                ) from None


def train(examples: list[tuple[str, int]], path: Path, config: Quality, seed: int) -> Any:
    """Train a classifier on `(line, label)` with both classes weighted equally, save it and return it.

    Raises ValueError if a class has no example.
    """
    import fasttext

    by_label = {label: [line for line, given in examples if given == label] for label in (0, 1)}
    if not by_label[0] or not by_label[1]:
        raise ValueError(f"scorer {path.stem}: {len(by_label[1])} good and {len(by_label[0])} bad seeds, need both")
    size = max(map(len, by_label.values()))
    balanced = [(lines[i % len(lines)], label) for label, lines in by_label.items() for i in range(size)]
    random.Random(seed).shuffle(balanced)
    text = path.with_suffix(".txt")
    text.write_text("".join(f"__label__{label} {line}\n" for line, label in balanced))
    model = fasttext.train_supervised(
        str(text),
        dim=config.dimension,
        epoch=max(1, round(config.examples_shown / len(balanced))),
        lr=config.learning_rate,
        minCount=2,
        bucket=0,
        thread=1,  # with more, the weights depend on who was first
        seed=seed,
        verbose=0,
    )
    model.save_model(str(path))
    text.unlink()
    return model


def score(model: Any, lines: Iterable[str]) -> list[float]:
    """Return the probability of the good class of every line."""
    scores = []
    for line in lines:
        labels, probabilities = model.predict(line, k=2)
        scores.append(float(min(dict(zip(labels, probabilities, strict=True)).get("__label__1", 0.0), 1.0)))
    return scores


def measure(model: Any, evaluation: list[tuple[str, str, int]]) -> dict[str, Any]:
    """Return the area under the curve on `(path, line, label)` that were not trained on, with every score."""
    scores = np.array(score(model, [line for _, line, _ in evaluation]))
    labels = np.array([label for _, _, label in evaluation])
    good_G1, bad_B = scores[labels == 1][:, None], scores[labels == 0]
    auc = None if not good_G1.size or not bad_B.size else np.mean((good_G1 > bad_B) + 0.5 * (good_G1 == bad_B))
    judged = [
        {"path": path, "label": label, "score": round(float(found), 4)}
        for (path, _, label), found in zip(evaluation, scores, strict=True)
    ]
    return {
        "auc": auc if auc is None else round(float(auc), 4),
        "good": len(good_G1),
        "bad": len(bad_B),
        "judged": sorted(judged, key=lambda row: -row["score"]),
    }


def without_code(text: str) -> str:
    """Return a page without its code blocks and interpreter sessions."""
    return _SESSION.sub("", _FENCED.sub("", text))


def bucket_thresholds(rows_N3: np.ndarray, groups: list[str], config: Quality) -> dict[str, list[float]]:
    """Return the scores at which the buckets part, by scorer and by `scorer/language`.

    A row holds score, group and characters of a document; quantiles are of characters, so that a bucket's share of the
    corpus is what the recipe says.
    """
    thresholds = {}
    for scorer in sorted({group.partition("/")[0] for group in groups}):
        members = [index for index, group in enumerate(groups) if group.partition("/")[0] == scorer]
        for name, chosen in [(scorer, members), *((groups[index], [index]) for index in members)]:
            here_M3 = rows_N3[np.isin(rows_N3[:, 1], chosen)]
            if len(here_M3) >= (1 if name == scorer else MIN_GROUP):
                thresholds[name] = _weighted_quantiles(here_M3[:, 0], here_M3[:, 2], config.quantiles)
    return thresholds


def _weighted_quantiles(values_M: np.ndarray, weights_M: np.ndarray, quantiles: tuple[float, ...]) -> list[float]:
    order = np.argsort(values_M, kind="stable")
    reached = np.cumsum(weights_M[order]) / weights_M.sum()
    last = len(order) - 1
    return [float(values_M[order][min(int(np.searchsorted(reached, q)), last)]) for q in quantiles]


class AssignBuckets(BaseFilter):
    """Gives every scored document its bucket and removes the lowest one."""

    name = "🪣 buckets"

    def __init__(self, thresholds: Path, config: Quality, drops: Path) -> None:
        super().__init__(DropLog(drops))
        self.thresholds_path, self.config = thresholds, config

    @cached_property
    def _thresholds(self) -> dict[str, list[float]]:
        return json.loads(self.thresholds_path.read_text())

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Say whether `doc` is above the lowest bucket."""
        metadata = doc.metadata
        if "quality" not in metadata:
            metadata.setdefault("bucket", "medium")
            return True
        scorer = scorer_of(metadata["kind"], metadata["language"])
        edges = self._thresholds.get(f"{scorer}/{metadata['language']}") or self._thresholds[scorer]
        metadata["bucket"] = self.config.buckets[sum(metadata["quality"] >= edge for edge in edges)]
        if metadata.get("mathematics", 0) >= self.config.mathematics_threshold and sum(
            metadata["quality"] >= edge for edge in edges
        ):
            metadata["bucket"] = self.config.buckets[-1]
        if metadata["bucket"] == self.config.buckets[0]:
            return False, f"lowest bucket of {scorer}"
        return True


class Score(PipelineStep):
    """Writes `quality` and, for prose, `mathematics` and `code_related` into the metadata of scored documents."""

    type = "🎓 - SCORE"
    name = "quality"

    def __init__(self, models: Path, code_related_threshold: float) -> None:
        super().__init__()
        self.models, self.code_related_threshold = models, code_related_threshold

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Pass documents on with their scores."""
        import fasttext

        models = {scorer: fasttext.load_model(str(self.models / f"{scorer}.bin")) for scorer in SCORERS}
        for document in data or ():
            metadata = document.metadata
            for scorer, field in zip(scorers_of(document), ("quality", "mathematics", "code_related"), strict=False):
                metadata[field] = round(score(models[scorer], [input_line(scorer, document.text)])[0], 5)
            if "code_related" in metadata:
                related = metadata["code_related"] >= self.code_related_threshold
                metadata["code_related"] = metadata["has_code"] or related
            yield document
