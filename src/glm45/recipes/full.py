"""The report's own runs, GLM-4.5 and GLM-4.5-Air, for a cluster under torchrun.

The report names no hardware. Layouts published for these models are that of its RL system, 355B with tensor 8
(sequence parallel), pipeline 4, context 2 and expert 16 on 64 GPUs, for sequences of 32K, with optimiser state in host
memory and all activations recomputed (THUDM/slime, scripts/run-glm4.5-355B-A32B.sh); and those that Megatron-Bridge
recommends for pre-training at 4K: 355B with tensor 2, pipeline 8 and expert 16, Air with pipeline 4 and expert 8
(NVIDIA-NeMo/Megatron-Bridge, recipes/glm). Here they read `layout.tensor=2 layout.pipeline=8 layout.expert=16
layout.shard=8` and `layout.pipeline=4 layout.expert=8 layout.shard=8`. The report's last stage has rows of 128K and all
state stays on the GPUs, so the layouts below have context parallelism instead, and more GPUs.
"""

import dataclasses

from glm45.model.config import preset
from glm45.recipes.parts import report_stages
from glm45.training.checkpoint import Retention
from glm45.training.evaluation import EvaluationConfig
from glm45.training.layout import Layout
from glm45.training.run import TrainConfig

MILLION = 1_000_000


def full_training() -> TrainConfig:
    """Return the report's training of GLM-4.5: 23.1T tokens on 1,024 GPUs of 80 GB.

    Batches of 64M tokens are rounded to 64 x 2^20, a multiple of every sequence length.
    """
    return TrainConfig(
        name="full",
        model=dataclasses.replace(preset("glm-4.5"), rope_theta=10_000.0),
        stages=report_stages(23_100_000 * MILLION, batch_tokens=64 << 20),
        data="data/full",
        micro_batch_tokens=32_768,
        activation_checkpointing=True,
        checkpoints=Retention(every=250, keep_last=3, keep_every=5000),
        evaluation=EvaluationConfig(every=1000, rows=1024),
        layout=Layout(shard=32, context=8, expert=32),
    )


def air_training() -> TrainConfig:
    """Return the same recipe for GLM-4.5-Air, on 256 GPUs of 80 GB."""
    return dataclasses.replace(
        full_training(),
        name="air",
        model=dataclasses.replace(preset("glm-4.5-air"), rope_theta=10_000.0),
        layout=Layout(shard=16, context=8, expert=16),
    )
