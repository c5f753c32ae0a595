"""What a run writes down: the log of record, timings beside it, TensorBoard, an optional tracker, and the progress bar.

`metrics.jsonl` is the log of record: one line a step (or event), nothing in it that depends on the clock, so that an
interrupted run's file equals an uninterrupted one's byte for byte. What depends on the clock is in `timings.jsonl`.
"""

import importlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm45.config import to_dict

Record = Mapping[str, Any]


class JsonLines:
    """A JSON-lines file that is continued from a known length."""

    def __init__(self, path: Path, length: int | None = None) -> None:
        """Open for appending, after cutting the file to `length` bytes: what came later belongs to lost steps."""
        # Unbuffered: what a full disk refused is not tried again, with another error, when the file is closed.
        self._file = path.open("ab", buffering=0)
        self._path = path
        if length is not None:
            self.cut(length)

    @property
    def length(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def cut(self, length: int) -> None:
        """Remove everything after `length` bytes. Raises ValueError if the file is shorter."""
        if self._path.stat().st_size < length:
            raise ValueError(
                f"{self._path} has {self._path.stat().st_size} bytes and its checkpoint was written at {length}: the "
                "file was changed; restore it or begin another run"
            )
        os.truncate(self._path, length)
        self._file.seek(length)

    def write(self, record: Record) -> None:
        """Append one line. A number that JSON lacks (NaN, infinity) becomes null. Raises OSError on a full disk."""
        line = json.dumps({key: _jsonable(value) for key, value in record.items()}, ensure_ascii=False)
        left = (line + "\n").encode()
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            advice = "free some space and run the same command again"
            raise OSError(f"{self._path}: {error.strerror or error}; {advice}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Metrics:
    """The places that metrics go to: those in the run folder, and a tracker. Without a folder it is silent.

    Only rank 0 gives a folder. Raises ImportError with the command to install a missing tracker, ValueError with what
    one that does not start says.
    """

    def __init__(
        self, folder: Path | None, length: int, first_step: int, *, config: Any, log_every: int, tracker: str
    ) -> None:
        """Go on from `length` bytes of the log of record, which end with `first_step`.

        `log_every` is of TensorBoard and the tracker, which is shown `config`.
        """
        self._every = log_every
        self._record = self._timings = self._board = self._tracker = None
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._record = JsonLines(folder / "metrics.jsonl", length)
        self._timings = JsonLines(folder / "timings.jsonl")
        lost = first_step + 1 if length else 0  # steps from here on were not saved and will be done again
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=lost, max_queue=100)
        self._tracker = _open_tracker(tracker, folder, to_dict(config))

    @property
    def length(self) -> int:
        """Bytes of the log of record."""
        return 0 if self._record is None else self._record.length

    def step(self, record: Record, timing: Record) -> None:
        """Write one step; every `log_every` steps also to TensorBoard and the tracker."""
        if self._record is None or self._timings is None:
            return
        self._record.write(record)
        self._timings.write({"step": record["step"], **timing})
        if record["step"] % self._every == 0:
            self._forward({**record, **timing}, record["step"])

    def event(self, record: Record) -> None:
        """Write something that is not a step: an evaluation, an alarm, a rollback. It names its `event` and `step`."""
        if self._record is None:
            return
        self._record.write(record)
        self._forward({f"{record['event']}/{key}": value for key, value in record.items()}, record["step"])

    def cut(self, length: int) -> None:
        """Forget what was written to the log of record after `length` bytes."""
        if self._record is not None:
            self._record.cut(length)

    def close(self) -> None:
        """Close everything."""
        for sink in (self._record, self._timings, self._board):
            if sink is not None:
                sink.close()
        if self._tracker is not None:
            self._tracker.finish()

    def _forward(self, record: Record, step: int) -> None:
        numbers = {key: value for key, value in _flatten(record).items() if key != "step"}
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, step)
        if self._tracker is not None:
            self._tracker.log(numbers, step=step)


def read_record(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log of record; a last line cut short by a kill is left out."""
    lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def last_step(folder: Path) -> int:
    """Return the last step in a run's log of record; 0 if there is none yet."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65_536))
        lines = file.read().split(b"\n")[:-1]
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):
            continue
    return 0


def _flatten(record: Record, prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            flat[prefix + key] = value
    return flat


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _jsonable(inner) for key, inner in value.items()}
    return value


def _open_tracker(name: str, folder: Path, config: Record) -> Any:
    if name == "none":
        return None
    try:
        tracker = importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"tracker={name}: {error}; install it with pip install {name}") from error
    try:
        tracker.init(project="glm45", name=folder.name, config=dict(config))
    except Exception as error:  # of a kind that the tracker defines
        advice = "log in, keep its files here (WANDB_MODE=offline), or set tracker=none"
        raise ValueError(f"tracker={name} did not start: {error} To go on, {advice}") from error
    return tracker
