"""RMSNorm, alone and fused with the addition of a residual.

D hidden size. Statistics and products are in fp32 whatever the dtypes, and the result is rounded once, to
`out_dtype`: the residual stream stays in fp32 while matrix products read a bf16 copy.
"""

import torch


def rms_norm(x_D: torch.Tensor, weight_D: torch.Tensor, eps: float, out_dtype: torch.dtype | None = None):
    """Return `x / sqrt(mean(x²) + eps) * weight` over the last dimension, in `out_dtype` (default: x's)."""
    return _rms_norm_reference(x_D, weight_D, eps, out_dtype or x_D.dtype)


def add_rms_norm(
    residual_D: torch.Tensor,
    delta_D: torch.Tensor | None,
    weight_D: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the new residual `residual + delta`, in the residual's dtype, and its RMSNorm in `out_dtype`.

    `delta` may be of another dtype, or None where there is nothing to add yet (the first layer).
    """
    if delta_D is not None:
        residual_D = residual_D + delta_D
    return residual_D, _rms_norm_reference(residual_D, weight_D, eps, out_dtype)


def _rms_norm_reference(x_D: torch.Tensor, weight_D: torch.Tensor, eps: float, out_dtype: torch.dtype) -> torch.Tensor:
    wide_D = x_D if x_D.dtype == torch.float64 else x_D.float()
    normed_D = wide_D * torch.rsqrt(wide_D.square().mean(-1, keepdim=True) + eps)
    return (normed_D * weight_D).to(out_dtype)
