"""The fast backend on CPU: `kernels.decode` over a packed copy of the weights, held to `backend` by tests.

The copy is taken at `refresh`, so that training may go on changing the parameters while the engine generates.

N rows, D hidden size, V vocabulary.
"""

from collections.abc import Callable

import numpy as np
import torch

from glm45.engine.batch import Batch
from glm45.engine.sampling import Draws
from glm45.kernels import decode
from glm45.kernels.rope import rotary_tables
from glm45.model.moe import MoE
from glm45.model.transformer import DecoderLayer, Glm45


def why_not(model: Glm45, block_size: int) -> str | None:
    """Say why the native backend cannot serve a model here, or None if it can."""
    config = model.config
    group_rows = (config.num_attention_heads // config.num_key_value_heads + 2) * config.head_dim
    reasons = {
        f"the model is on {model.device}": model.device.type != "cpu",
        f"products are in {model.compute_dtype}": model.compute_dtype not in (torch.float32, torch.bfloat16),
        f"block_size is {block_size}, not {decode.BLOCK_SIZE}": block_size != decode.BLOCK_SIZE,
        f"head_dim {config.head_dim} is none of {decode.HEAD_SIZES}": config.head_dim not in decode.HEAD_SIZES,
        f"hidden_size {config.hidden_size} is not a multiple of 16": config.hidden_size % 16 != 0,
        f"{group_rows} rows of a key/value group are no multiple of {decode.PANEL}": group_rows % decode.PANEL != 0,
        f"n_group is {config.n_group}": config.n_group > 1,
        "the kernels are not available": not decode.is_available(model.compute_dtype == torch.bfloat16),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class NativeBackend:
    """See `backend.Backend`."""

    name = "native"

    def __init__(self, model: Glm45, num_blocks: int, block_size: int, num_threads: int, max_length: int) -> None:
        reason = why_not(model, block_size)
        if reason is not None:
            raise ValueError(f"the native backend cannot serve this model: {reason}; use backend='model'")
        self.model = model
        self._decoder = decode.Decoder(num_threads, model.compute_dtype == torch.bfloat16)
        self._copies: list[tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], object]]] = []
        self._max_length = max_length
        self._memory = decode.Memory(self._measure())
        self._shape = self._build_shape()
        layers = model.decoder_layers()
        self._cache, pointers = self._build_cache(len(layers), num_blocks)
        built = [self._build_layer(layer, *where) for layer, where in zip(layers, pointers, strict=True)]
        num_layers = model.config.num_hidden_layers
        self._layers = (decode.Layer * num_layers)(*built[:num_layers])
        self._norm = self._plain(lambda: model.norm.weight)
        self._mtp_layers = (decode.Layer * (len(built) - num_layers))(*built[num_layers:])
        if model.mtp is not None:
            mtp = model.mtp
            self._mtp = decode.Mtp(
                embedding_norm=self._plain(lambda: mtp.enorm.weight),
                hidden_norm=self._plain(lambda: mtp.hnorm.weight),
                combine=self._packed(lambda: mtp.eh_proj.weight),
            )
            self._mtp_norm = self._plain(lambda: mtp.norm.weight)
        self.refresh()

    def forward(self, batch: Batch) -> torch.Tensor:
        """See `Backend`."""
        return self._decoder.forward(self._shape, self._layers, self._norm, _rows(batch))

    def draft(
        self, batch: Batch, hidden: torch.Tensor, chosen: list[int], draws: Draws, num_drafts: int
    ) -> tuple[list[list[int]], torch.Tensor]:
        """See `Backend`."""
        last_rows = batch.starts_S1[1:][chosen] - 1
        layers, hidden = self._mtp_layers, hidden.contiguous()
        tokens, probs = self._decoder.draft(
            *(self._shape, layers, self._mtp, self._mtp_norm, _rows(batch), hidden, last_rows),
            *(_draws(draws), num_drafts),
        )
        return tokens.tolist(), probs

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Backend`."""
        return self._decoder.head(self._shape, hidden.contiguous(), np.arange(len(hidden), dtype=np.int32))

    def sample(self, logits: torch.Tensor, draws: Draws) -> tuple[list[list[int]], list[list[float]]]:
        """See `Backend`."""
        drafts = np.array([token for tokens in draws.drafts for token in tokens], np.int32)
        return self._decoder.sample(logits, _draws(draws), draws.starts, drafts, draws.draft_probs)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """See `Backend`."""
        sources, targets = zip(*copies, strict=True)
        self._cache[:, :, list(targets)] = self._cache[:, :, list(sources)]

    def refresh(self) -> None:
        """See `Backend`: copy and pack every weight."""
        for source, write in self._copies:
            write(source())

    def _measure(self) -> int:
        """Bytes of all weights, packed or plain, with room for alignment."""
        model, config = self.model, self.model.config
        total = 2 * self._max_length * config.rotary_dim * 4
        for name, tensor in model.state_dict().items():
            if name.endswith(("_proj.weight", "_proj", "lm_head.weight")):
                total += self._decoder.packed_bytes(tensor, gated="gate_up_proj" in name) + 64
            else:
                total += tensor.numel() * 4 + 64
        return total

    def _build_shape(self) -> decode.Shape:
        model, config = self.model, self.model.config
        positions = torch.arange(self._max_length)
        tables = [lambda i=i: rotary_tables(positions, config.rotary_dim, model.config.rope_theta)[i] for i in (0, 1)]
        return decode.Shape(
            hidden=config.hidden_size,
            groups=config.num_key_value_heads,
            group_heads=config.num_attention_heads // config.num_key_value_heads,
            head_dim=config.head_dim,
            rotary_half=config.rotary_dim // 2,
            experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            moe_width=config.moe_intermediate_size,
            vocab=config.vocab_size,
            norm_top_k=config.norm_topk_prob,
            eps=config.rms_norm_eps,
            scale=config.head_dim**-0.5,
            routed_scale=config.routed_scaling_factor,
            embeddings=self._plain(lambda: model.embed_tokens.weight),
            cosines=self._plain(tables[0]),
            sines=self._plain(tables[1]),
            head=self._packed(lambda: model.lm_head.weight),
        )

    def _build_cache(self, num_layers: int, num_blocks: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Return keys and values `[layer, 2, block, ...]` and each layer's two addresses."""
        config = self.model.config
        size = config.num_key_value_heads * config.head_dim * decode.BLOCK_SIZE
        num_bytes = num_layers * 2 * num_blocks * size * 4
        cache = decode.Memory(num_bytes).take(num_bytes).view(np.float32).reshape(num_layers, 2, num_blocks, size)
        return cache, [(layer[0].ctypes.data, layer[1].ctypes.data) for layer in cache]

    def _build_layer(self, layer: DecoderLayer, keys: int, values: int) -> decode.Layer:
        attention, mlp = layer.self_attn, layer.mlp
        bias, q_norm, k_norm = attention.qkv_proj.bias, attention.q_norm, attention.k_norm
        fields: dict[str, int | None] = {}
        if isinstance(mlp, MoE):
            fields |= {
                "router": self._plain(lambda: mlp.gate.weight),
                "router_bias": self._plain(lambda: mlp.gate.e_score_correction_bias),
                "expert_gate_up": self._packed(lambda: mlp.experts.gate_up_proj, gated=True),
                "expert_down": self._packed(lambda: mlp.experts.down_proj),
            }
        dense = mlp.shared_experts if isinstance(mlp, MoE) else mlp
        if dense is not None:
            fields |= {
                "gate_up": self._packed(lambda: dense.gate_up_proj.weight, gated=True),
                "down": self._packed(lambda: dense.down_proj.weight),
                "width": dense.down_proj.weight.shape[1],
            }
        return decode.Layer(
            input_norm=self._plain(lambda: layer.input_layernorm.weight),
            post_norm=self._plain(lambda: layer.post_attention_layernorm.weight),
            q_norm=None if q_norm is None else self._plain(lambda: q_norm.weight),
            k_norm=None if k_norm is None else self._plain(lambda: k_norm.weight),
            qkv_bias=None if bias is None else self._plain(lambda: bias),
            qkv=self._packed(lambda: attention.qkv_proj.weight.flatten(0, 2)),
            o_proj=self._packed(lambda: attention.o_proj.weight),
            keys=keys,
            values=values,
            **fields,
        )

    def _plain(self, source: Callable[[], torch.Tensor]) -> int:
        """Take memory for an fp32 copy of a tensor; return its address."""
        tensor = source()
        copy = torch.from_numpy(self._memory.take(tensor.numel() * 4).view(np.float32)).view(tensor.shape)
        self._copies.append((source, lambda tensor: copy.copy_(tensor.detach())))
        return copy.data_ptr()

    def _packed(self, source: Callable[[], torch.Tensor], gated: bool = False) -> int:
        """Take memory for a packed copy of a weight; return its address."""
        packed = self._memory.take(self._decoder.packed_bytes(source(), gated))
        self._copies.append((source, lambda tensor: self._decoder.pack(tensor, packed, gated)))
        return packed.ctypes.data


def _rows(batch: Batch) -> decode.Rows:
    arrays = (batch.tokens_N, batch.positions_N, batch.slots_N, batch.sequence_of_row)
    return decode.Rows.of((*arrays, batch.blocks_B, batch.block_starts_S1), batch.first_slot)


def _draws(draws: Draws) -> decode.Draws:
    return decode.Draws.of(draws.temperatures_S, draws.seeds_S, draws.positions_S)
