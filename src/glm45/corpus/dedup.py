"""Exact and near duplicates with datatrove: content hashes, then MinHash.

Both run in datatrove's three parts: signatures beside the documents (a task each), a merge that finds pairs, and a
filter. Only the signature is ours, because datatrove's hashes word n-grams one by one in Python.
Shapes: W words, S shingles, H hashes.
"""

import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig

from glm45.config import configuration
from glm45.corpus.document import FOUND_KINDS, WORDS, DropLog

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_TOKEN = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\d_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|\d+(?:[.,]\d+)?"
)
_ACCENT = re.compile(r"[\u0300-\u036f]")
MAX_CACHED_WORDS = 1 << 17  # about 30 MB a process


@configuration
class MinHash:
    """Near duplicates by shared word n-grams. The report names MinHash and gives no numbers."""

    words_per_shingle: int = 5
    """Length of the n-grams compared. Not in the report."""
    num_buckets: int = 14
    """Bands of the locality-sensitive hash. Not in the report."""
    hashes_per_bucket: int = 8
    """Hashes that must all agree in a band; with 14 bands, pairs from a Jaccard similarity of 0.72 on are likely
    found (92 % at 0.8). Not in the report."""
    seed: int = 1
    """Seed of the hash family. Not in the report."""

    def to_datatrove(self) -> MinhashConfig:
        """The same as datatrove's configuration."""
        return MinhashConfig(
            n_grams=self.words_per_shingle,
            num_buckets=self.num_buckets,
            hashes_per_bucket=self.hashes_per_bucket,
            seed=self.seed,
        )


def normalised_text(document: Document) -> bytes:
    """Return what two documents must share to be exact duplicates: their text up to white space."""
    return hashlib.blake2b(" ".join(document.text.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def newest_first(document: Document) -> int:
    """Return the priority of a document among exact duplicates: prose before code that embeds it, else equal."""
    return 2 if document.metadata["kind"] == "prose" else 1


EXACT = ExactDedupConfig(content_getter=normalised_text, document_priority=newest_first)


def exact_signature(folder: Path) -> ExactDedupSignature:
    """Write content hashes of a task's documents; ends a pipeline."""
    return ExactDedupSignature(str(folder), EXACT)


def exact_find(signatures: Path, duplicates: Path) -> ExactFindDedups:
    """Find documents with equal content hashes; one task."""
    return ExactFindDedups(str(signatures), str(duplicates), EXACT)


def exact_filter(duplicates: Path, drops: Path) -> ExactDedupFilter:
    """Remove all but one of every group of exact duplicates."""
    return ExactDedupFilter(str(duplicates), EXACT, DropLog(drops, "exact duplicate"))


def minhash_signature(folder: Path, config: MinHash) -> list[PipelineStep]:
    """Write MinHash signatures of a task's found documents; ends a pipeline."""
    return [HideMadeDocuments(), FastMinhashSignature(str(folder), config.to_datatrove(), language=WORDS)]


class HideMadeDocuments(PipelineStep):
    """Passes made documents on without their text, which leaves them without a signature.

    Worked exercises differ in their numbers, which MinHash does not look at: all but a handful would go.
    """

    type = "🫂 - DEDUP"
    name = "made documents"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Keep every document's place, so that numbers still mean the same documents."""
        for document in data or ():
            if document.metadata["kind"] in FOUND_KINDS:
                yield document
            else:
                yield Document("", document.id, metadata=document.metadata)


def minhash_buckets(signatures: Path, pairs: Path, config: MinHash) -> MinhashDedupBuckets:
    """Find documents whose signatures agree in a band; as many tasks as bands."""
    return MinhashDedupBuckets(str(signatures), str(pairs), config=config.to_datatrove(), lines_to_buffer=1000)


def minhash_cluster(pairs: Path, remove: Path, config: MinHash) -> MinhashDedupCluster:
    """Join pairs to clusters and list all documents but one of each for removal; one task."""
    return MinhashDedupCluster(str(pairs), str(remove), config=config.to_datatrove(), lines_to_buffer=1000)


def minhash_filter(remove: Path, drops: Path) -> MinhashDedupFilter:
    """Remove the listed near duplicates."""
    return MinhashDedupFilter(str(remove), DropLog(drops, "near duplicate (MinHash)"))


@functools.lru_cache(maxsize=MAX_CACHED_WORDS)
def _token_hashes(word: str) -> bytes:
    """Return the hashes of what a word consists of, end to end: letters without accents, and numbers, all alike."""
    if not word.isascii():
        word = _ACCENT.sub("", unicodedata.normalize("NFD", word))
    return b"".join(xxhash.xxh64_digest(b"0" if t[0].isdigit() else t.encode()) for t in _TOKEN.findall(word))


class FastMinhashSignature(MinhashDedupSignature):
    """datatrove's MinHash signature, several times faster: words are hashed once and n-grams combined in numpy.

    The files it writes are datatrove's, so the steps after it are datatrove's own.
    """

    def get_shingles(self, text: str) -> np.ndarray:
        """Return the hashed n-grams of a text in order, uint64 [S]."""
        hashes = b"".join(map(_token_hashes, WORDS.word_tokenize(text.lower())))
        tokens_W = np.frombuffer(hashes, dtype=np.uint64)
        num_shingles = len(tokens_W) - self.config.n_grams + 1
        if num_shingles < 1:
            return np.empty(0, dtype=np.uint64)
        shingles_S = tokens_W[:num_shingles].copy()
        for offset in range(1, self.config.n_grams):
            shingles_S *= _MULTIPLIER
            shingles_S += tokens_W[offset : offset + num_shingles]
        shingles_S ^= shingles_S >> np.uint64(29)
        return shingles_S * _MULTIPLIER

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """Return the least hash of the shingles under every permutation, `num_buckets` lists of integers."""
        multipliers_H, offsets_H = (parameter.ravel() for parameter in self.parameters)
        buffer_S = np.empty_like(shingles)
        least_H = np.empty(self.num_hashes, dtype=np.uint64)
        for index in range(self.num_hashes):
            np.multiply(shingles, multipliers_H[index] | np.uint64(1), out=buffer_S)
            buffer_S += offsets_H[index]
            least_H[index] = buffer_S.min()
        return [bucket.tolist() for bucket in np.split(least_H, self.config.num_buckets)]
