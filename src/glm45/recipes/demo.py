"""The demo: the report's recipe in minutes on two cores."""

import dataclasses

from glm45.model.config import preset
from glm45.recipes.parts import report_stages
from glm45.training.checkpoint import Retention
from glm45.training.evaluation import EvaluationConfig
from glm45.training.optimizers import OptimizerConfig
from glm45.training.run import TrainConfig
from glm45.training.schedule import LearningRate

PROMPTS = ("The", "def ", "A file is")


def training() -> TrainConfig:
    """Return the pre-training and mid-training of the demo: 2M tokens, the report's stages at its fractions.

    Small batches and large rates are what learns at this size; the balance bias needs 0.01 a step to act within a
    thousand steps (docs/log.md).
    """
    return TrainConfig(
        name="demo",
        model=dataclasses.replace(preset("demo"), rope_theta=10_000.0),
        stages=report_stages(2_000_000, batch_tokens=4096, lengths=(256, 512, 1024), router_bias_rate=0.01),
        data="data/demo",
        learning_rate=LearningRate(peak=1e-2, final=1e-3, warmup_fraction=0.02),
        optimizer=OptimizerConfig(adamw_ratio=0.5),
        micro_batch_tokens=4096,
        checkpoints=Retention(every=200),
        evaluation=EvaluationConfig(every=250, rows=8, prompts=PROMPTS, sample_tokens=32),
    )
