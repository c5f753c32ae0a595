"""Cross-entropy and per-token log-probabilities of an output head, without all logits at once.

N positions, D hidden size, V vocabulary, C positions of one chunk. Logits exist for one chunk at a time, forward and
backward; the loss is in fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from glm45.kernels import native
from glm45.kernels.products import prepare, product

CHUNK_ELEMENTS = 1 << 20
"""Logits of one chunk: few enough for a core's cache, enough rows for an efficient product."""
MIN_CHUNK_ROWS = 64


def linear_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor
) -> torch.Tensor:
    """Return the fp32 scalar `sum(weights * -log softmax(hidden @ weight.T)[targets])`.

    Where a position's weight is 0, its target may be any number. Differentiable in hidden and in the head's weight,
    not in `weights`: the gradient is formed with the loss, and only scaled in the backward pass. Divide by the count
    of valid tokens outside, once it is summed over micro-batches and ranks.
    """
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, weights_N.detach())


def linear_logprobs(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each target's log-probability and the entropy of its distribution, both `[N]` fp32, in nats.

    The distribution is `softmax(logits / temperature)`. Differentiable in the log-probabilities; the entropy is a
    measurement and carries no gradient. The backward pass computes the logits again.
    """
    return _LinearLogprobs.apply(hidden_ND, weight_VD, targets_N, float(temperature))


def _linear_logprobs_reference(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits at once: what both operators above must equal."""
    logits_NV = F.linear(hidden_ND, weight_VD.to(hidden_ND.dtype))
    logprobs_NV = torch.log_softmax(_at_least_fp32(logits_NV) / temperature, dim=-1)
    entropy_N = -(logprobs_NV.detach().exp() * logprobs_NV.detach()).sum(-1)
    return logprobs_NV.gather(-1, targets_N[:, None]).squeeze(-1), entropy_N


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor
    ) -> torch.Tensor:
        targets_N = targets_N.masked_fill(weights_N == 0, 0)
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        head = _Head(hidden_ND, weight_VD, need_hidden, need_weight)
        losses_N = torch.zeros_like(hidden_ND[:, 0], dtype=head.loss_dtype)
        weights_N = weights_N.to(head.loss_dtype)
        for rows in head.chunks():
            logits_CV = head.logits(rows)
            gradient_weights = weights_N[rows] if need_hidden or need_weight else None
            losses_N[rows] = log_softmax_in_place(logits_CV, targets_N[rows], gradient_weights)[0]
            if gradient_weights is not None:
                head.accumulate(rows, logits_CV)
        ctx.gradients = head.gradients()
        return -(losses_N * weights_N).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy scales its gradients in place: it has one backward pass")
        scaled = [None if gradient is None else gradient.mul_(grad) for gradient in ctx.gradients]
        ctx.gradients = None
        return *scaled, None, None


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        head = _Head(hidden_ND, weight_VD, False, False)
        logprobs_N = torch.empty_like(hidden_ND[:, 0], dtype=head.loss_dtype)
        entropy_N = torch.empty_like(logprobs_N)
        for rows in head.chunks():
            logprobs_N[rows], entropy_N[rows] = log_softmax_in_place(
                head.logits(rows), targets_N[rows], None, temperature
            )
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, weight_VD, targets_N = ctx.saved_tensors
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        head = _Head(hidden_ND, weight_VD, need_hidden, need_weight)
        for rows in head.chunks():
            logits_CV = head.logits(rows)
            log_softmax_in_place(logits_CV, targets_N[rows], -grad_N[rows], ctx.temperature)
            head.accumulate(rows, logits_CV)
        return *head.gradients(), None, None


class _Head:
    """The head's products of one chunk at a time, and the sums of their gradients."""

    def __init__(self, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, need_hidden: bool, need_weight: bool):
        self.hidden_ND, self.weight_dtype = hidden_ND, weight_VD.dtype
        self.weight_VD = prepare(weight_VD, hidden_ND.dtype)
        self.logits_dtype = torch.promote_types(hidden_ND.dtype, self.weight_VD.dtype)
        self.loss_dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        self.grad_hidden_ND = torch.empty_like(hidden_ND) if need_hidden else None
        self.grad_weight_VD = torch.zeros_like(weight_VD, dtype=self.loss_dtype) if need_weight else None

    def chunks(self) -> list[slice]:
        size = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // self.weight_VD.shape[0])
        return [slice(start, start + size) for start in range(0, self.hidden_ND.shape[0], size)]

    def logits(self, rows: slice) -> torch.Tensor:
        return product(self.hidden_ND[rows], self.weight_VD.T, dtype=self.logits_dtype)

    def accumulate(self, rows: slice, grad_logits_CV: torch.Tensor) -> None:
        if self.grad_hidden_ND is not None:
            product(grad_logits_CV, self.weight_VD, out_MN=self.grad_hidden_ND[rows])
        if self.grad_weight_VD is not None:
            product(grad_logits_CV.T, self.hidden_ND[rows], out_MN=self.grad_weight_VD, add=True)

    def gradients(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        weight = self.grad_weight_VD
        return self.grad_hidden_ND, None if weight is None else weight.to(self.weight_dtype)


def log_softmax_in_place(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, weights_C: torch.Tensor | None, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities of targets and entropies, both `[C]` in fp32.

    Where weights are given, the logits become the gradient `weight / temperature * (softmax - onehot)` of the loss
    `-weight * logprob`; otherwise what they hold afterwards is undefined.
    """
    if native.supports(logits_CV) and logits_CV.shape[-1] % 16 == 0:
        return _native_log_softmax(logits_CV, targets_C, weights_C, temperature)
    return _log_softmax_reference(logits_CV, targets_C, weights_C, temperature)


def _log_softmax_reference(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, weights_C: torch.Tensor | None, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs_CV = torch.log_softmax(_at_least_fp32(logits_CV) / temperature, dim=-1)
    probabilities_CV = logprobs_CV.exp()
    entropy_C = -(probabilities_CV * logprobs_CV).sum(-1)
    logprobs_C = logprobs_CV.gather(-1, targets_C[:, None]).squeeze(-1)
    if weights_C is not None:
        probabilities_CV.scatter_add_(-1, targets_C[:, None], -torch.ones_like(logprobs_C)[:, None])
        logits_CV.copy_(probabilities_CV.mul_(weights_C[:, None] / temperature))
    return logprobs_C, entropy_C


def _native_log_softmax(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, weights_C: torch.Tensor | None, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, size = logits_CV.shape
    logprobs_C = logits_CV.new_empty(rows, dtype=torch.float32)
    entropy_C = torch.empty_like(logprobs_C)
    targets_C = targets_C.long().contiguous()
    if rows and not 0 <= int(targets_C.min()) <= int(targets_C.max()) < size:
        raise IndexError(f"targets must lie in 0..{size - 1}, got {int(targets_C.min())}..{int(targets_C.max())}")
    native.function("cross_entropy", logits_CV.dtype)(
        *(logits_CV, targets_C, None if weights_C is None else weights_C.float().contiguous(), 1.0 / temperature),
        *(logprobs_C, entropy_C, rows, size, native.threads_for(logits_CV.numel())),
    )
    return logprobs_C, entropy_C


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
