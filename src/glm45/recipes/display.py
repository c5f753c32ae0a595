"""What a person sees while a whole run goes: one line a step with a bar and the time left, or plain lines in a log."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from glm45.pipeline import Pipeline


class RunDisplay:
    """Shows a pipeline; use as a context manager and pass `watch` to `Pipeline.run`."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        self._live = Live(console=self._console, refresh_per_second=4) if self._console.is_terminal else None
        self._told: dict[str, str] = {}
        self._begun = time.time()

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
            self._live.update(self._table(pipeline, started))
            return
        for name in pipeline.steps:
            state = "running" if name in started else "done" if pipeline.is_current(name) else "waiting"
            if self._told.get(name, "waiting") != state:
                took = (pipeline.record(name) or {}).get("wall_seconds", 0.0)
                cost = f" in {took:.0f} s" if state == "done" else ""
                print(f"[{_clock(time.time() - self._begun)}] {name}: {state}{cost}", file=sys.stderr, flush=True)
            self._told[name] = state

    def _table(self, pipeline: Pipeline, started: dict[str, float]) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, step in pipeline.steps.items():
            fraction, message = pipeline.fraction(name)
            if name in started:
                took, mark = time.time() - started[name], "[bold cyan]▶[/]"
                left = f"{_clock(took)} / about {_clock(self._expected(step.seconds, took, fraction))}"
            elif fraction >= 1.0:
                took, mark, message = (pipeline.record(name) or {}).get("wall_seconds", 0.0), "[green]✓[/]", ""
                left = _clock(took)
            else:
                mark, left, message = "[dim]·[/]", f"[dim]about {_clock(step.seconds)}[/]", ""
            bar = ProgressBar(total=1.0, completed=fraction, width=24)
            table.add_row(mark, name, bar, left, f"[dim]{message[:60]}[/]")
        waiting = sum(step.seconds * (1 - pipeline.fraction(name)[0]) for name, step in pipeline.steps.items())
        table.add_row(
            "", "", "", f"[bold]{_clock(time.time() - self._begun)}[/]", f"about {_clock(waiting)} of work left"
        )
        return table

    @staticmethod
    def _expected(planned: float, took: float, fraction: float) -> float:
        """Seconds that a step will have taken: by its own pace once that says something."""
        return took / fraction if fraction > 0.1 else max(planned, took)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
