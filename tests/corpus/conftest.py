import pytest
from datatrove.data import Document

from glm45.corpus import dedup
from glm45.corpus.dedup import MinHash


@pytest.fixture
def make_document():
    """Builds a document with the metadata that the pipeline's steps rely on."""

    def make(text, kind="prose", language="en", package="p", path="a.rst", **metadata):
        about = {"source": "s", "kind": kind, "language": language, "license": "l", "package": package, "version": "1"}
        return Document(text, f"s/{package}/{path}", metadata=about | {"path": path, "has_code": False} | metadata)

    return make


@pytest.fixture
def deduplicated(tmp_path):
    """Runs the whole of both removals, exact and MinHash, over documents of several tasks; returns the kept ones."""

    def run(tasks):
        config = MinHash()
        for rank, documents in enumerate(tasks):
            dedup.exact_signature(tmp_path / "exact").run(documents, rank)
        dedup.exact_find(tmp_path / "exact", tmp_path / "found").run()
        survivors = []
        for rank, documents in enumerate(tasks):
            kept = list(dedup.exact_filter(tmp_path / "found", tmp_path / "drops").run(iter(documents), rank))
            survivors.append(kept)
            data = iter(kept)
            for step in dedup.minhash_signature(tmp_path / "near", config):
                data = step.run(data, rank)
        for bucket in range(config.num_buckets):
            dedup.minhash_buckets(tmp_path / "near", tmp_path / "pairs", config).run(None, bucket, config.num_buckets)
        dedup.minhash_cluster(tmp_path / "pairs", tmp_path / "remove", config).run()
        return [
            document
            for rank, kept in enumerate(survivors)
            for document in dedup.minhash_filter(tmp_path / "remove", tmp_path / "drops").run(iter(kept), rank)
        ]

    return run
