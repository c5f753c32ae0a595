"""Cross-entropy and per-token log-probabilities of an output head, without all logits at once.

N positions, D hidden size, V vocabulary. Logits exist for one chunk of positions at a time, forward and backward;
the loss is in fp32. Where a position's weight is 0, its target may be any number.
"""

import torch
import torch.nn.functional as F

CHUNK_BYTES = 4 << 20
"""Logits of one chunk, in fp32: small enough for a core's cache, large enough for an efficient product."""


def linear_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor
) -> torch.Tensor:
    """Return the fp32 scalar `sum(weights * -log softmax(hidden @ weight.T)[targets])`.

    Differentiable in hidden and in the head's weight, not in `weights`. Divide by the count of valid tokens outside,
    once it is summed over micro-batches and ranks.
    """
    return _linear_cross_entropy_reference(hidden_ND, weight_VD, targets_N, weights_N)


def linear_logprobs(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each target's log-probability and the entropy of its distribution, both `[N]` fp32, in nats.

    The distribution is `softmax(logits / temperature)`. Differentiable in the log-probabilities; the entropy is a
    measurement and carries no gradient.
    """
    return _linear_logprobs_reference(hidden_ND, weight_VD, targets_N, temperature)


def _linear_cross_entropy_reference(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor
) -> torch.Tensor:
    logprobs_N, _ = _linear_logprobs_reference(hidden_ND, weight_VD, targets_N.clamp(min=0), 1.0)
    return -(logprobs_N * weights_N).sum()


def _linear_logprobs_reference(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits_NV = F.linear(hidden_ND, weight_VD.to(hidden_ND.dtype))
    wide_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    logprobs_NV = torch.log_softmax(wide_NV / temperature, dim=-1)
    entropy_N = -(logprobs_NV.detach().exp() * logprobs_NV.detach()).sum(-1)
    return logprobs_NV.gather(-1, targets_N[:, None]).squeeze(-1), entropy_N
