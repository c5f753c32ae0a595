"""Which parameter is trained by which optimiser: Muon for matrices, AdamW for the rest (report section 2.4)."""

from typing import Literal

import torch
import torch.distributed as dist

from glm45.config import configuration
from glm45.model.transformer import Glm45, parameter_groups
from glm45.training.muon import Muon


@configuration
class OptimizerConfig:
    """How weights are updated; the learning rate itself is a schedule (`glm45.training.schedule`)."""

    matrices: Literal["muon", "adamw"] = "muon"
    """Optimiser of the matrices; AdamW is there for comparison."""
    head: Literal["muon", "adamw"] = "muon"
    """Optimiser of the output head. The report excepts embeddings, biases and norms from Muon, not the head."""
    momentum: float = 0.95
    """Muon's momentum (report section 2.4)."""
    ns_steps: int = 5
    """Newton-Schulz steps (report section 2.4)."""
    update_rms: float = 0.2
    """Root-mean-square of Muon's update before the learning rate (report section 2.4)."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings (report section 2.4); norms and biases have none, which is
    not in the report."""
    adamw_ratio: float = 1.0
    """AdamW's learning rate over Muon's. Not in the report; 1 is what the common update RMS is for."""
    adamw_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas. Not in the report."""
    adamw_eps: float = 1e-8
    """AdamW's epsilon. Not in the report."""
    clip_norm: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. Not in the report."""

    def __post_init__(self) -> None:
        if self.clip_norm <= 0:
            raise ValueError(f"optimizer.clip_norm is {self.clip_norm}: set it above 0, or to 1e9 for no clipping")
        if self.ns_steps < 1:
            raise ValueError(f"optimizer.ns_steps is {self.ns_steps}: set it to 1 or more")


def build_optimizers(
    model: Glm45, config: OptimizerConfig, replicas: dist.ProcessGroup | None = None
) -> list[torch.optim.Optimizer]:
    """Return the optimisers of every parameter of `model`: Muon, AdamW with decay, AdamW without, where not empty.

    Their state exists from the start, so that a checkpoint can be loaded in place. Learning rates are set before
    each step by `set_learning_rate`. `replicas` hold the same unsharded model and divide Muon's work.
    """
    groups = {
        name: [(path, parameter) for path, parameter in members if parameter.requires_grad]
        for name, members in parameter_groups(model).items()
    }
    muon = groups["matrix"] * (config.matrices == "muon") + groups["head"] * (config.head == "muon")
    decayed = groups["embedding"] + groups["matrix"] * (config.matrices == "adamw")
    decayed += groups["head"] * (config.head == "adamw")
    by_layout = {
        "stack": [parameter for name, parameter in muon if "qkv_proj" not in name],
        "qkv": [parameter for name, parameter in muon if "qkv_proj" in name],
    }
    by_decay = [  # pairs, since a weight decay of 0 would make one key of a dictionary out of both
        (config.weight_decay, [parameter for _, parameter in decayed]),
        (0.0, [parameter for _, parameter in groups["norm"] + groups["bias"]]),
    ]
    optimizers: list[torch.optim.Optimizer] = []
    muon_groups = [{"params": params, "layout": layout} for layout, params in by_layout.items() if params]
    if muon_groups:
        optimizers.append(
            Muon(
                muon_groups,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                ns_steps=config.ns_steps,
                update_rms=config.update_rms,
                replicas=replicas,
            )
        )
    adamw_groups = [{"params": params, "weight_decay": decay} for decay, params in by_decay if params]
    if adamw_groups:
        optimizers.append(_adamw(adamw_groups, config))
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], rate: float, config: OptimizerConfig) -> None:
    """Set the learning rate of the next step."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate if isinstance(optimizer, Muon) else rate * config.adamw_ratio


def parameter_group(name: str) -> str:
    """Return the group, one of `PARAMETER_GROUPS`, in which a parameter's norms are reported."""
    if name.startswith("mtp."):
        return "mtp"
    return next((group for part, group in _GROUP_BY_PART if part in name), "dense")


_GROUP_BY_PART = (
    ("embed_tokens", "embeddings"),
    ("lm_head", "head"),
    ("norm", "norms"),
    ("self_attn", "attention"),
    ("shared_experts", "shared_experts"),
    ("experts", "experts"),
    ("gate.weight", "router"),
)

PARAMETER_GROUPS = ("mtp", *(group for _, group in _GROUP_BY_PART), "dense")


def _adamw(groups: list[dict], config: OptimizerConfig) -> torch.optim.AdamW:
    # Foreach rather than fused: the fused kernel does not take DTensors of different meshes in one group.
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=config.adamw_betas, eps=config.adamw_eps, foreach=True)
    for group in adamw.param_groups:
        for parameter in group["params"]:
            adamw.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return adamw
