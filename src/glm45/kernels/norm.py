"""RMSNorm, alone and fused with the addition of a residual.

N rows, D hidden size. Statistics and products are in fp32 whatever the dtypes, and the result is rounded once, to
`out_dtype`: the residual stream stays in fp32 while matrix products read a bf16 copy.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from glm45.kernels import native


def rms_norm(
    x_ND: torch.Tensor, weight_D: torch.Tensor, eps: float, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return `x / sqrt(mean(x²) + eps) * weight` over the last dimension, in `out_dtype` (default: x's)."""
    out_dtype = out_dtype or x_ND.dtype
    if _native_takes(x_ND, None, weight_D, out_dtype):
        return _NativeAddRmsNorm.apply(x_ND, None, weight_D, eps, out_dtype)[1]
    return _rms_norm_reference(x_ND, weight_D, eps, out_dtype)


def add_rms_norm(
    residual_ND: torch.Tensor,
    delta_ND: torch.Tensor | None,
    weight_D: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the new residual `residual + delta`, in the residual's dtype, and its RMSNorm in `out_dtype`.

    `delta` may be of another dtype, or None where there is nothing to add yet (the first layer).
    """
    if delta_ND is None:
        return residual_ND, rms_norm(residual_ND, weight_D, eps, out_dtype)
    if _native_takes(residual_ND, delta_ND, weight_D, out_dtype):
        return _NativeAddRmsNorm.apply(residual_ND, delta_ND, weight_D, eps, out_dtype)
    residual_ND = residual_ND + delta_ND
    return residual_ND, _rms_norm_reference(residual_ND, weight_D, eps, out_dtype)


def _rms_norm_reference(x_ND: torch.Tensor, weight_D: torch.Tensor, eps: float, out_dtype: torch.dtype) -> torch.Tensor:
    wide_ND = x_ND if x_ND.dtype == torch.float64 else x_ND.float()
    normed_ND = wide_ND * torch.rsqrt(wide_ND.square().mean(-1, keepdim=True) + eps)
    return (normed_ND * weight_D).to(out_dtype)


def _native_takes(
    residual_ND: torch.Tensor, delta_ND: torch.Tensor | None, weight_D: torch.Tensor, out_dtype: torch.dtype
) -> bool:
    """The native kernel reads an fp32 residual and weight; delta and result share a dtype; D is whole vectors."""
    return (
        residual_ND.dtype == torch.float32
        and native.supports(residual_ND, weight_D)
        and out_dtype in native.DTYPES
        and (delta_ND is None or delta_ND.dtype == out_dtype)
        and residual_ND.shape[-1] % 16 == 0
    )


class _NativeAddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual_ND: torch.Tensor,
        delta_ND: torch.Tensor | None,
        weight_D: torch.Tensor,
        eps: float,
        out_dtype: torch.dtype,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        residual_ND = residual_ND.contiguous()
        delta_ND = None if delta_ND is None else delta_ND.contiguous()
        size = residual_ND.shape[-1]
        new_ND = residual_ND if delta_ND is None else torch.empty_like(residual_ND)
        out_ND = torch.empty_like(residual_ND, dtype=out_dtype)
        inverse_rms_N = residual_ND.new_empty(residual_ND.shape[:-1])
        native.function("add_rms_norm_forward", out_dtype)(
            *(residual_ND, delta_ND, weight_D.contiguous(), eps, new_ND, out_ND, inverse_rms_N),
            *(inverse_rms_N.numel(), size, native.threads_for(residual_ND.numel())),
        )
        ctx.save_for_backward(new_ND, weight_D, inverse_rms_N)
        ctx.out_dtype, ctx.has_delta = out_dtype, delta_ND is not None
        ctx.set_materialize_grads(False)
        return (None if delta_ND is None else new_ND), out_ND

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_residual_ND: torch.Tensor | None, grad_out_ND: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        residual_ND, weight_D, inverse_rms_N = ctx.saved_tensors
        if grad_out_ND is None:
            grad_delta = grad_residual_ND.to(ctx.out_dtype) if ctx.has_delta and grad_residual_ND is not None else None
            return grad_residual_ND, grad_delta, None, None, None
        threads = native.threads_for(residual_ND.numel())
        rounded = ctx.has_delta and ctx.out_dtype != torch.float32
        grad_ND = torch.empty_like(residual_ND)
        grad_delta_ND = torch.empty_like(residual_ND, dtype=ctx.out_dtype) if rounded else None
        grad_weights = residual_ND.new_zeros(threads, residual_ND.shape[-1])
        native.function("add_rms_norm_backward", ctx.out_dtype)(
            grad_out_ND.contiguous(),
            None if grad_residual_ND is None else grad_residual_ND.contiguous(),
            *(residual_ND, weight_D.contiguous(), inverse_rms_N, grad_ND, grad_delta_ND, grad_weights),
            *(inverse_rms_N.numel(), residual_ND.shape[-1], threads),
        )
        if ctx.has_delta and not rounded:
            grad_delta_ND = grad_ND
        return grad_ND, grad_delta_ND, grad_weights.sum(0), None, None
