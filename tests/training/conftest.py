"""Toy data folders and recipes for the tests of this room."""

import numpy as np
import pytest

from glm45.config import override
from glm45.data.folder import update_manifest
from glm45.data.shards import ShardWriter
from glm45.model.config import preset
from glm45.text.tokenizer import Tokenizer
from glm45.training.checkpoint import Retention
from glm45.training.evaluation import EvaluationConfig
from glm45.training.health import HealthConfig
from glm45.training.run import TrainConfig
from glm45.training.schedule import LearningRate
from glm45.training.stages import Stage

TEXT = "the sum of {a} and {b} is {c} . the cat sat on the mat . "


def counting_documents(seed, count):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        pairs = rng.integers(0, 10, (int(rng.integers(1, 6)), 2)).tolist()
        yield "".join(TEXT.format(a=a, b=b, c=a + b) for a, b in pairs)


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """A data folder of short sums: two datasets to train on and one held out."""
    path = tmp_path_factory.mktemp("toy")
    tokenizer = Tokenizer.train(counting_documents(0, 200), 300)
    tokenizer.save(path / "tokenizer")
    entries = {}
    for seed, (name, count) in enumerate((("sums.high", 300), ("sums.medium", 100), ("sums.heldout", 20))):
        with ShardWriter(path / "shards" / name, np.uint16) as writer:
            for document in counting_documents(seed, count):
                writer.add([*tokenizer.encode(document), tokenizer.eos_token_ids[0]])
        entries[name] = writer.entry
    update_manifest(path, {"datasets": entries})
    return path


@pytest.fixture
def toy_recipe(toy_recipe_factory):
    return toy_recipe_factory


@pytest.fixture(scope="session")
def toy_recipe_factory(toy_data):
    """A run of 24 steps in two stages that takes seconds; dotted overrides change it."""

    def make(*overrides):
        stages = (
            Stage(
                name="general",
                tokens=32 * 4 * 16,
                sequence_length=32,
                batch_tokens=32 * 4,
                batch_warmup_from=32 * 2,
                batch_warmup_tokens=32 * 2 * 4,
                router_bias_rate=0.01,
            ),
            Stage(
                name="long",
                tokens=64 * 2 * 6,
                sequence_length=64,
                batch_tokens=64 * 2,
                packing="best_fit",
                rope_theta=1e6,
                mtp_weight=0.1,
                router_bias_rate=0.0,
            ),
        )
        config = TrainConfig(
            name="toy",
            model=preset("pico"),
            stages=stages,
            data=str(toy_data),
            learning_rate=LearningRate(peak=5e-3, final=5e-4, warmup_fraction=0.1),
            micro_batch_tokens=64,
            checkpoints=Retention(every=3, keep_last=2),
            evaluation=EvaluationConfig(every=10, rows=2, prompts=("the sum",), sample_tokens=4),
            health=HealthConfig(every=8, probe_tokens=32),
        )
        return override(config, overrides)

    return make
