"""Keys and values of earlier tokens: what attention asks of a cache, and the plain contiguous one.

B batch, T new tokens, S stored tokens, H query heads, K key/value heads, D head size.
"""

from typing import Protocol

import torch
import torch.nn.functional as F

from glm45.model.config import ModelConfig


class Cache(Protocol):
    """What the attention layers need of a cache; the engine's paged cache is another implementation."""

    def attend(
        self, layer: int, q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Store the new keys and values of `layer` and return the attention output `[B, T, H, D]`.

        q and k are already normed and rotated. Layers count from 0; the MTP layer is `num_hidden_layers`.
        """
        ...


class KVCache:
    """Keys and values of a batch of equally long sequences, in one preallocated tensor.

    Every layer advances by itself, so that the MTP layer may lag behind or run ahead of the main layers.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        num_layers = config.num_hidden_layers + config.num_nextn_predict_layers
        shape = (num_layers, 2, batch_size, max_length, config.num_key_value_heads, config.head_dim)
        self.stored = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * num_layers
        self.max_length = max_length

    @property
    def length(self) -> int:
        """Tokens held by the first layer: the position of the next token."""
        return self.lengths[0]

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on, in every layer (rejected drafts)."""
        self.lengths = [min(held, length) for held in self.lengths]

    def attend(
        self, layer: int, q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `Cache.attend`. Raises ValueError when the cache is full."""
        start, end = self.lengths[layer], self.lengths[layer] + q_BTHD.shape[1]
        if end > self.max_length:
            raise ValueError(f"cache of {self.max_length} tokens is full: {end} needed; make max_length larger")
        self.stored[layer, 0, :, start:end] = k_BTKD
        self.stored[layer, 1, :, start:end] = v_BTKD
        self.lengths[layer] = end
        k_BSKD, v_BSKD = self.stored[layer, :, :, :end].to(q_BTHD.dtype)
        seen_TS = torch.ones(end - start, end, dtype=torch.bool, device=q_BTHD.device).tril(start)
        o_BHTD = F.scaled_dot_product_attention(
            q_BTHD.transpose(1, 2),
            k_BSKD.transpose(1, 2),
            v_BSKD.transpose(1, 2),
            attn_mask=seen_TS,
            scale=scale,
            enable_gqa=True,
        )
        return o_BHTD.transpose(1, 2)
