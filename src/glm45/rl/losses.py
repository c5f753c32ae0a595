"""The policy loss of GRPO and its variants, as a weighted sum over tokens. Pure torch.

N generated tokens of a micro-batch in any order, S samples. What a token weighs is decided once for the whole batch
(`token_weights`: global denominators), so the losses and gradients of micro-batches, packed rows and ranks simply add
up. There is no KL term (report section 3.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

AGGREGATIONS = ("token", "sequence", "constant")


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of some tokens, and sums to be added over micro-batches and ranks and divided by their counts."""

    loss: torch.Tensor
    """Scalar with gradient; parts add up to the loss of the batch."""
    sums: dict[str, float]
    """`tokens`, and sums over tokens: `clipped_low`, `clipped_high`, `ratio`, `kl` (from the policy before the step),
    and of the mismatch between rollout and training `mismatch` (absolute difference of log-probabilities),
    `mismatch_kl` and `mismatch_capped`."""
    max_mismatch: float
    """Largest absolute difference between rollout and training log-probability."""


def token_weights(
    lengths_S: torch.Tensor,
    domains: Sequence[str],
    aggregation: dict[str, str],
    default: str = "token",
    max_tokens: int | None = None,
) -> torch.Tensor:
    """Return what each token of each sample weighs in the loss of the whole batch, fp64 `[S]`.

    `lengths_S` counts learnt tokens. Within a domain, "token" weighs every token alike (the report's token-weighted
    mean loss for code), "sequence" every sample alike, and "constant" divides by `max_tokens` whatever the lengths.
    Domains share the batch by their numbers of samples. Raises ValueError for an unknown aggregation, or "constant"
    without `max_tokens`.
    """
    lengths_S = lengths_S.double()
    weights_S = torch.zeros_like(lengths_S)
    for domain in sorted(set(domains)):
        kind = aggregation.get(domain, default)
        inside_S = torch.tensor([name == domain for name in domains], device=lengths_S.device)
        if kind == "token":
            share = inside_S.sum() / len(domains)
            weights_S[inside_S] = share / lengths_S[inside_S].sum().clamp(min=1)
        elif kind == "sequence":
            weights_S[inside_S] = 1 / (len(domains) * lengths_S[inside_S].clamp(min=1))
        elif kind == "constant":
            if max_tokens is None:
                raise ValueError('aggregation "constant" divides by max_tokens, which was not given')
            weights_S[inside_S] = 1 / (len(domains) * max_tokens)
        else:
            raise ValueError(f"aggregation {kind!r} of domain {domain!r}: choose from {', '.join(AGGREGATIONS)}")
    return weights_S


def policy_loss(
    logprobs_N: torch.Tensor,
    old_logprobs_N: torch.Tensor,
    advantages_N: torch.Tensor,
    weights_N: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    rollout_logprobs_N: torch.Tensor | None = None,
    mismatch_cap: float = 0.0,
    sample_ids_N: torch.Tensor | None = None,
) -> PolicyLoss:
    """Return the clipped policy loss of some tokens.

    `old_logprobs_N` are of the training forward before the step (ratio 1 on the first pass over a batch);
    `rollout_logprobs_N` are the engine's. With `mismatch_cap` > 0 each token is further weighted by
    `exp(old - rollout)`, truncated at the cap: the importance correction for engine and trainer computing slightly
    different numbers. With `sample_ids_N`, the ratio is one per sample, the geometric mean over its tokens (GSPO);
    the samples must then be whole. Clip-higher is `clip_high` > `clip_low`. All of it is over temperature-scaled
    log-probabilities. Values not in the report.
    """
    old_N = old_logprobs_N.detach()
    log_ratio_N = logprobs_N - old_N
    if sample_ids_N is not None:
        log_ratio_N = _mean_of_sample(log_ratio_N, sample_ids_N)
    ratio_N = log_ratio_N.exp()
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    loss_N = -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    sums = {
        "tokens": float(len(logprobs_N)),
        "clipped_low": _total((ratio_N < 1 - clip_low) & (advantages_N < 0)),
        "clipped_high": _total((ratio_N > 1 + clip_high) & (advantages_N > 0)),
        "ratio": _total(ratio_N),
        "kl": _total(torch.expm1(log_ratio_N) - log_ratio_N),
    }
    max_mismatch = 0.0
    if rollout_logprobs_N is not None:
        gap_N = old_N - rollout_logprobs_N
        correction_N = gap_N.exp()
        sums["mismatch"] = _total(gap_N.abs())
        sums["mismatch_kl"] = _total(torch.expm1(gap_N) - gap_N)
        max_mismatch = float(gap_N.abs().max()) if len(gap_N) else 0.0
        if mismatch_cap > 0:
            sums["mismatch_capped"] = _total(correction_N > mismatch_cap)
            loss_N = loss_N * correction_N.clamp(max=mismatch_cap)
    return PolicyLoss((loss_N * weights_N).sum(), sums, max_mismatch)


def _mean_of_sample(values_N: torch.Tensor, sample_ids_N: torch.Tensor) -> torch.Tensor:
    _, index_N, count_S = torch.unique(sample_ids_N, return_inverse=True, return_counts=True)
    sums_S = torch.zeros(len(count_S), dtype=values_N.dtype, device=values_N.device).index_add(0, index_N, values_N)
    return (sums_S / count_S)[index_N]


def _total(values_N: torch.Tensor) -> float:
    return float(values_N.detach().sum())
