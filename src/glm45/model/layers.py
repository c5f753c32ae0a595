"""The parts of a decoder layer: norm, attention, dense feed-forward.

B batch, T tokens, D hidden size, H query heads, K key/value heads, P = H / K + 2 rows of a key/value group (its
queries, its key, its value), N head size, I intermediate size.

Fused weights keep the dimension that tensor parallelism splits apart from the rest: `[K, P, N, D]` for queries, keys
and values (split over K), `[2, I, D]` for gate and up (split over I).
"""

from dataclasses import dataclass

import torch
from torch import nn

from glm45.kernels.attention import attention
from glm45.kernels.linear import linear
from glm45.kernels.norm import add_rms_norm, rms_norm
from glm45.kernels.rope import rotary_tables, split_qkv
from glm45.kernels.swiglu import swiglu
from glm45.model.cache import Cache
from glm45.model.config import ModelConfig


@dataclass(frozen=True)
class Positions:
    """Where the tokens of a forward pass stand: shared by all of its layers."""

    cos_BTR: torch.Tensor
    """Cosines of the rotary angles, fp32; R is half of the rotated dimensions."""
    sin_BTR: torch.Tensor
    """Sines of the rotary angles."""
    document_ids_BT: torch.Tensor | None
    """Equal within a document, beyond which no token sees; None if a row is one document."""
    branch_ids_BT: torch.Tensor | None = None
    """Tells branches of a document apart, which share its trunk (0); None if there are none."""

    @classmethod
    def of(
        cls,
        positions_BT: torch.Tensor,
        document_ids_BT: torch.Tensor | None,
        config: ModelConfig,
        branch_ids_BT: torch.Tensor | None = None,
    ) -> "Positions":
        """Compute the rotary tables once for all layers."""
        tables = rotary_tables(positions_BT, config.rotary_dim, config.rope_theta)
        return cls(*tables, document_ids_BT, branch_ids_BT)

    def attend(self, q_BTHN: torch.Tensor, k_BTKN: torch.Tensor, v_BTKN: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the attention output `[B, T, H, N]` among tokens that may see each other."""
        return attention(q_BTHN, k_BTKN, v_BTKN, scale, self.document_ids_BT, self.branch_ids_BT)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learnt scale; the result comes in `out_dtype`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTD: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the normed x."""
        return rms_norm(x_BTD, self.weight, self.eps, out_dtype)

    def add(
        self, residual_BTD: torch.Tensor, delta_BTD: torch.Tensor | None, out_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the residual plus delta, and its norm: one pass over memory instead of two."""
        return add_rms_norm(residual_BTD, delta_BTD, self.weight, self.eps, out_dtype)


class Weight(nn.Module):
    """A weight of any shape with an optional bias, initialised by the model; used through `kernels`."""

    def __init__(self, *shape: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))
        self.bias = nn.Parameter(torch.empty(*shape[:-1])) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by the weight with all of its output dimensions flattened, in x's dtype."""
        bias = None if self.bias is None else self.bias.flatten()
        return linear(x, self.weight.flatten(0, -2), bias)


class Attention(nn.Module):
    """Grouped-query attention with partial RoPE and optional per-head QK-norm (report section 2.1)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.eps = config.rms_norm_eps
        self.scale = config.head_dim**-0.5
        group_rows = config.num_attention_heads // config.num_key_value_heads + 2
        shape = (config.num_key_value_heads, group_rows, config.head_dim, config.hidden_size)
        self.qkv_proj = Weight(*shape, bias=config.attention_bias)
        self.o_proj = Weight(config.hidden_size, config.num_attention_heads * config.head_dim)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.use_qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.use_qk_norm else None

    def project(self, x_BTD: torch.Tensor, positions: Positions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q `[B, T, H, N]`, k and v `[B, T, K, N]`, normed per head and rotated."""
        group_shape = self.qkv_proj.weight.shape[:-1]
        qkv_BTKPN = self.qkv_proj(x_BTD).unflatten(-1, group_shape)
        q_norm = None if self.q_norm is None else self.q_norm.weight
        k_norm = None if self.k_norm is None else self.k_norm.weight
        return split_qkv(qkv_BTKPN, positions.cos_BTR, positions.sin_BTR, q_norm, k_norm, self.eps)

    def forward(self, x_BTD: torch.Tensor, positions: Positions, cache: Cache | None = None) -> torch.Tensor:
        """Return the attention output `[B, T, D]`; with a cache, over its tokens too."""
        q_BTHN, k_BTKN, v_BTKN = self.project(x_BTD, positions)
        if cache is None:
            o_BTHN = positions.attend(q_BTHN, k_BTKN, v_BTKN, self.scale)
        else:
            o_BTHN = cache.attend(self.layer, q_BTHN, k_BTKN, v_BTKN, self.scale)
        return self.o_proj(o_BTHN.flatten(-2))


class DenseMLP(nn.Module):
    """SwiGLU feed-forward: the dense first layers, and the shared expert."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Weight(2, intermediate_size, hidden_size)
        self.down_proj = Weight(hidden_size, intermediate_size)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return `down(silu(gate(x)) * up(x))`."""
        return self.down_proj(swiglu(self.gate_up_proj(x_BTD)))
