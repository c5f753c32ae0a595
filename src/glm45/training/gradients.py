"""One batch's loss and gradient over micro-batches and ranks; norms and clipping."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from glm45.model.transformer import Glm45
from glm45.training.losses import Counts, MicroBatch, count, pretraining_loss
from glm45.training.optimizers import parameter_group
from glm45.training.parallel import World, reduce_gradients


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
) -> BatchLoss:
    """Add the gradient of the batch's loss to the parameters, summed over micro-batches and ranks."""
    totals = world.sum_over_data(count(batch)).tolist()
    counts = Counts.of(totals)
    sums: list[torch.Tensor] = []
    for micro in batch.split(micro_rows):
        parts = pretraining_loss(model, micro, counts, mtp_weight, balance_weight, checkpoint)
        parts.total.backward()
        scalars = torch.stack([parts.total.detach(), parts.next_token, parts.mtp, parts.balance])
        sums.append(torch.cat([scalars.double(), parts.loads_LE.flatten().double()]))
    reduce_gradients(model, world)
    reduced = world.sum_over_data(torch.stack(sums).sum(0)).cpu()
    total, next_token, mtp, balance = reduced[:4].tolist()
    loads_LE = reduced[4:].float().view(-1, model.config.n_routed_experts)
    return BatchLoss(total, next_token, mtp, balance, int(totals[0]), loads_LE)


def gradient_squares(model: nn.Module, world: World) -> dict[str, float]:
    """Return the sum of squares of the gradient by group of parameters, over all ranks."""
    gradients: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[parameter_group(name)].append(parameter.grad)
    groups = sorted(gradients)
    squares = torch.stack([torch.stack(torch._foreach_norm(gradients[group])).square().sum() for group in groups])
    return dict(zip(groups, squares.tolist(), strict=True))


def clip_gradients(model: nn.Module, norm: float, limit: float) -> None:
    """Scale the gradient so that its norm is at most `limit`, given its norm."""
    if norm <= limit:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    torch._foreach_mul_(gradients, limit / norm)
