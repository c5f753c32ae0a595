"""The recipes by name."""

import difflib
from collections.abc import Callable

from glm45.recipes import demo, full, nano_cpu, one_gpu
from glm45.training.run import TrainConfig

TRAINING: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo.training,
    "demo_whole": demo.whole,
    "demo_fast": demo.fast,
    "nano_cpu": nano_cpu.training,
    "one_gpu": one_gpu.training,
    "air": full.air_training,
    "full": full.full_training,
}


def training_recipe(name: str) -> TrainConfig:
    """Return the training part of a recipe. Raises ValueError with the known names."""
    if name not in TRAINING:
        near = difflib.get_close_matches(name, TRAINING, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no recipe {name!r}; {hint}known: {', '.join(TRAINING)}")
    return TRAINING[name]()
