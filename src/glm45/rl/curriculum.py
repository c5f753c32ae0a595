"""The difficulty curriculum: pools by unbiased pass@k, stages over them, and when to go on (report section 3.2).

Stage 1 of the report trains on prompts of moderate difficulty with 16 samples each, stage 2 on hard ones (pass@8 = 0
and pass@512 > 0, with verified answers) with 512. The output cap may be a schedule too: the report finds a single
stage at the full length better than growing ones, and both can be written here.
"""

from collections.abc import Sequence
from math import comb
from typing import Any, Literal

from glm45.config import configuration

PoolName = Literal["moderate", "hard", "all"]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of `k` samples is right, from `num_samples` >= k.

    That is 1 - C(n - c, k) / C(n, k): the share of k-subsets of the n samples that hold a right one.
    Raises ValueError for fewer samples than k.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} from {num_samples} samples with {num_correct} right: need 1 <= k <= samples")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


@configuration
class PoolThresholds:
    """What makes a prompt moderate or hard."""

    k: int = 8
    """k of the first measurement (report section 3.2)."""
    num_samples: int = 16
    """Samples of the first measurement; more than `k`, or pass@k could only be 0 or 1. Not in the report."""
    hard_k: int = 512
    """A prompt with pass@k = 0 is sampled this often in all; hard if any of them is right (report section 3.2)."""

    def __post_init__(self) -> None:
        if not 1 <= self.k < self.num_samples <= self.hard_k:
            raise ValueError(
                f"thresholds k = {self.k}, num_samples = {self.num_samples}, hard_k = {self.hard_k}: "
                "need 1 <= k < num_samples <= hard_k"
            )

    def classify(self, num_correct: int, num_samples: int | None = None) -> str:
        """Return what the first measurement says: "moderate" (0 < pass@k < 1), "easy" (1), or "deeper" (0).

        A prompt that needs deeper sampling is hard if any of `hard_k` samples is right. `num_samples` is given where
        fewer than the configured number could be judged.
        """
        value = pass_at_k(num_samples or self.num_samples, num_correct, self.k)
        if value == 0:
            return "deeper"
        return "easy" if value == 1 else "moderate"


class Plateau:
    """Says when a series has stopped rising: the mean of the last `window` is not `min_gain` above the one before.

    Not in the report, which speaks of rewards that stabilise.
    """

    def __init__(self, window: int, min_gain: float):
        self.window, self.min_gain = window, min_gain
        self.values: list[float] = []

    def add(self, value: float) -> None:
        """Add one step's value."""
        self.values = [*self.values, value][-2 * self.window :]

    def reached(self) -> bool:
        """Whether two full windows are there and the second gained too little."""
        if len(self.values) < 2 * self.window:
            return False
        before, after = self.values[: self.window], self.values[self.window :]
        return sum(after) - sum(before) < self.min_gain * self.window

    def reset(self) -> None:
        """Start a new series: after a switch the old values say nothing."""
        self.values = []


@configuration
class CurriculumStage:
    """A stretch of an RL run: which prompts, how many samples of each, how long, and until when."""

    pool: PoolName = "all"
    """Pool of prompts: moderate first, then hard (report section 3.2)."""
    prompts_per_step: int = 16
    """Groups that an update learns from. Not in the report."""
    samples_per_prompt: int = 16
    """Size of a group: 16, then 512 on hard prompts (report, figure 5)."""
    until_step: int | None = None
    """Last step of the stage, counted over the run (report: 1,520); None: until the run ends or a plateau."""
    plateau_window: int = 0
    """If above 0, the stage also ends when the mean reward's plateau is reached, over windows of so many steps. Not
    in the report."""
    plateau_gain: float = 0.005
    """Least gain of the mean reward from one window to the next. Not in the report."""

    def __post_init__(self) -> None:
        if self.prompts_per_step < 1 or self.samples_per_prompt < 2:
            raise ValueError(f"{self}: need at least one prompt and groups of at least two")


class Curriculum:
    """Where an RL run is in its stages; its state is in the checkpoint."""

    def __init__(self, stages: Sequence[CurriculumStage]):
        if not stages:
            raise ValueError("a curriculum needs at least one stage")
        self.stages = tuple(stages)
        self.index = 0
        self._plateau = self._new_plateau()

    @property
    def stage(self) -> CurriculumStage:
        """The stage in force."""
        return self.stages[self.index]

    def advance(self, step: int, mean_reward: float | None) -> bool:
        """Take note of a finished step (counted from 1) and say whether the next one begins another stage.

        The reward is None where nothing was generated: groups left over from the step before sufficed.
        """
        if mean_reward is not None:
            self._plateau.add(mean_reward)
        stage = self.stage
        ended = stage.until_step is not None and step >= stage.until_step
        ended = ended or (stage.plateau_window > 0 and self._plateau.reached())
        if not ended or self.index + 1 == len(self.stages):
            return False
        self.index += 1
        self._plateau = self._new_plateau()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {"index": self.index, "values": self._plateau.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.index = state["index"]
        self._plateau = self._new_plateau()
        self._plateau.values = list(state["values"])

    def _new_plateau(self) -> Plateau:
        return Plateau(max(1, self.stage.plateau_window), self.stage.plateau_gain)


@configuration
class LengthSchedule:
    """Caps on generated tokens by step. One entry is the report's single stage, several its multi-stage baseline."""

    caps: tuple[tuple[int, int], ...] = ((0, 64),)
    """(first step, cap in tokens), by rising step, the first at 0; the largest cap is the full one."""

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.caps]
        if not steps or steps[0] != 0 or steps != sorted(set(steps)) or min(cap for _, cap in self.caps) < 1:
            raise ValueError(f"caps = {self.caps}: give (step, cap) pairs by rising step, the first at step 0")

    def cap(self, step: int) -> int:
        """Return the cap in force at a step, counted from 0."""
        return [cap for first, cap in self.caps if first <= step][-1]

    @property
    def full(self) -> int:
        """The cap under which every evaluation is run, besides the current one."""
        return max(cap for _, cap in self.caps)
