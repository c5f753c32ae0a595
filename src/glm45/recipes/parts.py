"""What recipes share: the report's stages, scaled to any number of tokens."""

from collections.abc import Mapping

from glm45.training.stages import Stage

TRILLIONS = {
    "general": 15.0,
    "code and reasoning": 7.0,
    "repository code": 0.5,
    "synthetic reasoning": 0.5,
    "long context and agents": 0.1,
}
"""Tokens of the report's stages (sections 2.2 and 2.3), 23.1 in all."""

PRETRAINING = ("general", "code and reasoning")
"""The stages before mid-training."""

BATCH_WARMUP_SHARE = 0.5 / 23.1
"""Share of all tokens over which the batch grows to four times its first size (report section 2.4)."""


def report_stages(
    tokens: int,
    batch_tokens: int,
    lengths: tuple[int, int, int] = (4096, 32_768, 131_072),
    router_bias_rate: float = 0.001,
    shares: Mapping[str, float] = TRILLIONS,
) -> tuple[Stage, ...]:
    """Return the five stages of the report at its shares of `tokens`, by name those of `TRILLIONS`.

    A recipe that says so may give other `shares`, in any unit.

    `lengths` are those of pre-training, of the first two mid-training stages and of the last; `batch_tokens` is a
    multiple of each. As in the report, packing and RoPE base change with the first long stage, MTP weight and router
    bias rate after the first stage, and the batch grows from a quarter over the first 2.2 % of the tokens.
    """
    short, long, longest = lengths
    scale = tokens / sum(shares.values())
    stages = []
    for name, length in zip(TRILLIONS, (short, short, long, long, longest), strict=True):
        first, pretraining = name == "general", name in PRETRAINING
        stages.append(
            Stage(
                name=name,
                tokens=max(round(scale * shares[name]), batch_tokens),
                sequence_length=length,
                batch_tokens=batch_tokens,
                packing="concatenate" if pretraining else "best_fit",
                rope_theta=10_000.0 if pretraining else 1_000_000.0,
                mtp_weight=0.3 if first else 0.1,
                router_bias_rate=router_bias_rate if first else 0.0,
                batch_warmup_from=batch_tokens // 4 if first else 0,
                batch_warmup_tokens=round(tokens * BATCH_WARMUP_SHARE) if first else 0,
            )
        )
    return tuple(stages)
