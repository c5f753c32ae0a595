"""Multi-token prediction: one more MoE layer that predicts the token after the next (report section 2.1).

B batch, T tokens, D hidden size, V vocabulary.
"""

import torch
from torch import nn

from glm45.model.cache import Cache
from glm45.model.config import ModelConfig
from glm45.model.layers import Positions, RMSNorm, Weight
from glm45.model.moe import RouterOutput


class MTPLayer(nn.Module):
    """`layer(eh_proj([enorm(embedding of t+1), hnorm(hidden)]))`, then a norm, then the model's own head.

    The hidden state that goes in is the model's output *after* its final norm. The report does not say which; every
    deployed implementation does it so: vLLM and SGLang hand the MTP layer what the logits are computed from, and so
    does transformers (`generate(use_mtp=True)`), so a checkpoint trained otherwise would draft badly in all of them.
    For further drafts the layer is applied again to its own output after its norm, as transformers does.
    """

    def __init__(self, config: ModelConfig, layer: nn.Module) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Weight(config.hidden_size, 2 * config.hidden_size)
        self.layer = layer
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def combine(self, next_embeddings_BTD: torch.Tensor, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Return the layer's input `[B, T, D]` from the next tokens' embeddings and the hidden states."""
        dtype = hidden_BTD.dtype
        pair = [self.enorm(next_embeddings_BTD, out_dtype=dtype), self.hnorm(hidden_BTD, out_dtype=dtype)]
        return self.eh_proj(torch.cat(pair, dim=-1))

    def forward(
        self,
        next_embeddings_BTD: torch.Tensor,
        hidden_BTD: torch.Tensor,
        positions: Positions,
        cache: Cache | None = None,
        expert_ids_MK: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, RouterOutput]:
        """Return the normed hidden states `[B, T, D]`, in the dtype of `hidden`, and the router's output."""
        residual_BTD = self.combine(next_embeddings_BTD, hidden_BTD).to(next_embeddings_BTD.dtype)
        residual_BTD, delta_BTD, routed = self.layer(residual_BTD, None, positions, cache, expert_ids_MK)
        _, normed_BTD = self.norm.add(residual_BTD, delta_BTD, hidden_BTD.dtype)
        return normed_BTD, routed


def shift_left(x_BT: torch.Tensor, document_ids_BT: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every position's successor and whether there is one in the same document.

    Where there is none the returned value is 0; what is computed from it must be masked.
    """
    shifted_BT = torch.zeros_like(x_BT)
    shifted_BT[:, :-1] = x_BT[:, 1:]
    has_next_BT = torch.zeros_like(x_BT, dtype=torch.bool)
    has_next_BT[:, :-1] = True
    if document_ids_BT is not None:
        has_next_BT[:, :-1] = document_ids_BT[:, 1:] == document_ids_BT[:, :-1]
    return shifted_BT * has_next_BT, has_next_BT
