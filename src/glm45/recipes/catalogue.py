"""The training recipes by name."""

import difflib
import json
from collections.abc import Callable
from pathlib import Path

from glm45.config import from_dict
from glm45.recipes import demo, full, nano_cpu, one_gpu
from glm45.training.run import Run, TrainConfig

TRAINING: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo.training,
    "demo_fast": demo.fast,
    "nano_cpu": nano_cpu.training,
    "one_gpu": one_gpu.training,
    "air": full.air_training,
    "full": full.full_training,
}


def is_run_folder(name: str) -> bool:
    """Whether `name` is no recipe but the folder of a training run."""
    return name not in TRAINING and (Path(name) / "config.json").is_file()


def training_recipe(name: str) -> TrainConfig:
    """Return the training recipe of that name, in a JSON file, or of a run's folder. Raises ValueError for another."""
    if name.endswith(".json"):
        return from_dict(TrainConfig, json.loads(Path(name).read_text()))
    if is_run_folder(name):
        return Run.read(name).config
    if name not in TRAINING:
        near = difflib.get_close_matches(name, TRAINING, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"no recipe {name!r}; {hint}known: {', '.join(TRAINING)}, or give a JSON file or a run's folder"
        )
    return TRAINING[name]()
