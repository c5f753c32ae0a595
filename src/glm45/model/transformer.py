"""The GLM-4.5 model: one definition for training, decoding and drafting.

B batch, T tokens, D hidden size, V vocabulary, L MoE layers (the MTP layer last), E routed experts, M = B * T,
K experts a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpointed

from glm45.model.cache import Cache
from glm45.model.config import ModelConfig
from glm45.model.layers import Attention, DenseMLP, Positions, RMSNorm, Weight
from glm45.model.moe import MoE, Router, RouterOutput, update_bias
from glm45.model.mtp import MTPLayer, shift_left


@dataclass(frozen=True)
class RouterStatistics:
    """What all routers decided in one forward pass."""

    loads_LE: torch.Tensor
    """Tokens that went to each expert, fp32, no gradient."""
    balance_loss: torch.Tensor
    """Sequence-level balance loss, summed over layers, not yet weighted; 0 in evaluation."""
    expert_ids: list[torch.Tensor]
    """The chosen experts `[M, K]` of each MoE layer; pass them to `forward` again for routing replay."""


@dataclass(frozen=True)
class ModelOutput:
    """What one forward pass gives."""

    hidden_BTD: torch.Tensor
    """Hidden states after the final norm, in the compute dtype."""
    logits_BTV: torch.Tensor | None
    """Next-token logits, or None for `output="hidden"`."""
    mtp_hidden_BTD: torch.Tensor | None
    """The MTP layer's normed hidden states: position i predicts token i + 2. None unless asked for."""
    mtp_logits_BTV: torch.Tensor | None
    """The MTP layer's logits. None unless asked for together with logits."""
    router: RouterStatistics
    """Loads, balance loss and choices of the MoE layers."""


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, with the addition to the residual left to the next norm.

    `residual` and `delta` travel apart so that adding and norming is one pass over memory, and so that the residual
    can stay in fp32 while everything else is in bf16.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = layer < config.first_k_dense_replace
        self.mlp = DenseMLP(config.hidden_size, config.intermediate_size) if dense else MoE(config)
        self.compute_dtype = torch.float32

    def forward(
        self,
        residual_BTD: torch.Tensor,
        delta_BTD: torch.Tensor | None,
        positions: Positions,
        cache: Cache | None = None,
        expert_ids_MK: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, RouterOutput | None]:
        """Return the residual, what is yet to be added to it, and the router's output (None for a dense layer)."""
        residual_BTD, x_BTD = self.input_layernorm.add(residual_BTD, delta_BTD, self.compute_dtype)
        delta_BTD = self.self_attn(x_BTD, positions, cache)
        residual_BTD, x_BTD = self.post_attention_layernorm.add(residual_BTD, delta_BTD, self.compute_dtype)
        if isinstance(self.mlp, MoE):
            return residual_BTD, *self.mlp(x_BTD, positions.document_ids_BT, expert_ids_MK)
        return residual_BTD, self.mlp(x_BTD), None


class Glm45(nn.Module):
    """The model. Parameters are created in fp32, uninitialised on the meta device and initialised elsewhere.

    `compute_dtype` is the dtype of matrix products and activations; the residual stream, norms, router, softmax and
    losses are in fp32 (or fp64 if the parameters are). There is no autocast.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device(device or "cpu"):
            self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.lm_head = Weight(config.vocab_size, config.hidden_size)
            self.mtp = None
            if config.num_nextn_predict_layers:
                self.mtp = MTPLayer(config, DecoderLayer(config, config.num_hidden_layers))
        self.set_compute_dtype(compute_dtype)
        if self.device.type != "meta":
            self.reset_parameters(seed)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embed_tokens.weight.device

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Choose the dtype of matrix products and activations from now on."""
        self.compute_dtype = dtype
        for layer in self.decoder_layers():
            layer.compute_dtype = dtype

    def set_rope_theta(self, theta: float) -> None:
        """Change the RoPE base from now on, at the switch to long sequences (report section 2.4)."""
        values = {**self.config.to_hub(), "rope_theta": theta, "rope_parameters": None}
        self.config = ModelConfig.from_hub(values)

    def decoder_layers(self) -> list[DecoderLayer]:
        """Every decoder layer, the MTP layer's last; index i is the layer that a cache knows as i."""
        layers = [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
        return layers if self.mtp is None else [*layers, self.mtp.layer]  # type: ignore[list-item]

    def moe_layers(self) -> list[MoE]:
        """Every mixture-of-experts block in the order of the rows of `loads_LE`."""
        return [layer.mlp for layer in self.decoder_layers() if isinstance(layer.mlp, MoE)]

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draw all weights from N(0, initializer_range); norms become 1, biases 0 (published configuration)."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1)
            if isinstance(module, Router):
                module.e_score_correction_bias.zero_()
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    parameter.zero_()
                elif not isinstance(module, RMSNorm):
                    parameter.normal_(0, self.config.initializer_range, generator=generator)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        branch_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        output: Literal["logits", "hidden"] = "logits",
        mtp: bool = False,
        checkpoint: bool = False,
        expert_ids: Sequence[torch.Tensor] | None = None,
    ) -> ModelOutput:
        """Run tokens `[B, T]` through the model.

        `document_ids` `[B, T]` mark packed documents (contiguous, -1 is padding), which see each other neither in
        attention nor in positions nor in the MTP shift. `positions` default to counting from 0 in every document;
        with a `cache` they must be given. `branch_ids` `[B, T]` let continuations of one beginning share it (see
        `kernels.attention`); `positions` must then say where each goes on. `checkpoint` recomputes each layer in
        backward instead of keeping its activations. `expert_ids` replays earlier choices of the routers. Raises
        ValueError for arguments that contradict each other.
        """
        self._check(tokens_BT, positions, document_ids, branch_ids, cache, mtp)
        if positions is None:
            positions = document_positions(tokens_BT, document_ids)
        where = Positions.of(positions, document_ids, self.config, branch_ids)
        residual_BTD, delta_BTD, routed = self.embed(tokens_BT), None, []
        replay = iter(expert_ids) if expert_ids is not None else None
        for layer in self.layers:
            chosen = next(replay) if replay is not None and isinstance(layer.mlp, MoE) else None
            arguments = (residual_BTD, delta_BTD, where, cache, chosen)
            if checkpoint:
                residual_BTD, delta_BTD, decided = checkpointed(layer, *arguments, use_reentrant=False)
            else:
                residual_BTD, delta_BTD, decided = layer(*arguments)
            routed += [decided] if decided is not None else []
        _, hidden_BTD = self.norm.add(residual_BTD, delta_BTD, self.compute_dtype)
        mtp_hidden_BTD = None
        if mtp:
            assert self.mtp is not None
            next_BT, has_next_BT = shift_left(tokens_BT, document_ids)
            next_BTD = self.embed(next_BT, has_next_BT)
            arguments = (next_BTD, hidden_BTD, where, cache, next(replay) if replay is not None else None)
            if checkpoint:
                mtp_hidden_BTD, decided = checkpointed(self.mtp, *arguments, use_reentrant=False)
            else:
                mtp_hidden_BTD, decided = self.mtp(*arguments)
            routed.append(decided)
        with_logits = output == "logits"
        return ModelOutput(
            hidden_BTD=hidden_BTD,
            logits_BTV=self.lm_head(hidden_BTD) if with_logits else None,
            mtp_hidden_BTD=mtp_hidden_BTD,
            mtp_logits_BTV=self.lm_head(mtp_hidden_BTD) if with_logits and mtp_hidden_BTD is not None else None,
            router=self._statistics(routed),
        )

    def draft(
        self, next_tokens_BT: torch.Tensor, hidden_BTD: torch.Tensor, positions: torch.Tensor, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict token i + 2 from token i + 1 and the hidden state of i (after the final norm).

        Returns logits `[B, T, V]` and the MTP layer's normed hidden states, to be fed again for a further draft.
        `positions` are those of the hidden states.
        """
        if self.mtp is None:
            raise ValueError("this model has no MTP layer (num_nextn_predict_layers is 0): it cannot draft")
        where = Positions.of(positions, None, self.config)
        drafted_BTD, _ = self.mtp(self.embed(next_tokens_BT), hidden_BTD, where, cache)
        return self.lm_head(drafted_BTD), drafted_BTD

    def embed(self, tokens_BT: torch.Tensor, kept_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Return the residual stream's start: embeddings in fp32, or fp64 if the parameters are.

        They are zero where `kept` is false. Sequence parallelism replaces this method by one that returns its part
        of the tokens.
        """
        rows_BTD = nn.functional.embedding(tokens_BT, self.embed_tokens.weight)
        rows_BTD = rows_BTD.to(torch.promote_types(rows_BTD.dtype, torch.float32))
        return rows_BTD if kept_BT is None else rows_BTD * kept_BT.unsqueeze(-1)

    def update_router_bias(self, loads_LE: torch.Tensor, rate: float) -> None:
        """Apply loss-free balance to every MoE layer, with loads already summed over micro-batches and ranks."""
        for layer, load_E in zip(self.moe_layers(), loads_LE, strict=True):
            update_bias(layer.gate.e_score_correction_bias, load_E, rate)

    def _check(
        self,
        tokens_BT: torch.Tensor,
        positions: torch.Tensor | None,
        document_ids: torch.Tensor | None,
        branch_ids: torch.Tensor | None,
        cache: Cache | None,
        mtp: bool,
    ) -> None:
        if tokens_BT.dim() != 2 or tokens_BT.numel() == 0:
            raise ValueError(f"tokens must be [batch, length] and not empty, not of shape {list(tokens_BT.shape)}")
        if cache is not None and positions is None:
            raise ValueError("with a cache, give positions: the model does not know how much the cache holds")
        if cache is not None and document_ids is not None:
            raise ValueError("document_ids and a cache exclude each other: a cache knows its own sequences")
        if branch_ids is not None and (document_ids is None or positions is None):
            raise ValueError("branch_ids need document_ids, and positions that say where each branch goes on")
        if branch_ids is not None and mtp:
            raise ValueError("mtp=True with branch_ids: the token after a trunk is another one in every branch")
        if cache is not None and mtp:
            raise ValueError("with a cache, draft with `draft`: the next tokens are not known yet")
        if mtp and self.mtp is None:
            raise ValueError("mtp=True, but this model has no MTP layer (num_nextn_predict_layers is 0)")

    def _statistics(self, routed: list[RouterOutput]) -> RouterStatistics:
        if not routed:
            nothing = torch.zeros(0, self.config.n_routed_experts, device=self.device)
            return RouterStatistics(nothing, nothing.sum(), [])
        loads, losses, expert_ids = zip(*routed, strict=True)
        return RouterStatistics(torch.stack(loads), torch.stack(losses).sum(), list(expert_ids))


def document_positions(tokens_BT: torch.Tensor, document_ids_BT: torch.Tensor | None) -> torch.Tensor:
    """Return positions `[B, T]` (or `[1, T]`) that count from 0 in every document."""
    counting_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    if document_ids_BT is None:
        return counting_T[None]
    starts_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    starts_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    first_BT = torch.where(starts_BT, counting_T, torch.zeros_like(counting_T)).cummax(dim=1).values
    return counting_T - first_BT


def parameter_groups(model: Glm45) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Return named parameters sorted into embeddings, head, norms, biases and matrices (report section 2.4).

    Muon trains the matrices (and the head, by choice); AdamW the rest.
    """
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {
        name: [] for name in ("embedding", "head", "norm", "bias", "matrix")
    }
    for name, parameter in model.named_parameters():
        if name == "embed_tokens.weight":
            groups["embedding"].append((name, parameter))
        elif name == "lm_head.weight":
            groups["head"].append((name, parameter))
        elif name.endswith("bias"):
            groups["bias"].append((name, parameter))
        elif parameter.dim() == 1:
            groups["norm"].append((name, parameter))
        else:
            groups["matrix"].append((name, parameter))
    return groups
