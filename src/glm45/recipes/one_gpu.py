"""`mini` on one 80 GB GPU: 20 minutes give a model that writes sentences."""

from glm45.model.config import preset
from glm45.recipes.demo import PROMPTS
from glm45.recipes.parts import report_stages
from glm45.training.checkpoint import Retention
from glm45.training.evaluation import EvaluationConfig
from glm45.training.run import TrainConfig
from glm45.training.schedule import LearningRate


def training() -> TrainConfig:
    """Return a run of 200M tokens, about 20 minutes at a third of an H100's peak (an estimate, not measured)."""
    return TrainConfig(
        name="one_gpu",
        model=preset("mini"),
        stages=report_stages(200_000_000, batch_tokens=131_072, lengths=(2048, 8192, 32_768), router_bias_rate=0.003),
        data="data/full",
        learning_rate=LearningRate(peak=3e-3, final=3e-4),
        micro_batch_tokens=32_768,
        checkpoints=Retention(every=200),
        evaluation=EvaluationConfig(every=200, rows=32, prompts=PROMPTS),
    )
