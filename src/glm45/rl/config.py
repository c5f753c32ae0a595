"""Everything that an RL run is made of, as one value. Only what the report names has its number from there."""

from dataclasses import field
from typing import Literal

from glm45.config import configuration
from glm45.environments.verify import RewardConfig
from glm45.rl.curriculum import CurriculumStage, LengthSchedule
from glm45.rl.health import HealthConfig
from glm45.rl.temperature import TemperatureConfig

Aggregation = Literal["token", "sequence", "constant"]


@configuration
class LossConfig:
    """GRPO's objective and its variants (report sections 3.2 and 3.3); there is no KL term."""

    divide_by_std: bool = True
    """Whether advantages are divided by their group's standard deviation; the agentic objective uses the mean only
    (report section 3.3)."""
    clip_low: float = 0.2
    """The ratio's clip below 1. Not in the report."""
    clip_high: float = 0.28
    """The ratio's clip above 1; larger than `clip_low` is clip-higher. Not in the report."""
    ratio: Literal["token", "sequence"] = "token"
    """One ratio a token (GRPO), or one a sample, the geometric mean of its tokens' (GSPO). Not in the report."""
    aggregation: dict[str, Aggregation] = field(default_factory=lambda: {"code": "token"})
    """What is averaged, by domain (verifier's name). Code has the token-weighted mean (report section 3.2)."""
    default_aggregation: Aggregation = "token"
    """For domains not named. Not in the report."""
    mismatch_cap: float = 2.0
    """Largest importance correction for rollout and training computing different log-probabilities; 0 for none. Not
    in the report."""
    truncated: Literal["keep", "mask", "zero", "drop"] = "keep"
    """What becomes of samples cut by the cap: `keep` their reward, `mask` them from the loss but not from the mean,
    give them `zero`, or `drop` them before advantages are computed. Not in the report."""
    mtp_weight: float = 0.0
    """Weight of a multi-token prediction loss on the sampled tokens; 0 leaves the MTP layer alone. Not in the
    report."""
    routing_replay: bool = False
    """Whether updates repeat the routers' choices of the pass that gave the old log-probabilities. Not in the
    report."""
    num_minibatches: int = 1
    """Optimiser steps for each batch of rollouts; 1 is fully on-policy. Not in the report."""
    lr: float = 2e-4
    """AdamW's learning rate, constant: 1e-4 to 3e-4 for models of a million parameters, 1e-6 for large ones. Not in
    the report."""
    weight_decay: float = 0.0
    """Decoupled weight decay. Not in the report."""
    clip_norm: float = 1.0
    """Largest global gradient norm. Not in the report."""
    micro_batch_tokens: int = 4096
    """Tokens of a packed row and so of one forward pass; longer samples get rows of their own length. Bounds memory,
    changes no result."""
    share_prompts: bool = True
    """Whether the update computes a prompt once for all of its samples in a row. Changes no result. Not done on a GPU,
    whose attention over packed documents knows no branches, nor with `mtp_weight`. Not in the report."""

    def __post_init__(self) -> None:
        if self.clip_low < 0 or self.clip_low >= 1 or self.clip_high < 0 or self.mismatch_cap < 0:
            raise ValueError(
                f"clip_low = {self.clip_low}, clip_high = {self.clip_high}, mismatch_cap = {self.mismatch_cap}: "
                "clip_low lies between 0 and 1, the others are at least 0"
            )
        if self.num_minibatches < 1 or self.micro_batch_tokens < 2 or self.lr <= 0:
            raise ValueError(
                f"num_minibatches = {self.num_minibatches}, micro_batch_tokens = {self.micro_batch_tokens}, "
                f"lr = {self.lr}: need at least 1, at least 2 and above 0"
            )


@configuration
class PenaltyConfig:
    """Subtracted from a judged reward for faults of form (report section 3.4, pathology RL). Sizes are ours."""

    format: float = 0.0
    """For any fault of format or a wrong mode. Not in the report."""
    repetition: float = 0.0
    """For a share of repeated four-grams above 0.2. Not in the report."""
    language_mixing: float = 0.0
    """For a share of letters of another script above 0.05. Not in the report."""


@configuration
class RolloutConfig:
    """How trajectories are made."""

    mode: Literal["sync"] = "sync"
    """Generation and training take turns on the same processors (report section 3.5, colocated)."""
    oversampling: float = 1.25
    """Groups begun for each one that is missing, since some will not be informative. Not in the report."""
    max_rounds: int = 4
    """Refills after which an update takes what there is. Not in the report."""
    drop_uninformative: bool = True
    """Whether groups whose rewards are all equal are dropped and replaced (dynamic sampling)."""
    max_staleness: int = 0
    """Updates that may lie between sampling a group and learning from it. Not in the report."""
    penalties: PenaltyConfig = PenaltyConfig()
    """Penalties of form."""

    def __post_init__(self) -> None:
        if self.oversampling < 1 or self.max_rounds < 1:
            raise ValueError(f"oversampling = {self.oversampling}, max_rounds = {self.max_rounds}: both at least 1")


@configuration
class RLEvaluationConfig:
    """Held-out accuracy while the run goes on."""

    every: int = 10
    """Steps between evaluations; the first is before the first step. Report: 80."""
    num_tasks: int = 128
    """Held-out prompts. Not in the report."""
    num_samples: int = 4
    """Samples of each prompt at temperature 1, besides the greedy one. Report: 32 (Avg@32)."""
    by: str = ""
    """Key of the tasks' metadata, such as `num_digits`, by whose values sampled accuracy is told apart as well."""

    def __post_init__(self) -> None:
        if min(self.every, self.num_tasks, self.num_samples) < 1:
            raise ValueError(
                f"evaluation: every = {self.every}, num_tasks = {self.num_tasks}, num_samples = {self.num_samples}: "
                "all at least 1"
            )


@configuration
class RLConfig:
    """A whole RL run. Recipes are functions that return one."""

    name: str
    """The recipe's name."""
    policy: str
    """Hub folder of the policy to begin with, its tokenizer in it."""
    tasks: str
    """JSONL file of training tasks."""
    held_out: str
    """JSONL file of held-out tasks; a prompt that is in both files is refused."""
    pools: str = ""
    """File that `glm45 rl pools` wrote; needed by stages on the moderate or hard pool."""
    steps: int = 60
    """Updates."""
    seed: int = 0
    """Root seed of prompts and samples."""
    stages: tuple[CurriculumStage, ...] = (CurriculumStage(),)
    """The curriculum."""
    lengths: LengthSchedule = LengthSchedule()
    """Caps on the response's tokens."""
    temperature: TemperatureConfig = TemperatureConfig()
    """Sampling temperature."""
    loss: LossConfig = LossConfig()
    """Objective and optimiser."""
    rollout: RolloutConfig = RolloutConfig()
    """Generation."""
    rewards: RewardConfig = RewardConfig()
    """Processes that judge."""
    evaluation: RLEvaluationConfig = RLEvaluationConfig()
    """Held-out accuracy."""
    health: HealthConfig = HealthConfig()
    """Alarms."""
    expert_verified_only: bool = False
    """Keep only science tasks that experts verified (report section 3.2, Science RL)."""
    checkpoint_every: int = 10
    """Steps between checkpoints. Not in the report."""
    tracker: Literal["none", "wandb", "trackio"] = "none"
    """A further place that metrics go to, besides the run folder and TensorBoard."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.checkpoint_every < 1:
            raise ValueError(f"steps = {self.steps}, checkpoint_every = {self.checkpoint_every}: both at least 1")
        if any(stage.pool != "all" for stage in self.stages) and not self.pools:
            raise ValueError("a stage names the moderate or hard pool: set pools to the file of `glm45 rl pools`")
