"""Causal grouped-query attention within documents.

B batch, T tokens, H query heads, K key/value heads (H a multiple of K), D head size.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from glm45.kernels import native

HALVES = (torch.bfloat16, torch.float16)


def attention(
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    scale: float,
    document_ids_BT: torch.Tensor | None = None,
    branch_ids_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `[B, T, H, D]`: every token attends to itself and the earlier tokens of its own document.

    `document_ids` are equal within a document, and documents are contiguous (-1, padding, is a document like any
    other). None means one document a row. Query head `h` reads key/value head `h // (H / K)`.

    `branch_ids` let several continuations share a beginning: a document's trunk, first and numbered 0, is seen by all
    of its branches, contiguous and numbered from 1, which do not see each other. They need `document_ids`.
    """
    if branch_ids_BT is not None and document_ids_BT is None:
        raise ValueError("branch_ids need document_ids: branches belong to documents")
    if native.supports(q_BTHD, k_BTKD, v_BTKD) and q_BTHD.shape[-1] % 16 == 0:
        return _NativeAttention.apply(q_BTHD, k_BTKD, v_BTKD, scale, document_ids_BT, branch_ids_BT)
    varlen = q_BTHD.is_cuda and q_BTHD.dtype in HALVES and branch_ids_BT is None
    if varlen and document_ids_BT is not None and varlen_attention():
        return _varlen_attention(q_BTHD, k_BTKD, v_BTKD, scale, document_ids_BT)
    return _attention_reference(q_BTHD, k_BTKD, v_BTKD, scale, document_ids_BT, branch_ids_BT)


def document_mask(document_ids_BT: torch.Tensor, branch_ids_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Return `[B, 1, T, T]`, true where a query (third dimension) may see a key (fourth)."""
    seen_BTT = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    if branch_ids_BT is not None:
        same_BTT = branch_ids_BT[:, :, None] == branch_ids_BT[:, None, :]
        seen_BTT = seen_BTT & (same_BTT | (branch_ids_BT == 0)[:, None, :])
    return seen_BTT.tril().unsqueeze(1)


def _attention_reference(
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    scale: float,
    document_ids_BT: torch.Tensor | None,
    branch_ids_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    mask = None if document_ids_BT is None else document_mask(document_ids_BT, branch_ids_BT)
    o_BHTD = F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2),
        k_BTKD.transpose(1, 2),
        v_BTKD.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return o_BHTD.transpose(1, 2)


@functools.cache
def varlen_attention() -> Callable[..., Any] | None:
    """Return torch's attention over packed sequences (GPU only), or None where this torch has none that fits."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    needed = {"scale", "window_size", "enable_gqa"}
    return varlen_attn if needed <= set(inspect.signature(varlen_attn).parameters) else None


def _varlen_attention(
    q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, scale: float, document_ids_BT: torch.Tensor
) -> torch.Tensor:
    """Attend within each document as one sequence of a ragged batch: no mask, and no work across documents."""
    attend = varlen_attention()
    assert attend is not None
    batch, tokens = document_ids_BT.shape
    starts_N = document_starts(document_ids_BT)
    flat = (x.flatten(0, 1).contiguous() for x in (q_BTHD, k_BTKD, v_BTKD))
    out_ND = attend(*flat, starts_N, starts_N, tokens, tokens, scale=scale, window_size=(-1, 0), enable_gqa=True)
    return out_ND.view(batch, tokens, *q_BTHD.shape[2:])


def document_starts(document_ids_BT: torch.Tensor) -> torch.Tensor:
    """Return where each document begins in the flattened batch, and where the last one ends, `[documents + 1]` int32.

    A new row begins a new document, whatever its number.
    """
    first_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    first_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    starts_N = first_BT.flatten().nonzero().flatten()
    return torch.cat([starts_N, starts_N.new_tensor([document_ids_BT.numel()])]).int()


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHD: torch.Tensor,
        k_BTKD: torch.Tensor,
        v_BTKD: torch.Tensor,
        scale: float,
        document_ids_BT: torch.Tensor | None,
        branch_ids_BT: torch.Tensor | None,
    ) -> torch.Tensor:
        q_BTHD, k_BTKD, v_BTKD = q_BTHD.contiguous(), k_BTKD.contiguous(), v_BTKD.contiguous()
        runs = [None if ids is None else ids.long().contiguous() for ids in (document_ids_BT, branch_ids_BT)]
        batch, tokens, num_heads, head_dim = q_BTHD.shape
        num_kv_heads = k_BTKD.shape[2]
        o_BTHD = torch.empty_like(q_BTHD)
        log_sums_BHT = q_BTHD.new_empty(batch, num_heads, tokens, dtype=torch.float32)
        ctx.sizes = (batch, tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
        ctx.scale, ctx.threads = scale, native.threads_for(q_BTHD.numel())
        native.function("attention_forward", q_BTHD.dtype)(
            *(q_BTHD, k_BTKD, v_BTKD, *runs, scale, o_BTHD, log_sums_BHT, *ctx.sizes, ctx.threads)
        )
        ctx.save_for_backward(q_BTHD, k_BTKD, v_BTKD, log_sums_BHT, *runs)
        return o_BTHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_BTHD, k_BTKD, v_BTKD, log_sums_BHT, *runs = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (q_BTHD, k_BTKD, v_BTKD)]
        native.function("attention_backward", q_BTHD.dtype)(
            *(grad_BTHD.contiguous(), q_BTHD, k_BTKD, v_BTKD, *runs, ctx.scale, log_sums_BHT, *gradients),
            *(*ctx.sizes, ctx.threads),
        )
        return *gradients, None, None, None
