"""How steps run: a chain of datatrove executors whose folders are named by what they do and everything before them.

A step's key is a hash of its name, its settings and the key of the step before it. Its folder bears the key, so a
step whose inputs and settings are unchanged is found finished and not run again, and one whose settings changed
starts in a fresh folder. Inside a folder datatrove marks finished tasks; an unfinished task starts over and
overwrites what it had written.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import multiprocess
from datatrove.executor import LocalPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats
from loguru import logger

from glm45.config import configuration
from glm45.pipeline import repeating

PRELOADED = (
    "glm45.corpus.pipeline",
    *("fasttext", "py3langid.langid", "resiliparse.extract.html2text"),
    *("sklearn.cluster", "sklearn.decomposition", "sklearn.feature_extraction.text"),
)
"""What tasks import, 3 s of it: imported once, by the process that all workers of all steps are forked from."""
FORMAT = 4  # counted up when a step's meaning changes, so that old work is not trusted


@configuration
class Executor:
    """Where steps run."""

    kind: Literal["local", "slurm", "ray"] = "local"
    """datatrove's executor. Not in the report."""
    workers: int = 2
    """Tasks that run at once. Not in the report."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the Slurm or Ray executor, for example `{"time": "4:00:00", "partition": "cpu"}`. Ray joins
    the cluster that RAY_ADDRESS names, or starts one of this machine alone."""


@dataclass(frozen=True)
class Step:
    """One executor's worth of work: `pipeline(folder)` returns the datatrove steps that each of `tasks` runs."""

    name: str
    tasks: int
    pipeline: Callable[[Path], Sequence[PipelineStep]]
    settings: Any = None


class QuietExecutor(LocalPipelineExecutor):
    """The local executor with datatrove's console output left to its log files."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        started = time.process_time()
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                return super()._run_for_rank(rank, local_rank, node_rank)
        finally:
            with self.logging_dir.open(f"cpu/{rank:05d}", "w") as stream:
                stream.write(f"{time.process_time() - started:.3f}")
            logger.remove()  # datatrove has put its default handler back, on the stream that we have just closed

    def run(self) -> PipelineStats | None:
        """Run the tasks that are not finished, in processes of one thread each."""
        multiprocess.set_forkserver_preload(list(PRELOADED))
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            return super().run()
        finally:
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = threads


class Chain:
    """Steps in order; `folder(name)` is where a step added before keeps its results."""

    def __init__(self, work: Path, root_settings: Any) -> None:
        self.work = work
        self.root_key = self.key = _digest("root", FORMAT, root_settings)
        self.steps: list[tuple[Step, Path]] = []

    def add(
        self, name: str, tasks: int, pipeline: Callable[[Path], Sequence[PipelineStep]], settings: Any = None
    ) -> Path:
        """Append a step and return its folder."""
        self.key = _digest(self.key, name, tasks, settings)
        folder = self.work / f"{len(self.steps):02d}-{name}-{self.key}"
        self.steps.append((Step(name, tasks, pipeline, settings), folder))
        return folder

    def run(self, executor: Executor, report: Callable[[str], None]) -> list[str]:
        """Run every unfinished step in order, and return the names of those that are not finished afterwards.

        Under Slurm there are some: the steps have then been submitted, each waiting for the one before it. Raises
        RuntimeError for a step whose tasks did not all finish: what follows would read half of its results.
        """
        previous: PipelineExecutor | None = None
        for step, folder in self.steps:
            logger.remove()  # what datatrove's tasks have to say is in the step's log files
            launched = _make_executor(step, folder, executor, previous)
            unfinished = len(launched.get_incomplete_ranks())
            if not unfinished:
                report(f"{step.name}: finished before")
                continue
            if executor.kind == "ray":
                _join_ray()
                logger.add(sys.stderr, level="WARNING", format="ray: {message}")  # lost workers: no task can log those
            started = time.monotonic()
            with _progress(step, folder, report):
                launched.run()
            if executor.kind == "slurm":
                previous = launched
                report(f"{step.name}: {unfinished} of {step.tasks} tasks submitted as job {launched.job_id}")
                continue
            if (finished := _num_finished(folder)) < step.tasks:
                raise RuntimeError(
                    f"{step.name}: {step.tasks - finished} of {step.tasks} tasks failed; see {folder / 'logs' / 'logs'}"
                )
            cpu = f" ({cpu_seconds(folder):.1f} s CPU)" if executor.kind == "local" else ""
            report(f"{step.name}: {unfinished} of {step.tasks} tasks in {time.monotonic() - started:.1f} s{cpu}")
        return [step.name for step, folder in self.steps if _num_finished(folder) < step.tasks]


def _num_finished(folder: Path) -> int:
    return len(list((folder / "logs" / "completions").glob("*")))


def _make_executor(step: Step, folder: Path, executor: Executor, previous: PipelineExecutor | None) -> PipelineExecutor:
    pipeline, logs = list(step.pipeline(folder)), str(folder / "logs")
    workers = executor.workers  # even for a single task: alone it would run, and import, in this process
    if executor.kind == "local":
        return QuietExecutor(pipeline, tasks=step.tasks, workers=workers, logging_dir=logs)
    common = {"pipeline": pipeline, "tasks": step.tasks, "workers": workers, "logging_dir": logs, "depends": previous}
    if executor.kind == "slurm":
        from datatrove.executor import SlurmPipelineExecutor

        return SlurmPipelineExecutor(job_name=f"glm45-{step.name}", **common, **executor.options)
    from datatrove.executor import RayPipelineExecutor

    return RayPipelineExecutor(**common, **executor.options)


def _join_ray() -> None:
    """Join the cluster that RAY_ADDRESS names, or start one of this machine alone: no dashboard, no statistics."""
    try:
        import ray
    except ImportError as error:
        raise ImportError('executor.kind is "ray", but ray is not installed: pip install "glm45[cluster]"') from error

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "local")
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="warning")


def cpu_seconds(folder: Path) -> float:
    """Return the processor time that a step's tasks took."""
    return sum(float(path.read_text() or 0) for path in (folder / "logs" / "cpu").glob("*"))


@contextlib.contextmanager
def _progress(step: Step, folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Report finished tasks now and then while a step runs."""
    last = 0

    def look() -> None:
        nonlocal last
        finished = _num_finished(folder)
        if finished != last:
            report(f"{step.name}: {finished}/{step.tasks} tasks")
            last = finished

    with repeating(2.0, look):
        yield


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
