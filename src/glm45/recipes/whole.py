"""Whole runs: the graph of steps from raw text to an evaluated model, by recipe."""

from collections.abc import Callable
from pathlib import Path

from glm45.pipeline import Step

STEPS = "glm45.recipes.steps"


def demo(*, fast: bool = False) -> list[Step]:
    """The report's whole recipe in minutes on two cores; `fast` is a smoke test of two."""
    return [
        Step("corpus", f"{STEPS}:build_corpus", {"recipe": "demo"}, cores=2, seconds=180),
        Step("pretrain", f"{STEPS}:pretrain", {"recipe": "demo"}, ("corpus",), cores=2, seconds=150),
    ]


RUNS: dict[str, Callable[..., list[Step]]] = {"demo": demo}


def whole_run(name: str, *, fast: bool = False) -> list[Step]:
    """Return the steps of a whole run. Raises ValueError with the known names."""
    if name not in RUNS:
        raise ValueError(f"no run {name!r}; known: {', '.join(RUNS)}")
    return RUNS[name](fast=fast)


def default_folder(name: str, fast: bool) -> Path:
    """Return where a run lives unless told otherwise."""
    return Path("runs") / (f"{name}-fast" if fast else name)
