"""Group advantages: how much better a sample was than the others of its prompt. Pure torch.

N samples, G groups. Groups are told by an explicit id and never by position, so uneven groups and any order are
fine.
"""

import torch

STD_EPS = 1e-4
"""Added to the standard deviation. Not in the report; the value that TRL uses."""


def group_advantages(rewards_N: torch.Tensor, group_ids_N: torch.Tensor, divide_by_std: bool) -> torch.Tensor:
    """Return `reward - mean of its group`, divided by the group's standard deviation if asked.

    With the deviation this is GRPO (report section 3.2); the agentic objective (section 3.3) uses the mean only. The
    deviation is the unbiased one; a group of a single sample has advantage 0.
    """
    index_N, size_G = _groups(group_ids_N)
    mean_G = torch.zeros_like(size_G).index_add_(0, index_N, rewards_N.to(size_G.dtype)) / size_G
    centred_N = rewards_N.to(size_G.dtype) - mean_G[index_N]
    if not divide_by_std:
        return centred_N
    return centred_N / (_std(centred_N, index_N, size_G)[index_N] + STD_EPS)


def informative(rewards_N: torch.Tensor, group_ids_N: torch.Tensor, min_std: float = 1e-6) -> torch.Tensor:
    """Return which samples belong to a group whose rewards differ; the others teach nothing."""
    index_N, size_G = _groups(group_ids_N)
    mean_G = torch.zeros_like(size_G).index_add_(0, index_N, rewards_N.to(size_G.dtype)) / size_G
    centred_N = rewards_N.to(size_G.dtype) - mean_G[index_N]
    return _std(centred_N, index_N, size_G)[index_N] > min_std


def _groups(group_ids_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample's group as a number from 0, and each group's size, in fp64 so that equal rewards differ by 0."""
    _, index_N, size_G = torch.unique(group_ids_N, return_inverse=True, return_counts=True)
    return index_N, size_G.double()


def _std(centred_N: torch.Tensor, index_N: torch.Tensor, size_G: torch.Tensor) -> torch.Tensor:
    squares_G = torch.zeros_like(size_G).index_add_(0, index_N, centred_N.square())
    return (squares_G / (size_G - 1).clamp(min=1)).sqrt()
