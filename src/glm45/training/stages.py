"""A stage: a stretch of one training run with its own data, sequence length and batch."""

from typing import Literal

from glm45.config import configuration
from glm45.data.mixture import Mixture


@configuration
class Stage:
    """A stretch of a run (report sections 2.2 to 2.4). Pre-training, mid-training and SFT are stages of one loop."""

    name: str
    """Name in logs and plots."""
    tokens: int
    """Tokens to train on, rounded to whole batches; the rounded figure is printed by `--dry-run`."""
    sequence_length: int
    """Tokens a row: 4,096 in pre-training, 32,768 and 131,072 in mid-training."""
    batch_tokens: int
    """Tokens an optimiser step, over all ranks and micro-batches; a multiple of `sequence_length`."""
    mixture: Mixture = Mixture()
    """Which datasets of the data folder the tokens come from; a stage with its own data ignores it."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """Concatenate and cut in pre-training; best fit, no document cut, in mid-training (report section 2.2)."""
    answers_only: bool = False
    """Learn chats from what the assistant produced alone, as in SFT; documents without roles are learnt whole. Not in
    the report."""
    rope_theta: float = 10_000.0
    """RoPE base: 10,000, and 1,000,000 from 32K on (report section 2.4)."""
    mtp_weight: float = 0.3
    """Weight of the multi-token prediction loss: 0.3 for the first 15T tokens, 0.1 afterwards."""
    router_bias_rate: float = 0.001
    """Update rate of the loss-free balance bias: 0.001 for the first 15T tokens, 0 afterwards."""
    batch_warmup_from: int = 0
    """Tokens of the first step's batch; 0 for no batch warm-up (report: 16M to 64M over the first 500B tokens)."""
    batch_warmup_tokens: int = 0
    """Tokens over which the batch grows to `batch_tokens`, in steps of `batch_warmup_from`. The shape of the ramp is
    not in the report."""

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ValueError(f"stage {self.name!r}: {problem}")

    def _problems(self) -> list[str]:
        length, batch, start = self.sequence_length, self.batch_tokens, self.batch_warmup_from
        problems = []
        if length < 2 or batch < length or batch % length:
            problems.append(
                f"batch_tokens {batch} must be a positive multiple of sequence_length {length}: for example "
                f"{max(1, batch // max(length, 1)) * length}"
            )
        elif self.tokens < batch:
            problems.append(
                f"tokens {self.tokens} are fewer than one batch of {batch}: raise tokens or lower the batch"
            )
        if bool(start) != bool(self.batch_warmup_tokens):
            problems.append("set both batch_warmup_from and batch_warmup_tokens, or neither")
        if start and (start % length or batch % start):
            problems.append(
                f"batch_warmup_from {start} must be a multiple of sequence_length {length} and divide "
                f"batch_tokens {batch}"
            )
        return problems
