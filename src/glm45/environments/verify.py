"""Rewards in killable processes: a verifier can hang, crash or eat memory, and the run goes on.

Each worker is a subprocess with an address-space limit. It answers one request at a time; a request that takes too
long costs the worker its life (with every child in its session) and the sample a typed `Failure`. Threads here only
wait on pipes, so scoring overlaps with generation.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from threading import Lock
from types import TracebackType
from typing import Any

from glm45.config import configuration, to_dict
from glm45.environments.protocol import Failure, Message, Outcome, Reward, Task
from glm45.environments.sandbox import SandboxLimits, remove_folders_of


@configuration
class RewardConfig:
    """Limits of the processes that judge answers. Not in the report."""

    num_workers: int = 1
    """Answers judged at the same time. Not in the report."""
    timeout_s: float = 20.0
    """Wall-clock seconds for one answer, more than `sandbox.wall_s`. Not in the report."""
    startup_timeout_s: float = 60.0
    """Added for the first answer of a process, which imports and proves the verifier. Not in the report."""
    memory_mb: int = 4096
    """Address space of one process in MiB. Not in the report."""
    sandbox: SandboxLimits = SandboxLimits()
    """Limits of the programs that `code` runs. Not in the report."""

    def __post_init__(self) -> None:
        if self.num_workers < 1 or self.timeout_s <= 0 or self.memory_mb < 256:
            raise ValueError(f"{self}: need num_workers >= 1, timeout_s > 0 and memory_mb >= 256")
        if self.sandbox.wall_s >= self.timeout_s:
            raise ValueError(
                f"sandbox.wall_s = {self.sandbox.wall_s} and timeout_s = {self.timeout_s}: endless programs would be "
                "failures of the verifier instead of wrong answers; set wall_s below timeout_s"
            )


class RewardWorkers:
    """A handful of processes that judge answers; use as a context manager."""

    def __init__(self, config: RewardConfig | None = None):
        self.config = config or RewardConfig()
        self.failures: Counter[str] = Counter()
        """How many answers could not be judged, by kind of failure."""
        self._lock = Lock()
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._workers = [_Worker(self.config) for _ in range(self.config.num_workers)]
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(self.config.num_workers, thread_name_prefix="reward")

    def prove(self, verifiers: Iterable[str]) -> None:
        """Load verifiers in a process of their own. Raises ValueError for the first that cannot judge on this machine.

        To be called before a run: later, every answer would be dropped as a failure.
        """
        for name in sorted(set(verifiers)):
            worker = self._idle.get()
            try:
                outcome = worker.ask(name, {"prove": name})
            finally:
                self._idle.put(worker)
            if isinstance(outcome, Failure):
                raise ValueError(f"verifier {name!r} cannot judge here ({outcome.kind}): {outcome.detail}")

    def submit(self, task: Task, response: Message) -> Future[Outcome]:
        """Judge `response` in the background."""
        return self._threads.submit(self._score, task, response)

    def score(self, task: Task, response: Message) -> Outcome:
        """Judge `response` and wait for it."""
        return self.submit(task, response).result()

    def close(self) -> None:
        """Kill every worker; answers still waiting are cancelled."""
        for worker in self._workers:
            worker.retire()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.kill()

    def __enter__(self) -> "RewardWorkers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _score(self, task: Task, response: Message) -> Outcome:
        worker = self._idle.get()
        try:
            outcome = worker.ask(task.verifier, {"task": dataclasses.asdict(task), "response": response})
        finally:
            self._idle.put(worker)
        if isinstance(outcome, Failure):
            with self._lock:
                self.failures[outcome.kind] += 1
        return outcome


class _Worker:
    """One subprocess, started when first needed and again after it was killed."""

    def __init__(self, config: RewardConfig):
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._proved: set[str] = set()
        self._retired = False
        self._starting = Lock()

    def ask(self, verifier: str, request: dict[str, Any]) -> Outcome:
        """Send a request that concerns a verifier and wait for the answer; the first also loads and proves it."""
        process = self._start()
        if process is None:
            return Failure("crash", "the reward processes were closed")
        assert process.stdin is not None
        allowed_s = self._config.timeout_s
        if verifier not in self._proved:
            allowed_s += self._config.startup_timeout_s
        try:
            process.stdin.write((json.dumps(request) + "\n").encode())
            process.stdin.flush()
        except BrokenPipeError:
            return self._died(process)
        line = self._read_line(process, allowed_s)
        if line is None:
            self.kill()
            subject = request["task"]["task_id"] if "task" in request else "its own examples"
            return Failure("timeout", f"{verifier} took longer than {allowed_s:g} s on {subject}")
        if not line.endswith(b"\n"):
            return self._died(process)
        self._proved.add(verifier)
        answer = json.loads(line)
        return Reward(**answer["reward"]) if "reward" in answer else Failure(**answer["failure"])

    def retire(self) -> None:
        """End the process and start no other; whoever waits for its answer gets a failure at once."""
        with self._starting:
            self._retired = True
            if self._process is not None and self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> None:
        process, self._process = self._process, None
        self._proved.clear()
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        remove_folders_of(process.pid)
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # an unsent request in the buffer
                stream.close()

    def _died(self, process: subprocess.Popen[bytes]) -> Failure:
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may have closed the channel and gone on
            process.wait(timeout=1.0)
        self.kill()
        return Failure("crash", f"the reward process ended with status {process.returncode}")

    def _start(self) -> subprocess.Popen[bytes] | None:
        with self._starting:
            if self._retired:
                return None
            if self._process is None or self._process.poll() is not None:
                self.kill()
                command = [sys.executable, "-m", "glm45.environments.worker", json.dumps(to_dict(self._config))]
                # One thread: BLAS workers would reserve address space and compete with the rollout.
                environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
                )
            return self._process

    @staticmethod
    def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes | None:
        """Return one line, a part of one if the process died, or None when the time is up."""
        assert process.stdout is not None
        line, deadline = b"", time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                if not chunk:
                    return line
                line += chunk
        return line
