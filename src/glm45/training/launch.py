"""Several processes on one machine for `glm45 train`: the laptop's stand-in for torchrun, quiet and with its signals.

On a cluster torchrun starts the processes, and this module does nothing.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from glm45.training.run import TrainConfig
from glm45.training.schedule import Plan

LAUNCHER = "GLM45_LAUNCHER"
"""Environment variable with the process that started this one: when that is gone, this one saves and leaves."""

MOST_PROCESSES = 8
"""Above this many cores, a run that was not told otherwise takes this many processes."""


def default_processes(config: TrainConfig) -> int:
    """Return how many processes of one thread train fastest here: one a core, as far as the batches divide.

    Measured on two cores (docs/training.md): two processes of one thread beat one of two threads. One process on a
    GPU, and wherever the layout asks for more than copies of the model.
    """
    import torch

    if torch.cuda.is_available() or config.layout.ranks_per_copy > 1:
        return 1
    if config.layout.replicate > 0:
        return config.layout.replicate
    rows = [segment.rows for segment in Plan(config.stages).segments]
    cores = min(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MOST_PROCESSES
    )
    return next(count for count in range(cores, 0, -1) if all(number % count == 0 for number in rows))


def started_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun, or `launch`, started."""
    return "RANK" in os.environ


def orphaned() -> bool:
    """Whether the process that `launch`ed this one is gone."""
    return LAUNCHER in os.environ and os.getppid() != int(os.environ[LAUNCHER])


def launch(arguments: list[str], processes: int) -> int:
    """Run `glm45 ARGUMENTS` in `processes` processes of one thread each and return the first failure's status, or 0.

    SIGTERM and Ctrl-C are passed on; if one process fails, the others are ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # glibc returns large blocks to the system at every free; training asks for the same ones again at every step.
    common |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
    common |= {
        LAUNCHER: str(os.getpid()),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "glm45", *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=None if rank == 0 else subprocess.DEVNULL,  # every rank would say the same
            stderr=None if rank == 0 else subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches them once, through us
        )
        for rank in range(processes)
    ]

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _wait(children)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen]) -> int:
    status = 0
    while any(child.poll() is None for child in children):
        failed = [child.returncode for child in children if child.returncode]
        if failed and not status:
            status = failed[0]
            deadline = time.monotonic() + 20  # the others may be saving, too
        if status and time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.1)
    return status or next((child.returncode for child in children if child.returncode), 0)
