"""Signs of a sick run: expert balance with alarms, gradient and update norms by group, range of attention logits.

L MoE layers, E experts, B rows, T tokens, H query heads, K key/value heads, N head size.
"""

from typing import Any

import torch
from torch import nn

from glm45.config import configuration
from glm45.kernels.attention import attention
from glm45.model.moe import RouterHealth
from glm45.model.transformer import Glm45
from glm45.training.dtensors import local
from glm45.training.gradients import sums_of_squares
from glm45.training.parallel import World


@configuration
class HealthConfig:
    """How often a run is looked at, and when an alarm is raised."""

    every: int = 50
    """Steps between looks at update norms, attention logits and expert balance over the steps since the last look."""
    busiest_share: float = 0.8
    """Alarm when the busiest 20 % of a layer's experts get this share of its tokens. Not in the report."""
    max_violation: float = 1.5
    """Alarm when a layer's busiest expert gets this much more than the mean (MaxVio). Not in the report; with E experts
    and k a token it is at most E / k - 1, which is 3 in the demo."""
    probe_tokens: int = 256
    """Tokens of one row on which the range of attention logits is measured."""


class RouterMonitor:
    """Expert balance over a stretch of steps."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.loads_LE: torch.Tensor | None = None

    def add(self, loads_LE: torch.Tensor) -> None:
        """Count the loads of one step, summed over ranks."""
        self.loads_LE = loads_LE.clone() if self.loads_LE is None else self.loads_LE + loads_LE

    def look(self) -> tuple[dict[str, Any], list[str]]:
        """Return the balance since the last look and the alarms it gives, and start anew."""
        if self.loads_LE is None or not self.loads_LE.numel():
            return {}, []
        health = RouterHealth.of(self.loads_LE)
        # A layer without any token did not run: the MTP layer, where its loss has no weight.
        ran = self.loads_LE.sum(dim=1).nonzero().flatten().tolist()
        self.loads_LE = None
        alarms = [message for layer in ran for message in self._alarms(health, layer)]
        columns = {
            "max_violation": health.max_violation_L,
            "busiest_share": health.busiest_share_L,
            "entropy": health.entropy_L,
            "dead_experts": health.dead_experts_L,
        }
        return {
            name: [round(value, 6) if layer in ran else None for layer, value in enumerate(values_L.tolist())]
            for name, values_L in columns.items()
        }, alarms

    def state(self) -> list[list[float]] | None:
        """Return what has been counted, as JSON."""
        return None if self.loads_LE is None else self.loads_LE.tolist()

    def load_state(self, state: list[list[float]] | None) -> None:
        """Set what `state` returned."""
        self.loads_LE = None if state is None else torch.tensor(state)

    def _alarms(self, health: RouterHealth, layer: int) -> list[str]:
        share, violation = health.busiest_share_L[layer].item(), health.max_violation_L[layer].item()
        dead = int(health.dead_experts_L[layer])
        found = []
        if share >= self.config.busiest_share:
            found.append(f"MoE layer {layer}: {share:.0%} of the tokens go to the busiest 20 % of the experts")
        if violation >= self.config.max_violation:
            found.append(f"MoE layer {layer}: MaxVio is {violation:.2f}, limit {self.config.max_violation}")
        if dead:
            found.append(f"MoE layer {layer}: {dead} experts got no token")
        return found


def norms_by_group(squares: dict[str, float]) -> dict[str, float]:
    """Return norms from sums of squares by group."""
    return {group: round(square**0.5, 8) for group, square in sorted(squares.items())}


class UpdateNorms:
    """Relative size of the updates of one step, by group: a snapshot of the weights before and a look after it."""

    def __init__(self, model: nn.Module) -> None:
        self._before = {name: local(parameter).detach().clone() for name, parameter in model.named_parameters()}

    def look(self, model: nn.Module, world: World) -> dict[str, float]:
        """Return the norm of the update over the norm of the weights before, by group, over all ranks."""
        size = sums_of_squares(model, world, lambda name, parameter: self._before[name])
        moved = sums_of_squares(model, world, lambda name, parameter: local(parameter).detach() - self._before[name])
        return {group: round((moved.get(group, 0.0) / size[group]) ** 0.5, 8) for group in sorted(size)}


class LogitProbe:
    """A stand-in for a cache that measures attention logits instead of keeping keys."""

    def __init__(self) -> None:
        self.largest: dict[int, float] = {}

    def attend(
        self, layer: int, q_BTHN: torch.Tensor, k_BTKN: torch.Tensor, v_BTKN: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Note the largest absolute logit of the layer and attend as without a cache."""
        heads_per_group = q_BTHN.shape[2] // k_BTKN.shape[2]
        k_BTHN = k_BTKN.repeat_interleave(heads_per_group, dim=2)
        logits_BHTT = torch.einsum("bthn,bshn->bhts", q_BTHN.float(), k_BTHN.float()) * scale
        self.largest[layer] = logits_BHTT.tril().abs().max().item()
        return attention(q_BTHN, k_BTKN, v_BTKN, scale)


@torch.no_grad()
def attention_logit_range(model: Glm45, tokens_BT: torch.Tensor) -> list[float]:
    """Return each layer's largest absolute attention logit on some tokens: what QK-norm bounds (report section 2.1)."""
    probe = LogitProbe()
    positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
    model(tokens_BT, positions=positions_BT, cache=probe, output="hidden")
    return [round(value, 4) for _, value in sorted(probe.largest.items())]
