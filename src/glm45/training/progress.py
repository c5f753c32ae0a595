"""What a person sees while a run goes: a live bar on a terminal, a line now and then elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """Progress on screen; silent on all ranks but the first."""

    def __init__(self, enabled: bool, num_steps: int, first_step: int, every: int) -> None:
        self.console = Console(quiet=not enabled)
        self.every, self.num_steps = every, num_steps
        self._bar: Progress | None = None
        self._begun, self._first_step = time.monotonic(), first_step
        if enabled and self.console.is_terminal:
            self._bar = Progress(
                "{task.description}",
                BarColumn(),
                "{task.completed}/{task.total}",
                TextColumn("{task.fields[line]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
                refresh_per_second=2,
            )
            self._task = self._bar.add_task("train", total=num_steps, completed=first_step, line="")
            self._bar.start()

    def step(self, record: dict[str, Any], timing: dict[str, Any]) -> None:
        """Show one step."""
        line = _line(record, timing)
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], line=line, description=record["stage"])
        elif record["step"] % self.every == 0 or record["step"] in (1, self.num_steps):
            self.console.print(
                f"{record['stage']} {record['step']}/{self.num_steps} {line} {self._left(record['step'])}"
            )

    def say(self, message: str) -> None:
        """Print a message above the bar."""
        self.console.print(message, soft_wrap=True, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

    def _left(self, step: int) -> str:
        seconds = (time.monotonic() - self._begun) / max(step - self._first_step, 1) * (self.num_steps - step)
        return f"ETA {int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def _line(record: dict[str, Any], timing: dict[str, Any]) -> str:
    parts = [f"loss {record['loss']:.4f}", f"lr {record['learning_rate']:.2e}", f"norm {record['grad_norm']:.2f}"]
    if "max_violation" in record:
        parts.append(f"MaxVio {record['max_violation']:.2f}")
    parts.append(f"{timing['tokens_per_second']:,.0f} tok/s")
    parts.append(f"{timing['peak_share']:.0%} of peak")
    if "skipped" in record:
        parts.append(f"skipped: {record['skipped']}")
    return "  ".join(parts)


class StepClock:
    """Seconds in steps and between them, where a run is looked at and saved and waits for its data."""

    def __init__(self) -> None:
        self.step = self.before = self.in_steps = 0.0
        """Seconds of the last step, between the one before and it, and of all steps."""
        self._started = self._mark = time.perf_counter()

    def begin(self) -> None:
        """A step begins."""
        self.before, self._mark = self._lap()

    def end(self) -> None:
        """A step ends."""
        self.step, self._mark = self._lap()
        self.in_steps += self.step

    def share_between(self) -> float:
        """Return the share of the time since the beginning that was not in steps."""
        return 1 - self.in_steps / (time.perf_counter() - self._started)

    def _lap(self) -> tuple[float, float]:
        now = time.perf_counter()
        return now - self._mark, now
