"""Rotary positions on the first dimensions of a head, and the fused way from a qkv projection to q, k and v.

B batch, T tokens, H query heads, K key/value heads, G = H / K query heads of one group, P = G + 2 rows of a group
in the fused projection (its queries, its key, its value), D head size, R half of the rotated dimensions.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from glm45.kernels import native
from glm45.kernels.norm import rms_norm


def rotary_tables(positions_BT: torch.Tensor, rotary_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine tables `[..., T, rotary_dim // 2]` in fp32 for positions of any leading shape."""
    exponents_R = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions_BT.device) / rotary_dim
    angles_BTR = positions_BT[..., None].float() * (1.0 / theta**exponents_R)
    return angles_BTR.cos(), angles_BTR.sin()


def apply_rotary(x_BTHD: torch.Tensor, cos_BTR: torch.Tensor, sin_BTR: torch.Tensor) -> torch.Tensor:
    """Rotate the first 2R dimensions of every head, dimension r with dimension r + R; pass the rest through.

    This is the half-rotate layout of GLM-4.5 (report section 2.1), not the interleaved one of dense GLM-4.
    """
    half = cos_BTR.shape[-1]
    cos_BT1R, sin_BT1R = cos_BTR.unsqueeze(-2), sin_BTR.unsqueeze(-2)
    first_BTHR, second_BTHR = x_BTHD[..., :half], x_BTHD[..., half : 2 * half]
    rotated_BTHD = torch.cat(
        [
            first_BTHR * cos_BT1R - second_BTHR * sin_BT1R,
            second_BTHR * cos_BT1R + first_BTHR * sin_BT1R,
            x_BTHD[..., 2 * half :],
        ],
        dim=-1,
    )
    return rotated_BTHD.to(x_BTHD.dtype)


def split_qkv(
    qkv_BTKPD: torch.Tensor,
    cos_BTR: torch.Tensor,
    sin_BTR: torch.Tensor,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q `[B, T, H, D]` and k `[B, T, K, D]`, normed per head where weights are given and then rotated, and v.

    One pass over the fused projection, rounded once. Query head `h` belongs to key/value head `h // G`.
    """
    assert (q_norm_D is None) == (k_norm_D is None), "queries and keys are normed together or not at all"
    weights = () if q_norm_D is None or k_norm_D is None else (q_norm_D, k_norm_D)
    if _native_takes(qkv_BTKPD, cos_BTR, sin_BTR, weights):
        return _NativeSplitQkv.apply(qkv_BTKPD, cos_BTR, sin_BTR, q_norm_D, k_norm_D, eps)
    return _split_qkv_reference(qkv_BTKPD, cos_BTR, sin_BTR, q_norm_D, k_norm_D, eps)


def _split_qkv_reference(
    qkv_BTKPD: torch.Tensor,
    cos_BTR: torch.Tensor,
    sin_BTR: torch.Tensor,
    q_norm_D: torch.Tensor | None,
    k_norm_D: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    group_size = qkv_BTKPD.shape[-2] - 2
    wide_BTKPD = qkv_BTKPD if qkv_BTKPD.dtype == torch.float64 else qkv_BTKPD.float()
    q_BTHD = wide_BTKPD[..., :group_size, :].flatten(-3, -2)
    k_BTKD = wide_BTKPD[..., group_size, :]
    if q_norm_D is not None and k_norm_D is not None:
        q_BTHD, k_BTKD = rms_norm(q_BTHD, q_norm_D, eps), rms_norm(k_BTKD, k_norm_D, eps)
    q_BTHD, k_BTKD = (apply_rotary(x, cos_BTR, sin_BTR).to(qkv_BTKPD.dtype) for x in (q_BTHD, k_BTKD))
    return q_BTHD, k_BTKD, qkv_BTKPD[..., group_size + 1, :]


def _native_takes(
    qkv_BTKPD: torch.Tensor, cos_BTR: torch.Tensor, sin_BTR: torch.Tensor, weights: tuple[torch.Tensor, ...]
) -> bool:
    """The native kernel reads fp32 tables and norm weights, and heads that are whole vectors."""
    head_dim = qkv_BTKPD.shape[-1]
    return (
        native.supports(qkv_BTKPD)
        and native.supports(cos_BTR, sin_BTR, *weights)
        and cos_BTR.dtype == torch.float32
        and head_dim % 16 == 0
        and head_dim <= 1024
    )


class _NativeSplitQkv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_BTKPD: torch.Tensor,
        cos_BTR: torch.Tensor,
        sin_BTR: torch.Tensor,
        q_norm_D: torch.Tensor | None,
        k_norm_D: torch.Tensor | None,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        qkv_BTKPD = qkv_BTKPD.contiguous()
        batch, tokens, num_kv_heads, rows, head_dim = qkv_BTKPD.shape
        cos_BTR, sin_BTR = (_table(table, batch) for table in (cos_BTR, sin_BTR))
        q_BTHD = qkv_BTKPD.new_empty(batch, tokens, num_kv_heads * (rows - 2), head_dim)
        k_BTKD = qkv_BTKPD.new_empty(batch, tokens, num_kv_heads, head_dim)
        v_BTKD = torch.empty_like(k_BTKD)
        ctx.sizes = (batch * tokens, num_kv_heads, rows - 2, head_dim, cos_BTR.shape[-1])
        ctx.table_rows, ctx.eps, ctx.shape = cos_BTR.shape[:-1].numel(), eps, qkv_BTKPD.shape
        native.function("split_qkv_forward", qkv_BTKPD.dtype)(
            *(qkv_BTKPD, cos_BTR, sin_BTR, ctx.table_rows, q_norm_D, k_norm_D, eps, q_BTHD, k_BTKD, v_BTKD),
            *(*ctx.sizes, native.threads_for(qkv_BTKPD.numel())),
        )
        ctx.save_for_backward(None if q_norm_D is None else qkv_BTKPD, cos_BTR, sin_BTR, q_norm_D, k_norm_D)
        return q_BTHD, k_BTKD, v_BTKD

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_q_BTHD: torch.Tensor, grad_k_BTKD: torch.Tensor, grad_v_BTKD: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        qkv_BTKPD, cos_BTR, sin_BTR, q_norm_D, k_norm_D = ctx.saved_tensors
        grad_q_BTHD, grad_k_BTKD, grad_v_BTKD = (g.contiguous() for g in (grad_q_BTHD, grad_k_BTKD, grad_v_BTKD))
        grad_BTKPD = grad_q_BTHD.new_empty(ctx.shape)
        threads = native.threads_for(grad_BTKPD.numel())
        grad_weights = cos_BTR.new_zeros(threads, 2, ctx.shape[-1])
        native.function("split_qkv_backward", grad_BTKPD.dtype)(
            *(grad_q_BTHD, grad_k_BTKD, grad_v_BTKD, qkv_BTKPD, cos_BTR, sin_BTR, ctx.table_rows),
            *(q_norm_D, k_norm_D, ctx.eps, grad_BTKPD, grad_weights, *ctx.sizes, threads),
        )
        grad_q_norm_D, grad_k_norm_D = (None, None) if q_norm_D is None else grad_weights.sum(0)
        return grad_BTKPD, None, None, grad_q_norm_D, grad_k_norm_D, None


def _table(table_BTR: torch.Tensor, batch: int) -> torch.Tensor:
    """One table for all rows of the batch stays one; tables of rows are laid out a row after the other."""
    if table_BTR.dim() == 2 or table_BTR.shape[0] == 1:
        return table_BTR.contiguous()
    return table_BTR.expand(batch, -1, -1).contiguous()
