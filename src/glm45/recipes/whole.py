"""Whole runs: the graph of steps from raw text to an evaluated model, by recipe."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from glm45.pipeline import Pipeline, Step
from glm45.recipes.display import RunDisplay
from glm45.report.run import write_report

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


def run_whole(
    name: str,
    folder: Path | None = None,
    *,
    fast: bool = False,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    again: Sequence[str] = (),
    list_only: bool = False,
) -> int:
    """Bring a whole run up to date and write its report; return the exit status.

    `again` throws the output of steps away first. Raises ValueError for unknown names, StepError if a step fails.
    """
    folder = folder or Path("runs") / (f"{name}-fast" if fast else name)
    pipeline = Pipeline(folder, whole_run(name, fast=fast))
    if list_only:
        for step in pipeline.steps:
            print(f"{step:<24} {'up to date' if pipeline.is_current(step) else 'to do'}")
        return 0
    for step in again:
        pipeline.invalidate(step)
    try:
        with RunDisplay() as display:
            pipeline.run(only=only, skip=skip, watch=display.watch)
    except KeyboardInterrupt:
        print(f"stopped; everything finished is kept. Go on with: glm45 run {name} --run {folder}", file=sys.stderr)
        return 130
    finally:
        if pipeline.lineage():
            report = write_report(folder)
    print(f"report: {report}")
    if (folder / "model").exists():
        print(f"chat:   glm45 chat {folder}\nserve:  glm45 serve {folder}")
    return 0
