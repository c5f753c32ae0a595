"""Supervised fine-tuning: a stage of the training loop over conversations, from a hub folder to a hub folder."""

import json
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path

from glm45.config import configuration
from glm45.data.mixture import Mixture
from glm45.model import hub
from glm45.model.config import ModelConfig
from glm45.posttraining.conversations import Conversation, sft_data
from glm45.text.tokenizer import Tokenizer
from glm45.training.checkpoint import Retention
from glm45.training.evaluation import EvaluationConfig
from glm45.training.loop import train
from glm45.training.optimizers import OptimizerConfig
from glm45.training.run import Run, TrainConfig
from glm45.training.schedule import LearningRate
from glm45.training.stages import Stage


@configuration
class SFTConfig:
    """How a model is fine-tuned. The report gives the data and the context (128K), no optimisation settings."""

    epochs: float = 2.0
    """Passes over the conversations. Not in the report."""
    sequence_length: int = 256
    """Tokens of a packed row; longer conversations are left out and counted. Report: up to 131,072."""
    batch_tokens: int = 4096
    """Tokens of a step. Not in the report."""
    learning_rate: LearningRate = field(default_factory=lambda: LearningRate(peak=1e-3, final=1e-4))
    """Cosine. Not in the report."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """As in pre-training. Not in the report."""
    mtp_weight: float = 0.1
    """Weight of the multi-token prediction loss, as at the end of pre-training; 0 where there is no such layer."""
    router_bias_rate: float = 0.0
    """Update rate of the balance bias: frozen, as in mid-training; 0.01 when training begins from random weights."""
    seed: int = 0
    """Root seed."""


def fine_tune(
    folder: str | Path,
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    base: str | Path | ModelConfig,
    config: SFTConfig,
) -> Path:
    """Fine-tune `base` (a hub folder, or a shape to begin with random weights) and return the new hub folder.

    `folder` is the run's; killed, the same call goes on. What was packed and left out is in `data.json`. Raises
    ValueError if no conversation fits, and what the training loop raises.
    """
    folder = Path(folder)
    data, counts = sft_data(conversations, tokenizer, config.sequence_length)
    model = base if isinstance(base, ModelConfig) else hub.load_config(base)
    tokens = max(config.batch_tokens, round(data.tokens["sft.all"] * config.epochs))
    run = Run.open(
        folder,
        TrainConfig(
            name="sft",
            model=model,
            stages=(
                Stage(
                    name="sft",
                    tokens=tokens,
                    sequence_length=config.sequence_length,
                    batch_tokens=config.batch_tokens,
                    mixture=Mixture(weights={"sft.all": 1.0}),
                    packing="best_fit",
                    rope_theta=model.rope_theta,
                    mtp_weight=config.mtp_weight if model.num_nextn_predict_layers else 0.0,
                    router_bias_rate=config.router_bias_rate,
                ),
            ),
            initial_weights="" if isinstance(base, ModelConfig) else str(base),
            seed=config.seed,
            learning_rate=config.learning_rate,
            optimizer=config.optimizer,
            evaluation=EvaluationConfig(every=1000),
            checkpoints=Retention(every=1000, keep_best=False, keep_last=1),
        ),
    )
    trained = train(run, data, tokenizer)
    hub.save(trained, folder / "model")
    tokenizer.save(folder / "model")
    (folder / "data.json").write_text(json.dumps(counts, indent=1) + "\n")
    return folder / "model"
