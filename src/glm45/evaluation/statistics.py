"""Figures with their uncertainty: averages over tasks with bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over tasks with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    count: int
    """Tasks averaged over."""


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = 2000) -> Estimate:
    """Return the mean of one value per task and its percentile bootstrap interval.

    Tasks, not samples, are drawn again: samples of one task are not independent. Raises ValueError for no values.
    """
    if not values:
        raise ValueError("no task was scored: there is nothing to average")
    data = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(data), size=(resamples, len(data)))
    low, high = np.quantile(data[picks].mean(axis=1), [0.025, 0.975])
    return Estimate(float(data.mean()), float(low), float(high), len(data))
