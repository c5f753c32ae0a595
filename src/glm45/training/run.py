"""A run: the resolved configuration of everything `glm45 train` will do, and the folder where it lives."""

import fcntl
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from glm45.config import configuration, from_dict, to_dict
from glm45.files import write_atomically
from glm45.model.config import ModelConfig
from glm45.training.checkpoint import Retention
from glm45.training.evaluation import EvaluationConfig
from glm45.training.guard import GuardConfig
from glm45.training.health import HealthConfig
from glm45.training.layout import Layout
from glm45.training.metrics import last_step
from glm45.training.optimizers import OptimizerConfig
from glm45.training.schedule import LearningRate, Plan
from glm45.training.stages import Stage

MAY_CHANGE = ("layout.", "micro_batch_tokens", "activation_checkpointing", "log_every", "tracker", "data")
"""Fields that a resumed run may have otherwise than it began: they do not change what is computed (beyond rounding).
The data folder may have moved; its tokenizer is compared."""


@configuration
class TrainConfig:
    """A whole training run: pre-training, mid-training or SFT. Recipes are functions that return one."""

    name: str
    """The recipe's name."""
    model: ModelConfig
    """Shape of the model."""
    stages: tuple[Stage, ...]
    """What to train on, one after another."""
    data: str = "data"
    """The data folder: manifest, tokenizer, shards."""
    initial_weights: str = ""
    """Hub folder of the model to begin with; empty for random weights."""
    seed: int = 0
    """Root seed of weights, data order and samples."""
    learning_rate: LearningRate = LearningRate()
    """Schedule over the tokens of all stages."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Muon and AdamW."""
    balance_weight: float = 1e-4
    """Weight of the sequence-level balance loss (report section 2.4)."""
    micro_batch_tokens: int = 8192
    """Tokens of one forward pass of one rank, at least one row. Bounds memory; the result is the same."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products and activations; auto takes bf16 on a GPU, and on a CPU where a probe finds it faster."""
    activation_checkpointing: bool = False
    """Whether activations are recomputed in backward instead of kept."""
    guard: GuardConfig = GuardConfig()
    """Skipping bad batches and going back."""
    checkpoints: Retention = Retention()
    """When checkpoints are written and kept."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out loss and generated samples."""
    health: HealthConfig = HealthConfig()
    """Router health, update norms, attention logits."""
    layout: Layout = Layout()
    """How the run is spread over processes."""
    log_every: int = 10
    """Steps between lines on screen, in TensorBoard and in the tracker; `metrics.jsonl` has every step."""
    tracker: Literal["none", "wandb", "trackio"] = "none"
    """A further place that metrics go to."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages is empty: a run needs at least one stage")
        counts = {
            "micro_batch_tokens": self.micro_batch_tokens,
            "log_every": self.log_every,
            "evaluation.every": self.evaluation.every,
            "evaluation.rows": self.evaluation.rows,
            "health.every": self.health.every,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} is {count}: set it to 1 or more")
        longest = max(stage.sequence_length for stage in self.stages)
        if longest > self.model.max_position_embeddings:
            raise ValueError(
                f"a stage has sequence_length {longest}, model.max_position_embeddings is "
                f"{self.model.max_position_embeddings}: raise that or shorten the stage"
            )
        self.layout.check(self.model, [stage.sequence_length for stage in self.stages])


class Run:
    """A run folder: `config.json`, `environment.json`, `metrics.jsonl`, `timings.jsonl`, `checkpoints/`, `samples/`."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        self.folder = folder
        self.config = config

    @classmethod
    def open(cls, folder: Path | str, config: TrainConfig, allow_change: bool = False) -> "Run":
        """Begin a run in `folder`, or go on with the one that is there.

        Raises ValueError, with the differences, if the folder holds a run of another recipe, unless `allow_change`; a
        recipe of which nothing was trained, as after a dry run, gives way.
        """
        folder = Path(folder)
        saved = folder / "config.json"
        if saved.exists() and (folder / "metrics.jsonl").exists():
            before = _read_json(saved)
            changes = [change for change in _differences(before, to_dict(config)) if not change.startswith(MAY_CHANGE)]
            if changes and not allow_change:
                raise ValueError(
                    f"{folder} holds a run with another recipe: {'; '.join(changes)}. Use another --run folder, or "
                    "--allow-change to go on with the new values"
                )
        return cls(folder, config)

    @classmethod
    def read(cls, folder: Path | str) -> "Run":
        """Return the run in `folder` as it was begun. Raises FileNotFoundError if there is none."""
        saved = Path(folder) / "config.json"
        if not saved.exists():
            raise FileNotFoundError(f"{folder} is no run folder: it has no config.json")
        return cls(Path(folder), from_dict(TrainConfig, _read_json(saved)))

    def write(self) -> None:
        """Make the folder and save what will run; a changed recipe keeps the old one beside it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "samples").mkdir(exist_ok=True)
        path, text = self.folder / "config.json", json.dumps(to_dict(self.config), indent=1, ensure_ascii=False)
        if path.exists() and path.read_text() != text:
            number = len(list(self.folder.glob("config.*.json")))
            os.replace(path, self.folder / f"config.{number}.json")
        write_atomically(path, text)
        write_atomically(self.folder / "environment.json", json.dumps(_environment(), indent=1))

    def exclusive(self) -> AbstractContextManager[None]:
        """See `exclusive`."""
        return exclusive(self.folder)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    def fraction(self) -> float:
        """Return how far the run is, by its log of record: 0 before the first step, 1 at the end."""
        return last_step(self.folder) / Plan(self.config.stages).num_steps


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or remove it and run the same recipe") from error


def _differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Yield "dotted.path: old -> new" for every value that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            yield from _differences(before.get(key), after.get(key), f"{path}.{key}" if path else key)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from _differences(*pair, f"{path}.{index}")
    elif before != after:
        yield f"{path}: {before!r} -> {after!r}"


def _environment() -> dict[str, Any]:
    """Return what the run's result may depend on and its configuration does not say."""
    packages = {}
    for name in ("glm45", "torch", "numpy", "tokenizers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "command": sys.argv,
        "git": git.stdout.strip() or "not a git checkout",
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "packages": packages,
    }


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder, until this one ends in whatever way.

    Raises OSError if another one is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another process is training in {folder}: wait until it ends, or stop it") from None
        yield
