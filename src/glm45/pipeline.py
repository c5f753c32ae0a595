"""A run as a graph of steps: each in a process and a folder of its own, resumable, with its lineage written down.

A step is a function `run(context)` named by its import path. Its folder is `RUN/steps/NAME`; when it returns, a
record with its configuration, the identity of every input, times and peak memory is put beside its output. A step is
up to date if its record names today's configuration and today's inputs, so changing or re-running a step makes
exactly what depends on it stale. An unfinished step keeps its folder and is run again in it: resuming inside a step
is the step's business.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm45.costs import Costs
from glm45.files import write_atomically

RECORD = "step.json"
STARTED = "started.json"
PROGRESS = "progress.json"
OUTPUT = "output.log"
LOCK = ".lock"

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
"""Keeps glibc from giving large buffers back at every step: 10,000 page faults a training step less."""


@dataclass(frozen=True)
class Step:
    """One node of the graph."""

    name: str
    """Unique in the run; also the name of its folder."""
    function: str
    """Import path of the function that does it, such as `glm45.recipes.steps:build_corpus`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """JSON-ready arguments; a change makes the step stale."""
    needs: tuple[str, ...] = ()
    """Names of the steps whose folders it reads."""
    cores: int = 1
    """How many cores it keeps busy: steps run side by side while their cores fit the machine."""
    seconds: float | None = None
    """Expected duration on two laptop cores, for the display's time left; None if nobody has measured it."""


@dataclass
class Context:
    """What a step's function gets."""

    folder: Path
    """Where it writes; not empty if it was interrupted before."""
    config: dict[str, Any]
    """Its configuration."""
    inputs: dict[str, Path]
    """Folders of the steps that it needs, by name."""
    run: Path
    """The run's folder."""

    def progress(self, fraction: float, message: str = "") -> None:
        """Tell the display how far the step is (0 to 1) and what it is doing."""
        _write_json(self.folder / PROGRESS, {"fraction": fraction, "message": message})

    @contextlib.contextmanager
    def watching(self, fraction: Callable[[], float]) -> Iterator[None]:
        """Tell the display every second how far the body is, by what `fraction` finds."""
        with repeating(1.0, lambda: self.progress(fraction())):
            yield


@contextlib.contextmanager
def repeating(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` in a thread of its own every so many seconds while the body runs."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(seconds):
            act()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class StepError(RuntimeError):
    """A step ended with an error; the message names it and its log."""


class Pipeline:
    """The steps of one run folder."""

    def __init__(self, folder: str | Path, steps: Iterable[Step]) -> None:
        """Raises ValueError for two steps of one name, an unknown need or a circle."""
        self.folder = Path(folder)
        self.steps: dict[str, Step] = {}
        for step in steps:
            if step.name in self.steps:
                raise ValueError(f"two steps are named {step.name!r}")
            unknown = [name for name in step.needs if name not in self.steps]
            if unknown:
                raise ValueError(f"step {step.name!r} needs {unknown[0]!r}, which is not among the steps before it")
            self.steps[step.name] = step
        self._current: dict[str, bool] = {}  # what `is_current` found since a step last changed

    def folder_of(self, name: str) -> Path:
        """Return the folder of a step."""
        return self.folder / "steps" / name

    def record(self, name: str) -> dict[str, Any] | None:
        """Return the record of a finished step, or None."""
        return _read_json(self.folder_of(name) / RECORD)

    def is_current(self, name: str) -> bool:
        """Whether a step has finished with today's configuration on today's inputs."""
        if name not in self._current:
            record = self.record(name)
            self._current[name] = (
                record is not None
                and all(self.is_current(need) for need in self.steps[name].needs)
                and record["identity"] == self._identity(self.steps[name])
            )
        return self._current[name]

    def pending(self) -> list[str]:
        """Return the steps that are not up to date, in order."""
        return [name for name in self.steps if not self.is_current(name)]

    def invalidate(self, name: str) -> None:
        """Throw a step's output away; what depends on it becomes stale by itself. Raises ValueError if unknown."""
        self.check_known([name])
        shutil.rmtree(self.folder_of(name), ignore_errors=True)
        self._current.clear()

    def check_known(self, names: Sequence[str]) -> None:
        """Raise ValueError for a name that is no step, listing those that are."""
        for name in names:
            if name not in self.steps:
                raise ValueError(f"no step {name!r}; the steps are {', '.join(self.steps)}")

    def _identity(self, step: Step) -> str:
        """What a step's output depends on: function, configuration, and the tokens of its inputs' records."""
        inputs = {name: (self.record(name) or {}).get("token") for name in step.needs}
        text = json.dumps([step.function, dict(step.config), inputs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # --- running -----------------------------------------------------------------------------------------------------

    def run(
        self,
        *,
        only: Sequence[str] = (),
        skip: Sequence[str] = (),
        again: Sequence[str] = (),
        cores: int | None = None,
        prepare: Callable[[], None] | None = None,
        watch: Callable[["Pipeline", dict[str, float]], None] | None = None,
    ) -> list[str]:
        """Bring the run up to date, side by side where cores and needs allow; return the steps that were run.

        `only` restricts it to these steps (their inputs must be there), `skip` leaves steps and what needs them out,
        `again` throws the output of steps away first. `prepare` is called once the folder is this command's alone,
        `watch(pipeline, started)` every second and at every change, with the start time of every running step. Raises
        StepError when a step fails, after the others have been stopped; Ctrl-C stops every step by SIGINT, so that
        each can save. Raises ValueError if another process is at work in this run's folder.
        """
        self.check_known([*only, *skip, *again])
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / LOCK, f"another command is running in {self.folder}: wait for it or stop it"):
            self._current = dict.fromkeys(again, False)  # and what another command changed before is looked at anew
            todo = self._todo(set(only), set(skip))  # refuses before anything is thrown away
            for name in again:
                self.invalidate(name)
            if prepare is not None:
                prepare()
            self._run(list(todo), cores or os.cpu_count() or 1, watch)
        return todo

    def _run(
        self,
        todo: list[str],
        cores: int,
        watch: Callable[["Pipeline", dict[str, float]], None] | None,
    ) -> None:
        free, capacity, watched = cores, cores, 0.0
        running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        try:
            while todo or running:
                for name in list(todo):
                    share = min(self.steps[name].cores, capacity)
                    if share <= free and all(self.is_current(need) for need in self.steps[name].needs):
                        running[name] = (self._start(self.steps[name], share), time.time())
                        todo.remove(name)
                        free -= share
                        watched = 0.0
                for name, (process, _) in list(running.items()):
                    if process.poll() is not None:
                        del running[name]
                        self._current.clear()
                        watched = 0.0
                        free += min(self.steps[name].cores, capacity)
                        if process.returncode:
                            raise StepError(self._explain_failure(name, process.returncode))
                if watch is not None and time.monotonic() - watched >= 1.0:
                    watched = time.monotonic()
                    watch(self, {name: started for name, (_, started) in running.items()})
                time.sleep(0.1)
        finally:
            _stop([process for process, _ in running.values()])

    def _todo(self, only: set[str], skip: set[str]) -> list[str]:
        left_out = set(skip)
        for step in self.steps.values():
            if any(need in left_out for need in step.needs):
                left_out.add(step.name)
        todo = [name for name in self.pending() if name not in left_out and (not only or name in only)]
        for name in todo:
            for need in self.steps[name].needs:
                if need not in todo and not self.is_current(need):
                    raise ValueError(f"step {name!r} needs {need!r}, which has not been run: run it too")
        return todo

    def _start(self, step: Step, cores: int) -> subprocess.Popen[bytes]:
        folder = self.folder_of(step.name)
        identity = self._identity(step)
        self._current.clear()
        started = _read_json(folder / STARTED)
        if started is None or started["identity"] != identity or (folder / RECORD).exists():
            shutil.rmtree(folder, ignore_errors=True)  # of other inputs or another configuration
            folder.mkdir(parents=True)
        job = {
            "identity": identity,
            "function": step.function,
            "config": dict(step.config),
            "inputs": {need: str(self.folder_of(need)) for need in step.needs},
            "tokens": {need: (self.record(need) or {})["token"] for need in step.needs},
            "run": str(self.folder),
            "costs": (started or {}).get("costs", {}) if (folder / STARTED).exists() else {},
        }
        _write_json(folder / STARTED, job)
        environment = {**ALLOCATOR, **os.environ, "OMP_NUM_THREADS": str(cores)}
        with (folder / OUTPUT).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "glm45.pipeline", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # so that Ctrl-C reaches the steps through us alone, once
            )

    def _explain_failure(self, name: str, status: int) -> str:
        log = self.folder_of(name) / OUTPUT
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        cause = lines[-1].strip() if lines else f"exit status {status}"
        if status < 0:
            cause = f"it was ended by signal {-status}"
        return f"step {name!r} failed: {cause} (its log: {log}); mend the cause and run the same command to go on"

    # --- looking -----------------------------------------------------------------------------------------------------

    def fraction(self, name: str) -> tuple[float, str]:
        """Return how far a step is (0 to 1) and what it says it is doing."""
        if self.is_current(name):
            return 1.0, ""
        progress = _read_json(self.folder_of(name) / PROGRESS) or {}
        return float(progress.get("fraction", 0.0)), str(progress.get("message", ""))

    def lineage(self) -> dict[str, Any]:
        """Return every finished step's record: what it was made from and what that cost."""
        records = {name: self.record(name) for name in self.steps}
        return {name: record for name, record in records.items() if record is not None}


def _stop(processes: Sequence[subprocess.Popen[bytes]], patience: float = 60.0) -> None:
    """Ask processes to save and leave; end those that do not within `patience` seconds."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    deadline = time.time() + patience
    for process in processes:
        try:
            process.wait(timeout=max(0.1, deadline - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _write_json(path: Path, values: Any) -> None:
    write_atomically(path, json.dumps(values, indent=1) + "\n")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


@contextlib.contextmanager
def locked(path: Path, refusal: str, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock that the system releases when this process ends, however it ends."""
    deadline = time.time() + patience
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.time() >= deadline:
                    raise ValueError(refusal) from None
                time.sleep(0.1)
        yield


def _end_with_parent() -> None:
    """Ask the system to end this process by SIGTERM when the one that started it is gone, even by SIGKILL."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only; elsewhere the lock below still protects
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def main(folder: Path) -> int:
    """Run the step whose job lies in `folder`, in this process, and write its record."""
    _end_with_parent()
    # A pool's manager is a fork of ours: outliving us it would hold our locks for ever.
    os.register_at_fork(after_in_child=_end_with_parent)
    # A command started in the background of a script ignores Ctrl-C, and so would we: it is how we are stopped.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A step whose parent was killed may still be saving in this folder: wait for it.
    with locked(folder / LOCK, f"another process is at work in {folder}", patience=60):
        return _work(folder)


def _work(folder: Path) -> int:
    job = json.loads((folder / STARTED).read_text())
    module, name = job["function"].split(":")
    inputs = {need: Path(path) for need, path in job["inputs"].items()}
    context = Context(folder=folder, config=job["config"], inputs=inputs, run=Path(job["run"]))
    costs = Costs(job["costs"])

    def keep_costs() -> None:
        _write_json(folder / STARTED, {**job, "costs": costs.measure()})

    try:
        with repeating(1.0, keep_costs):  # what a killed step had cost counts, too
            getattr(importlib.import_module(module), name)(context)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("GLM45_TRACEBACK"):
            raise
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    finally:
        keep_costs()
    record = {
        **{key: job[key] for key in ("identity", "function", "config", "tokens")},
        "token": uuid.uuid4().hex[:16],
        "finished": time.time(),
        **costs.measure(),
    }
    _write_json(folder / RECORD, record)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
