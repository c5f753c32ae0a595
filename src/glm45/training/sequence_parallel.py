"""Parts of sequences: tensor parallelism with sequence parallelism between the blocks, and Ulysses for long rows.

Every rank reads whole rows of token ids, which are small, and keeps its part of the tokens from the embedding on:
context parallelism divides a row first, tensor parallelism each part again. B rows, T tokens, D hidden size, H query
heads, K key/value heads, N head size, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from glm45.model.layers import Attention, DenseMLP, Positions
from glm45.model.moe import MoE, sequence_balance_loss
from glm45.model.transformer import Glm45
from glm45.training.collectives import exchange, gather_sequence, scatter_sum_sequence

SHARDED_DIMS = {
    "qkv_proj.weight": 0,
    "qkv_proj.bias": 0,
    "o_proj.weight": 1,
    "experts.gate_up_proj": 2,
    "experts.down_proj": 2,
    "gate_up_proj.weight": 1,
    "down_proj.weight": 1,
}
"""Dimension that tensor parallelism divides, by the end of the name: groups of heads, or feed-forward width."""


def take_tokens(model: Glm45, part: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Make the model's embedding return this rank's part of the tokens; everything after it follows."""
    embed = model.embed

    def embed_part(tokens_BT: torch.Tensor, kept_BT: torch.Tensor | None = None) -> torch.Tensor:
        return embed(part(tokens_BT), None if kept_BT is None else part(kept_BT))

    model.embed = embed_part  # type: ignore


def divide_widths(model: Glm45, mesh: DeviceMesh, moe: bool) -> None:
    """Tensor parallelism: this rank's heads and feed-forward columns; whole sequences inside a block, parts between.

    Mixture-of-experts blocks stay as they are, and see parts of sequences, unless `moe`.
    """
    group = mesh.get_group()
    for layer in model.decoder_layers():
        for block in (layer.self_attn, layer.mlp):
            if isinstance(block, MoE) and not moe:
                continue
            _shard_weights(block, mesh)
            if isinstance(block, MoE):
                _wrap_moe(block, group)
            else:
                _wrap(block, group)


def _shard_weights(block: nn.Module, mesh: DeviceMesh) -> None:
    for path, parameter in list(block.named_parameters()):
        dim = next((dim for end, dim in SHARDED_DIMS.items() if path.endswith(end)), None)
        if dim is not None:
            part = parameter.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()].contiguous().clone()
            sharded = DTensor.from_local(part, mesh, [Shard(dim)], run_check=False)
            owner, _, name = path.rpartition(".")
            block.get_submodule(owner).register_parameter(name, nn.Parameter(sharded))


def _wrap(block: Attention | DenseMLP, group: ProcessGroup) -> None:
    forward = block.forward

    def whole_sequence(x_BTD: torch.Tensor, *arguments: Any) -> torch.Tensor:
        with local_weights(block):
            return scatter_sum_sequence(forward(gather_sequence(x_BTD, group), *arguments), group)

    block.forward = whole_sequence  # type: ignore


def _wrap_moe(block: MoE, group: ProcessGroup) -> None:
    forward = block.forward

    def whole_sequence(x_BTD: torch.Tensor, *arguments: Any) -> Any:
        with local_weights(block):
            out_BTD, routed = forward(gather_sequence(x_BTD, group), *arguments)
        # All ranks of the group route the same tokens; each answers for its share of what is summed over ranks.
        routed = routed._replace(load_E=routed.load_E / group.size(), balance_loss=routed.balance_loss / group.size())
        return scatter_sum_sequence(out_BTD, group), routed

    block.forward = whole_sequence  # type: ignore


@contextmanager
def local_weights(block: nn.Module) -> Iterator[None]:
    """Let a block compute with this rank's part of its sharded weights."""
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                swapped.append((module, name, parameter))
                module._parameters[name] = parameter.to_local()  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, name, parameter in swapped:
            module._parameters[name] = parameter  # type: ignore[assignment]


def trade_heads(model: Glm45, group: ProcessGroup, part: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Context parallelism (Ulysses): in attention, ranks trade tokens for heads; `part` cuts this rank's tokens."""
    for layer in model.decoder_layers():
        _trade_heads(layer.self_attn, group, part)


def balance_parts(model: Glm45, group: ProcessGroup, part: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let experts' blocks see parts of sequences; the balance loss of a sequence is that of all ranks of `group`."""
    for block in model.moe_layers():
        _balance_parts(block, group, part)


def _trade_heads(block: Attention, group: ProcessGroup, part: Callable[[torch.Tensor], torch.Tensor]) -> None:
    ranks = group.size()

    def forward(x_BTD: torch.Tensor, positions: Positions, cache: None = None) -> torch.Tensor:
        assert cache is None, "caches hold whole sequences"
        here = replace(positions, cos_BTR=part(positions.cos_BTR), sin_BTR=part(positions.sin_BTR))
        q_BTHN, k_BTKN, v_BTKN = block.project(x_BTD, here)
        copies = max(1, ranks // k_BTKN.shape[2])
        if copies > 1:  # fewer key/value heads than ranks: several ranks get the same one
            k_BTKN, v_BTKN = (x.repeat_interleave(copies, dim=2) for x in (k_BTKN, v_BTKN))
        q_BTHN, k_BTKN, v_BTKN = (exchange(x, split=2, join=1, group=group) for x in (q_BTHN, k_BTKN, v_BTKN))
        o_BTHN = positions.attend(q_BTHN, k_BTKN, v_BTKN, block.scale)
        return block.o_proj(exchange(o_BTHN, split=1, join=2, group=group).flatten(-2))

    block.forward = forward  # type: ignore


def _balance_parts(block: MoE, group: ProcessGroup, part: Callable[[torch.Tensor], torch.Tensor]) -> None:
    forward = block.forward

    def part_of_sequence(x_BTD: torch.Tensor, document_ids_BT: torch.Tensor | None = None, *arguments: Any) -> Any:
        return forward(x_BTD, None if document_ids_BT is None else part(document_ids_BT), *arguments)

    def balance_loss(scores_ME: torch.Tensor, counts_BE: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
        totals = torch.cat([counts_BE, valid_BT.sum(1, keepdim=True).to(counts_BE.dtype)], dim=1)
        dist.all_reduce(totals, group=group)
        return sequence_balance_loss(scores_ME, totals[:, :-1], valid_BT, totals[:, -1])

    block.forward = part_of_sequence  # type: ignore
    block.balance_loss = balance_loss  # type: ignore
