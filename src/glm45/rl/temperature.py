"""Dynamic sampling temperature: explore more when the reward has settled, as far as it costs nothing (report 3.2)."""

from collections.abc import Mapping
from typing import Any

from glm45.config import configuration
from glm45.rl.curriculum import Plateau


@configuration
class TemperatureConfig:
    """How the rollout's temperature is chosen."""

    initial: float = 1.0
    """Temperature of the first phase. Not in the report."""
    candidates: tuple[float, ...] = ()
    """Temperatures that are tried on a plateau; empty keeps the initial one. The range is not in the report."""
    tolerance: float = 0.01
    """The next temperature may cost at most this share of the best held-out accuracy (report section 3.2: 1 %)."""
    plateau_window: int = 10
    """Steps of the windows whose mean rewards are compared. Not in the report."""
    plateau_gain: float = 0.01
    """Least gain from one window to the next; less is a plateau. Not in the report."""

    def __post_init__(self) -> None:
        if min((self.initial, *self.candidates)) <= 0:
            raise ValueError(f"temperatures {self.initial}, {self.candidates}: sampling needs them above 0")
        if not 0 <= self.tolerance < 1 or self.plateau_window < 1:
            raise ValueError(f"{self}: need 0 <= tolerance < 1 and plateau_window >= 1")


def highest_harmless(accuracies: Mapping[float, float], tolerance: float) -> float:
    """Return the highest temperature whose held-out accuracy is within `tolerance` (a share) of the best."""
    best = max(accuracies.values())
    return max(temperature for temperature, accuracy in accuracies.items() if accuracy >= best * (1 - tolerance))


class TemperatureController:
    """Holds the temperature in force; its state is in the checkpoint."""

    def __init__(self, config: TemperatureConfig):
        self.config = config
        self.value = config.initial
        self._plateau = Plateau(config.plateau_window, config.plateau_gain)

    @property
    def candidates(self) -> list[float]:
        """The temperatures to measure when a choice is due: the configured ones and the one in force."""
        return sorted({*self.config.candidates, self.value})

    def due(self, mean_reward: float | None) -> bool:
        """Take note of a finished step and say whether the reward has settled, so that a choice is due.

        The reward is None where nothing was generated.
        """
        if not self.config.candidates or mean_reward is None:
            return False
        self._plateau.add(mean_reward)
        return self._plateau.reached()

    def choose(self, accuracies: Mapping[float, float]) -> None:
        """Set the temperature of the next phase from the held-out accuracy at each candidate."""
        self._plateau.reset()
        self.value = highest_harmless(accuracies, self.config.tolerance)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {"value": self.value, "values": self._plateau.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.value, self._plateau.values = state["value"], list(state["values"])
