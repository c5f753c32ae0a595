"""What a person sees while a whole run goes: one line a step with a bar and the time left, or plain lines in a log."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from glm45.pipeline import Pipeline


class RunDisplay:
    """Shows a pipeline; use as a context manager and pass `watch` to `Pipeline.run`."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._told: dict[str, str] = {}
        self._begun = time.time()
        self._first: dict[str, float] = {}  # how far each running step was when this command took it up

    def __enter__(self) -> "RunDisplay":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def watch(self, pipeline: Pipeline, started: dict[str, float]) -> None:
        """Draw the state of every step."""
        if self._live is not None:
            self._live.update(self._table(pipeline, started), refresh=True)
            return
        for name in pipeline.steps:
            state = "running" if name in started else "done" if pipeline.is_current(name) else "waiting"
            if self._told.get(name, "waiting") != state:
                took = (pipeline.record(name) or {}).get("wall_seconds", 0.0)
                cost = f" in {took:.0f} s" if state == "done" else ""
                now = _clock(time.time() - self._begun)
                print(f"[{now}] {name}: {state}{cost}{self._left(pipeline, started)}", file=sys.stderr, flush=True)
            self._told[name] = state

    def _table(self, pipeline: Pipeline, started: dict[str, float]) -> Table:
        table = Table.grid(padding=(0, 2))
        for _ in range(4):  # a narrow terminal cuts the message, on its line, and nothing else
            table.add_column(no_wrap=True)
        table.add_column()
        for name in pipeline.steps:
            fraction, message = pipeline.fraction(name)
            left = self._seconds_left(pipeline, name, started)
            if name in started:
                took, mark = time.time() - started[name], "[bold cyan]▶[/]"
                told = _clock(took) + ("" if left is None else f" / about {_clock(took + left)}")
            elif fraction >= 1.0:
                took, mark, message = (pipeline.record(name) or {}).get("wall_seconds", 0.0), "[green]✓[/]", ""
                told = _clock(took)
            else:
                mark, told, message = "[dim]·[/]", "" if left is None else f"[dim]about {_clock(left)}[/]", ""
            bar = ProgressBar(total=1.0, completed=fraction, width=16)
            table.add_row(mark, name, bar, told, Text(message[:60], "dim", no_wrap=True, overflow="ellipsis"))
        begun = f"[bold]{_clock(time.time() - self._begun)}[/]"
        table.add_row("", "", "", begun, self._left(pipeline, started).removeprefix(", "))
        return table

    def _left(self, pipeline: Pipeline, started: dict[str, float]) -> str:
        """Say how much work is left, if that is known of every step."""
        left = [self._seconds_left(pipeline, name, started) for name in pipeline.steps]
        known = [seconds for seconds in left if seconds is not None]
        return f", about {_clock(sum(known))} of work left" if len(known) == len(left) else ""

    def _seconds_left(self, pipeline: Pipeline, name: str, started: dict[str, float]) -> float | None:
        """Return what a step will still take: by its own pace once that says something. None if nobody knows."""
        fraction, planned = pipeline.fraction(name)[0], pipeline.steps[name].seconds
        if name in started:
            here = fraction - self._first.setdefault(name, fraction)  # a resumed step did the rest before
            if here > 0.05:
                return (time.time() - started[name]) / here * (1 - fraction)
        return 0.0 if fraction >= 1.0 else None if planned is None else planned * (1 - fraction)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
