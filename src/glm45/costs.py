"""What a process and its helpers cost: wall and processor time, and the most memory at any moment.

The system's own account does not tell: `ru_maxrss` begins with the peak of the process that started this one, and for
children it is the largest single one. Linux only; elsewhere helpers and memory count as nothing.
"""

import contextlib
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path


class Costs:
    """The costs of this process and all below it so far, on top of those of earlier attempts."""

    def __init__(self, before: Mapping[str, float]) -> None:
        """`before` is what `measure` returned last in an earlier attempt, or empty."""
        self._before, self._started = before, time.time()
        self._cpu = self._resident = self._peak = 0.0

    def measure(self) -> dict[str, float]:
        """Return `wall_seconds`, `cpu_seconds` and `peak_memory_bytes`; called every second, so that peaks are seen.

        Memory that processes share is counted once (the proportional set size). The system takes a while to find that
        out, so it is asked only when the cheap sum of resident sizes is larger than ever.
        """
        pids = _family()
        resident = sum(_pages(pid) for pid in pids)
        if resident > self._resident:
            self._resident = resident
            self._peak = max(self._peak, sum(_proportional_bytes(pid) for pid in pids))
        own = sum(os.times()[:4])  # with helpers that have ended
        self._cpu = max(self._cpu, own + sum(_cpu_seconds(pid) for pid in pids[1:]))
        # Between two looks this process alone may have been larger.
        peak = max(self._peak, _kilobytes("/proc/self/status", "VmHWM") * 1024)
        return {
            "wall_seconds": self._before.get("wall_seconds", 0.0) + time.time() - self._started,
            "cpu_seconds": self._before.get("cpu_seconds", 0.0) + self._cpu,
            "peak_memory_bytes": max(self._before.get("peak_memory_bytes", 0.0), peak),
        }


def _family() -> list[int]:
    """Return the ids of this process, first, and of all that it and its descendants have started and that live."""
    pids = [os.getpid()]
    for pid in pids:  # grows on the way
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            pids += map(int, _read(str(children)).split())
    return pids


def _pages(pid: int) -> int:
    fields = _read(f"/proc/{pid}/statm").split()
    return int(fields[1]) if fields else 0


def _proportional_bytes(pid: int) -> int:
    return _kilobytes(f"/proc/{pid}/smaps_rollup", "Pss") * 1024


def _cpu_seconds(pid: int) -> float:
    """Return the time of a process and of the children that it has waited for."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return sum(int(fields[place]) for place in (11, 12, 13, 14)) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def _kilobytes(path: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _read(path), re.MULTILINE)
    return int(found[1]) if found else 0


def _read(path: str) -> str:
    """Return a file of the system's, empty if its process has ended or is another's."""
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""
