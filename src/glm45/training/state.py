"""Everything that a training run carries from one step to the next: built, saved, loaded."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from glm45.config import to_dict
from glm45.kernels.probe import preferred_compute_dtype
from glm45.model import hub
from glm45.model.transformer import Glm45
from glm45.seeds import derive_seed
from glm45.training.checkpoint import Checkpoints, newest_state, training_tensors
from glm45.training.guard import Guard
from glm45.training.health import RouterMonitor
from glm45.training.optimizers import build_optimizers
from glm45.training.parallel import World, parallelize
from glm45.training.pipeline import Pipeline
from glm45.training.run import TrainConfig
from glm45.training.schedule import Plan, Step


@dataclass
class TrainingState:
    """A run between two steps. No random generator is among it: every draw is seeded by its purpose and step."""

    config: TrainConfig
    world: World
    plan: Plan
    model: Glm45
    optimizers: list[torch.optim.Optimizer]
    guard: Guard
    router: RouterMonitor
    pipeline: Pipeline | None = None
    """What runs the model where its layers are on several ranks."""
    step: int = 0
    """Steps done."""
    best: tuple[int, float] | None = None
    """Step and value of the lowest mean held-out loss."""
    metrics_length: int = 0
    """Bytes of `metrics.jsonl` at the last checkpoint that was loaded."""
    facts: dict[str, str] = field(default_factory=dict)
    """What must be the same when the run goes on: precision, fingerprint of the tokenizer."""

    @classmethod
    def begin(cls, config: TrainConfig, world: World, facts: dict[str, str]) -> "TrainingState":
        """Build model and optimisers as they are before the first step."""
        model = build_model(config, world)
        model.set_compute_dtype(getattr(torch, facts["precision"]))
        pipeline = parallelize(model, world)
        return cls(
            config=config,
            world=world,
            plan=Plan(config.stages),
            model=model,
            optimizers=build_optimizers(model, config.optimizer, world.replicas),
            guard=Guard(config.guard),
            router=RouterMonitor(config.health),
            facts=facts,
            pipeline=pipeline,
        )

    @property
    def save_is_due(self) -> bool:
        """Whether the step that was just done is scheduled for a checkpoint, the best so far, or the last."""
        policy = self.config.checkpoints
        is_best = policy.keep_best and self.best is not None and self.best[0] == self.step
        return self.step % policy.every == 0 or is_best or self.step == self.plan.num_steps

    def enter_stage(self, step: Step) -> None:
        """Set what the stage of `step` sets: the RoPE base."""
        if self.model.config.rope_theta != step.segment.stage.rope_theta:
            self.model.set_rope_theta(step.segment.stage.rope_theta)

    def update_router_bias(self, loads_LE: torch.Tensor, rate: float) -> None:
        """Apply loss-free balance to this rank's layers, given the loads of all."""
        own_LE = loads_LE if self.pipeline is None else loads_LE[self.pipeline.own_rows]
        self.model.update_router_bias(own_LE.to(self.world.device), rate)

    def save(self, checkpoints: Checkpoints, metrics_length: int) -> None:
        """Start writing a checkpoint of this state."""
        state = {
            "facts": self.facts,
            "best": self.best,
            "metrics_length": metrics_length,
            "guard": self.guard.state(),
            "router": self.router.state(),
        }
        checkpoints.save(self.step, training_tensors(self.model, self.optimizers), state)
        checkpoints.prune(self.best[0] if self.best else None)

    def load(self, checkpoints: Checkpoints, step: int) -> None:
        """Become the state of a checkpoint. Raises ValueError if it is of another architecture or tokenizer."""
        state = checkpoints.load(step, training_tensors(self.model, self.optimizers))
        for name, value in state["facts"].items():
            if name in self.facts and self.facts[name] != value:
                raise ValueError(
                    f"{checkpoints.folder}: the run began with {name} {value} and would go on with "
                    f"{self.facts[name]}: give it the same again, or begin another run"
                )
        self.step = step
        if step:
            self.enter_stage(self.plan.step(step - 1))
        self.best = tuple(state["best"]) if state["best"] else None
        self.metrics_length = state["metrics_length"]
        self.guard.load_state(state["guard"])
        self.router.load_state(state["router"])


def build_model(config: TrainConfig, world: World) -> Glm45:
    """Return the model before its first step: drawn from the seed, or the hub folder `initial_weights`."""
    if not config.initial_weights:
        model = Glm45(config.model, device=world.device, seed=derive_seed(config.seed, "weights"))
        return model.train()
    if not Path(config.initial_weights).is_dir():
        raise FileNotFoundError(f"initial_weights: no folder {config.initial_weights}")
    model = hub.load(config.initial_weights, dtype=torch.float32, device=world.device)
    different = [
        f"{name} {getattr(model.config, name)} there, {getattr(config.model, name)} here"
        for name in to_dict(config.model)
        if name not in ("rope_theta", "max_position_embeddings", "eos_token_id", "pad_token_id")
        and getattr(model.config, name) != getattr(config.model, name)
    ]
    if different:
        raise ValueError(f"{config.initial_weights} is of another architecture: {'; '.join(different)}")
    return model.train()


def choose_precision(config: TrainConfig, device: torch.device) -> str:
    """Return the compute dtype's name: as configured, or what this machine multiplies faster."""
    if config.precision != "auto":
        return config.precision
    return str(preferred_compute_dtype(config.model.hidden_size, device)).removeprefix("torch.")


def settle_facts(config: TrainConfig, world: World, checkpoints: Path, fingerprint: str) -> dict[str, str]:
    """Return what must not change while a run lasts, the same on all ranks.

    A probe may choose another precision after a restart, or on another rank: the first choice stays.
    """
    saved = newest_state(checkpoints) if config.precision == "auto" else None
    precision = saved["facts"]["precision"] if saved else choose_precision(config, world.device)
    return {"precision": world.first(precision), "tokenizer": fingerprint}
