"""Data folders for the tests of this room."""

import numpy as np
import pytest

from glm45.data.folder import update_manifest
from glm45.data.shards import ShardWriter


def random_documents(rng, count, mean, first_token=0):
    """Documents of log-normal lengths whose tokens count on, so that every token tells where it is from."""
    lengths = np.maximum(1, np.exp(rng.normal(np.log(mean), 1.0, count)).astype(int))
    tokens = (first_token + np.arange(lengths.sum())).astype(np.int32)
    return np.split(tokens, np.cumsum(lengths)[:-1])


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """Three datasets to train on and one held out. Token values are unique over all of them."""
    path = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    entries, first = {}, 0
    for name, count, mean in (
        ("web.high", 300, 40),
        ("web.medium", 500, 60),
        ("code.high", 200, 90),
        ("web.heldout", 40, 50),
    ):
        documents = random_documents(rng, count, mean, first)
        first += sum(map(len, documents))
        with ShardWriter(path / "shards" / name, np.int32) as writer:
            for document in documents:
                writer.add(document)
        entries[name] = writer.entry
    update_manifest(path, {"datasets": entries})
    return path
