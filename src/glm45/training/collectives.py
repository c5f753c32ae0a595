"""Collectives with gradients, for parts of sequences, heads and tokens.

Each is its own inverse's gradient: what the forward pass gathers, the backward pass scatters by sum, and the other
way round; a token that travels to an expert sends its gradient back the same way.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

Map = Callable[[torch.Tensor], torch.Tensor]

# Renamed in PyTorch 2.13, where the old name warns.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def gather_sequence(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Return the tokens (dimension 1) of all ranks, in their order; gradients are summed over ranks."""
    return _Linear.apply(x, partial(_gather, group=group), partial(_scatter_sum, group=group))


def scatter_sum_sequence(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Return the sum over ranks, of which each keeps its part of the tokens (dimension 1)."""
    return _Linear.apply(x, partial(_scatter_sum, group=group), partial(_gather, group=group))


def exchange(x: torch.Tensor, split: int, join: int, group: ProcessGroup) -> torch.Tensor:
    """Divide dimension `split` among the ranks and join what they give along dimension `join`, in their order."""
    run = partial(_exchange, split=split, join=join, group=group)
    return _Linear.apply(x, run, partial(_exchange, split=join, join=split, group=group))


def send_rows(x: torch.Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> torch.Tensor:
    """Send `sent[r]` rows to rank r, in order, and return the `received[r]` rows that each rank sends, in order."""
    run = partial(_send_rows, sent=sent, received=received, group=group)
    return _Linear.apply(x, run, partial(_send_rows, sent=received, received=sent, group=group))


def _gather(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group)
    return torch.cat(parts, dim=1)


def _scatter_sum(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    parts = torch.stack(x.chunk(group.size(), dim=1))
    out = torch.empty_like(parts[0])
    _reduce_scatter(out, parts.flatten(0, 1), group=group)
    return out


def _exchange(x: torch.Tensor, split: int, join: int, group: ProcessGroup) -> torch.Tensor:
    sent = torch.stack(x.chunk(group.size(), dim=split))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return torch.cat(list(received), dim=join)


def _send_rows(x: torch.Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> torch.Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


class _Linear(torch.autograd.Function):
    """A linear map between ranks, with its transpose for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, run: Map, transpose: Map) -> torch.Tensor:
        ctx.transpose = transpose
        return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.transpose(gradients[0]), None, None
