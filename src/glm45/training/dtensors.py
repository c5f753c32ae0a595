"""The local part of a tensor, whether it is sharded or not."""

import torch
from torch.distributed.tensor import DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, sharing its memory, and any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
