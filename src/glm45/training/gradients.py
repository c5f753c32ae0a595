"""One batch's loss and gradient over micro-batches and ranks; norms and clipping."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from glm45.model.transformer import Glm45
from glm45.training.dtensors import local
from glm45.training.losses import Counts, LossParts, MicroBatch, count, pretraining_loss
from glm45.training.optimizers import PARAMETER_GROUPS, parameter_group
from glm45.training.parallel import World, is_copy, is_divided, reduce_gradients
from glm45.training.pipeline import Pipeline


@dataclass(frozen=True)
class BatchLoss:
    """The loss of a whole batch, summed over ranks."""

    total: float
    next_token: float
    mtp: float
    balance: float
    num_targets: int
    loads_LE: torch.Tensor
    """Tokens that went to each expert of each layer, on the CPU."""


def forward_backward(
    model: Glm45,
    batch: MicroBatch,
    world: World,
    micro_rows: int,
    mtp_weight: float,
    balance_weight: float,
    checkpoint: bool,
    pipeline: Pipeline | None = None,
) -> BatchLoss:
    """Add the gradient of the batch's loss to the parameters, summed over micro-batches and ranks."""
    totals = world.sum(count(batch) * world.counts_rows).tolist()
    counts = Counts.of(totals)
    shares: list[LossParts] = []
    batch = batch.part(world.part)
    if pipeline is not None:
        shares = pipeline.forward_backward(batch, micro_rows, counts, mtp_weight, balance_weight, checkpoint)
    else:
        for micro in batch.split(micro_rows):
            share = pretraining_loss(model, micro, counts, mtp_weight, balance_weight, checkpoint)
            share.total.backward()
            shares.append(share)
    reduce_gradients(model, world)
    reduced = world.sum(torch.stack([_flat(share) for share in shares]).sum(0)).cpu()
    total, next_token, mtp, balance = reduced[:4].tolist()
    loads_LE = reduced[4:].float().view(-1, model.config.n_routed_experts)
    return BatchLoss(total, next_token, mtp, balance, int(totals[0]), loads_LE)


def _flat(share: LossParts) -> torch.Tensor:
    scalars = torch.stack([share.total.detach(), share.next_token, share.mtp, share.balance])
    return torch.cat([scalars.double(), share.loads_LE.flatten().double()])


def gradient_squares(model: nn.Module, world: World) -> dict[str, float]:
    """Return the sum of squares of the gradient by group of parameters; see `sums_of_squares`."""
    return sums_of_squares(
        model, world, lambda name, parameter: None if parameter.grad is None else local(parameter.grad)
    )


def sums_of_squares(
    model: nn.Module, world: World, part_of: Callable[[str, nn.Parameter], torch.Tensor | None]
) -> dict[str, float]:
    """Return sums of squares by group of parameters, over all ranks, each number counted once.

    `part_of` gives what is summed for a parameter, this rank's part of it, or None to leave it out.
    """
    found_parts: dict[str, list[torch.Tensor]] = defaultdict(list)
    squares = torch.zeros(len(PARAMETER_GROUPS), dtype=torch.float64)
    for divided in (False, True):
        found_parts.clear()
        for name, parameter in model.named_parameters():
            if is_divided(parameter) == divided and not is_copy(name, world):
                part = part_of(name, parameter)
                if part is not None:
                    found_parts[parameter_group(name)].append(part)
        copies = world.layout.replicate * (1 if divided else world.layout.tensor)
        for group, parts in found_parts.items():
            norms = torch.stack(torch._foreach_norm(parts))
            squares[PARAMETER_GROUPS.index(group)] += norms.double().square().sum().cpu() / copies
    found = zip(PARAMETER_GROUPS, world.sum(squares).tolist(), strict=True)
    return {group: square for group, square in found if square}


def clip_gradients(model: nn.Module, norm: float, limit: float) -> None:
    """Scale the gradient so that its norm is at most `limit`, given its norm."""
    if norm <= limit:
        return
    gradients = [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    torch._foreach_mul_(gradients, limit / norm)
