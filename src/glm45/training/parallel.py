"""One model on many processes: the device mesh, what is sharded over it, and the sums across it."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from glm45.training.layout import Layout


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them."""

    layout: Layout
    device: torch.device
    rank: int
    data_rank: int
    """Which part of every batch's rows this rank reads."""
    num_data_ranks: int

    @classmethod
    def start(cls, layout: Layout) -> "World":
        """Join the processes that torchrun started, or be alone. Raises ValueError if the layout needs other ranks."""
        world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        layout = layout.resolve(world_size)
        if world_size > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        return cls(layout, device, rank, rank, world_size)

    def sum_over_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks that read different rows, the same on every rank."""
        if self.num_data_ranks > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: float) -> float:
        """Return the largest of the numbers that all ranks give."""
        if not dist.is_initialized():
            return number
        tensor = torch.tensor(float(number))
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()

    def close(self) -> None:
        """Leave the group of processes."""
        if dist.is_initialized():
            dist.destroy_process_group()


def reduce_gradients(model: nn.Module, world: World) -> None:
    """Sum the gradients of replicas, in one all-reduce of everything: losses are already divided by global counts."""
    if world.layout.replicate == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    pieces = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [piece.view_as(grad) for piece, grad in zip(pieces, gradients, strict=True)])
