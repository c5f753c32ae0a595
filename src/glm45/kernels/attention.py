"""Causal grouped-query attention within documents.

B batch, T tokens, H query heads, K key/value heads (H a multiple of K), D head size.
"""

import torch
import torch.nn.functional as F


def attention(
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    scale: float,
    document_ids_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `[B, T, H, D]`: every token attends to itself and the earlier tokens of its own document.

    `document_ids` are equal within a document, and documents are contiguous (-1, padding, is a document like any
    other). None means one document a row. Query head `h` reads key/value head `h // (H / K)`.
    """
    return _attention_reference(q_BTHD, k_BTKD, v_BTKD, scale, document_ids_BT)


def document_mask(document_ids_BT: torch.Tensor) -> torch.Tensor:
    """Return `[B, 1, T, T]`, true where a query (third dimension) may see a key (fourth)."""
    same_BTT = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    return same_BTT.tril().unsqueeze(1)


def _attention_reference(
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    scale: float,
    document_ids_BT: torch.Tensor | None,
) -> torch.Tensor:
    mask = None if document_ids_BT is None else document_mask(document_ids_BT)
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
