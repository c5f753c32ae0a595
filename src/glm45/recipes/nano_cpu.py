"""`nano` on two cores in a night."""

from glm45.model.config import preset
from glm45.recipes.demo import PROMPTS
from glm45.recipes.parts import report_stages
from glm45.training.checkpoint import Retention
from glm45.training.evaluation import EvaluationConfig
from glm45.training.optimizers import OptimizerConfig
from glm45.training.run import TrainConfig
from glm45.training.schedule import LearningRate


def training() -> TrainConfig:
    """Return a run of a night, twelve hours by `--dry-run` on two Zen 3 cores: 20M tokens, the report's stages."""
    return TrainConfig(
        name="nano_cpu",
        model=preset("nano"),
        stages=report_stages(20_000_000, batch_tokens=8192, lengths=(512, 2048, 4096), router_bias_rate=0.003),
        data="data/debian",
        learning_rate=LearningRate(peak=5e-3, final=5e-4),
        optimizer=OptimizerConfig(adamw_ratio=0.5),
        micro_batch_tokens=4096,
        checkpoints=Retention(every=250, keep_last=2),
        evaluation=EvaluationConfig(every=500, rows=16, prompts=PROMPTS),
    )
