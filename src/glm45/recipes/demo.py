"""The demo: the report's recipe in minutes on two cores."""

import dataclasses
from collections.abc import Sequence

from glm45.data.mixture import Mixture
from glm45.model.config import preset
from glm45.recipes.parts import report_stages
from glm45.training.checkpoint import Retention
from glm45.training.evaluation import EvaluationConfig
from glm45.training.optimizers import OptimizerConfig
from glm45.training.run import TrainConfig
from glm45.training.schedule import LearningRate
from glm45.training.stages import Stage

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
        evaluation=EvaluationConfig(every=400, rows=8, prompts=PROMPTS, sample_tokens=32),
    )


QUALITY = {"*.high": 3.2}
"""The top bucket counts 3.2 times (report section 2.2); the lowest was discarded when the corpus was built."""

CHATS = {
    "chat-arithmetic.*": 0.22,
    "chat-arithmetic-direct.*": 0.32,
    "chat-tools.*": 0.32,
    "chat-instructions.*": 0.14,
}
"""Worked conversations by domain: sums by heart need the most examples, the tools' schemas the most tokens. Not in the
report."""


def mixtures(prose: str) -> dict[str, Mixture]:
    """Return which kinds of data each stage reads, `prose` being the datasets read as prose.

    Shares are not in the report.
    """
    return {
        "general": Mixture(weights={prose: 0.5, "*-code.*": 0.4, "*-codeweb.*": 0.1}, repeats=QUALITY),
        "code and reasoning": Mixture(weights={"*-code.*": 0.5, prose: 0.2, "*-reasoning.*": 0.3}, repeats=QUALITY),
        "repository code": Mixture(weights={"*-repository.*": 1.0}),
        "synthetic reasoning": Mixture(weights={**CHATS, prose: 0.02, "*-code.*": 0.02}, repeats=QUALITY),
        "long context and agents": Mixture(weights={**CHATS, "*-long.*": 0.2}),
    }


SHARES = {
    "general": 0.14,
    "code and reasoning": 0.07,
    "repository code": 0.02,
    "synthetic reasoning": 0.73,
    "long context and agents": 0.04,
}
"""The whole run's stages are not at the report's fractions: a million tokens of text teach a million parameters
letters, and what the experts are made from must be learnt in the same minutes."""


def on_corpus_and_chats(stages: Sequence[Stage], prose: str = "*-prose.*") -> tuple[Stage, ...]:
    """Return the stages of a training on a whole run's data: the corpus, and worked conversations beside it.

    `prose` are the datasets read as prose: the demo has hardly a web page that does not speak of code, larger corpora
    have handbooks and manuals. The report stops moving the balance bias after the first stage; here the kinds of data
    of the later ones are so different that all tokens then go to two experts (MaxVio 2.9 of at most 3, docs/log.md), so
    it moves in all.
    """
    rate, reads = stages[0].router_bias_rate, mixtures(prose)
    return tuple(
        dataclasses.replace(each, mixture=reads[each.name], answers_only=True, router_bias_rate=rate) for each in stages
    )


def whole() -> TrainConfig:
    """Return the training part of `glm45 run demo`."""
    stages = report_stages(1_600_000, 2048, (256, 512, 1024), router_bias_rate=0.01, shares=SHARES)
    return dataclasses.replace(
        training(),
        name="demo_whole",
        stages=on_corpus_and_chats(stages),
        learning_rate=LearningRate(peak=1e-2, final=5e-4, warmup_fraction=0.02),
    )


def fast() -> TrainConfig:
    """Return a training of seconds, for smoke tests and small corpora of one's own: any data will do."""
    config = training()
    return dataclasses.replace(
        config,
        name="demo_fast",
        model=dataclasses.replace(config.model, vocab_size=1024, hidden_size=64),
        stages=report_stages(60_000, 2048, (128, 256, 512), router_bias_rate=0.01, shares=SHARES),
        micro_batch_tokens=2048,
        evaluation=EvaluationConfig(every=20, rows=2, prompts=PROMPTS[:1], sample_tokens=8),
    )
