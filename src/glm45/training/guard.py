"""Bad batches: a non-finite or spiking loss skips its step; many in a row take the run back to its last checkpoint."""

import math
from collections.abc import Mapping
from statistics import fmean, pstdev
from typing import Any

from glm45.config import configuration


@configuration
class GuardConfig:
    """When a step is skipped and when the run goes back. None of it is in the report."""

    spike_sigmas: float = 6.0
    """A loss this many standard deviations above the mean of the last `window` losses is a spike; its step is
    skipped. Not in the report."""
    window: int = 128
    """Losses remembered, within one stage. Not in the report."""
    min_history: int = 32
    """Losses needed before spikes are looked for. Not in the report."""
    max_skips: int = 5
    """Skipped steps in a row after which the run goes back to its last scheduled checkpoint. Not in the report."""
    max_rollbacks: int = 3
    """Rollbacks after which the run stops: the data or the learning rate is at fault. Not in the report."""


class Guard:
    """Judges each step's loss. Its state is part of the checkpoint, so a resumed run judges alike."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.losses: list[float] = []
        self.skips_in_row: list[int] = []
        """Steps skipped since the last good one."""
        self.banned: list[int] = []
        """Steps whose batches are passed over because they made the run go back."""
        self.rollbacks = 0

    def begin_stage(self) -> None:
        """Forget the losses: those of other data are no measure."""
        self.losses = []

    def verdict(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Return why the update of `step` must be skipped, or None for a good one, which is then remembered."""
        problem = self._problem(loss, grad_norm)
        if problem is None:
            self.losses = [*self.losses, loss][-self.config.window :]
            self.skips_in_row = []
        else:
            self.skips_in_row.append(step)
        return problem

    @property
    def must_go_back(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return len(self.skips_in_row) >= self.config.max_skips

    def go_back(self, rollbacks: int, bad_steps: list[int]) -> None:
        """Pass over `bad_steps` from now on. Raises ValueError after too many rollbacks."""
        self.rollbacks = rollbacks
        if rollbacks > self.config.max_rollbacks:
            raise ValueError(
                f"the loss stayed bad after {self.config.max_rollbacks} rollbacks, last at steps {bad_steps}: lower "
                "learning_rate.peak, or look at the data of these steps"
            )
        self.banned = sorted({*self.banned, *bad_steps})
        self.skips_in_row = []

    def state(self) -> dict[str, Any]:
        """Return everything to be saved, as JSON."""
        names = ("losses", "skips_in_row", "banned", "rollbacks")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Set what `state` returned."""
        for name, value in state.items():
            setattr(self, name, value)

    def _problem(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return "non-finite loss"
        if not math.isfinite(grad_norm):
            return "non-finite gradient"
        if len(self.losses) < self.config.min_history:
            return None
        limit = fmean(self.losses) + self.config.spike_sigmas * pstdev(self.losses)
        return f"loss spike above {limit:.4f}" if loss > limit else None
