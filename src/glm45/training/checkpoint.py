"""Checkpoints: written in the background, committed at once, verified on the way in, loadable at any layout.

A checkpoint is `checkpoints/step-00000100/`: safetensors files written by `torch.distributed.checkpoint`, `state.json`
(everything that is not a tensor) and `commit.json` with the checksum of every file. It is written under another name
and renamed when whole, so a kill at any moment leaves the previous checkpoints as they were. Nothing is pickled.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from glm45.config import configuration
from glm45.training.dtensors import local

FORMAT = 1
"""Version of the layout described above; raised when an older reader could not read it."""


@configuration
class Retention:
    """When checkpoints are written and which are kept."""

    every: int = 1000
    """Steps between checkpoints."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept for good; 0 for none."""
    keep_best: bool = True
    """Whether the checkpoint with the lowest held-out loss is kept."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep_last < 1:
            raise ValueError(
                f"checkpoints: every {self.every} and keep_last {self.keep_last} must be 1 or more; for no periodic "
                "checkpoints set every above the number of steps"
            )


def training_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Return every tensor of a training state by name: `model.*` and `optimizer.*`, sharing memory with the run."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            tensors |= {f"optimizer.{names[parameter]}.{key}": value for key, value in state.items()}
    return tensors


class Checkpoints:
    """The checkpoints of one run folder.

    Writing happens in one background thread; the training loop only waits while its tensors are copied, and for the
    previous checkpoint if that is still being written. Errors of the thread are raised by the next call.
    """

    def __init__(self, folder: Path, retention: Retention) -> None:
        self.folder = folder
        self.retention = retention
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._staged: dict[str, torch.Tensor] = {}
        # Collectives of the writing thread must not meet those of the training step.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        if _rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for unfinished in folder.glob("*.partial"):
                shutil.rmtree(unfinished)
        if self._group is not None:
            dist.barrier(self._group)

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Start writing a checkpoint of `step` and return as soon as the tensors have been copied.

        `state` must be JSON. Raises OSError if the previous checkpoint could not be written.
        """
        self.wait()
        if (self.folder / _name(step)).exists():
            return
        self._stage(tensors)
        state = {"format": FORMAT, "step": step, **state}
        self._pending = self._thread.submit(self._write, step, json.dumps(state, indent=1))

    def wait(self) -> None:
        """Wait until everything is on disk. Raises OSError if it could not be written; earlier ones are intact."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            raise OSError(
                f"{self.folder}: checkpoint not written ({_first_line(error)}); the earlier checkpoints are intact. "
                "Free some space and run the same command again"
            ) from error

    def close(self) -> None:
        """Finish writing and stop the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def steps(self) -> list[int]:
        """Return the steps of all committed checkpoints, ascending."""
        return committed_steps(self.folder)

    def newest(self, only_every: int = 1) -> tuple[int, list[str]]:
        """See `newest_intact`."""
        return newest_intact(self.folder, only_every)

    def load(self, step: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Read a checkpoint into `tensors` in place, whatever the layout it was written at, and return its state.

        Raises ValueError if it holds another architecture: names or shapes that differ.
        """
        return load(self.folder / _name(step), tensors, self._group)

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints after `step`: damaged, or of steps that a rollback undid. The run makes them anew."""
        if self._group is not None:
            dist.barrier(self._group)  # every rank has chosen by what is there now
        if _rank() == 0:
            for later in self.steps():
                if later > step:
                    shutil.rmtree(self.folder / _name(later))
        if self._group is not None:
            dist.barrier(self._group)

    def prune(self, best: int | None) -> None:
        """Remove checkpoints that the policy does not keep. `best` is the step with the lowest held-out loss."""
        if _rank() != 0:
            return
        policy, steps = self.retention, self.steps()
        kept = set(steps[-policy.keep_last :])
        if policy.keep_every:
            kept |= {step for step in steps if step % policy.keep_every == 0}
        if policy.keep_best and best is not None:
            kept.add(best)
        scheduled = [step for step in steps if step % policy.every == 0]
        kept |= set(scheduled[-1:])  # where the run goes back to after a row of bad batches
        for step in set(steps) - kept:
            shutil.rmtree(self.folder / _name(step))

    def _stage(self, tensors: Mapping[str, torch.Tensor]) -> None:
        # The copies are kept from one checkpoint to the next: new memory costs more than copying.
        if self._staged.keys() != tensors.keys():
            self._staged = {name: torch.empty_like(tensor.detach(), device="cpu") for name, tensor in tensors.items()}
        with torch.no_grad():
            for name, tensor in tensors.items():
                local(self._staged[name]).copy_(local(tensor.detach()))

    def _write(self, step: int, state: str) -> None:
        partial = self.folder / f"{_name(step)}.partial"
        writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "no process group": one process is a layout like any other
            dcp.save(
                self._staged,
                storage_writer=writer,
                process_group=self._group,
                no_dist=self._group is None,
            )
        files = _checksums(partial, self._group)
        if _rank() == 0:
            _write_synced(partial / "state.json", state)
            files["state.json"] = _checksum(partial / "state.json")
            _write_synced(partial / "commit.json", json.dumps({"files": files}, indent=1))
            os.replace(partial, self.folder / _name(step))
            _sync_folder(self.folder)
        if self._group is not None:
            dist.barrier(self._group)


def committed_steps(folder: Path) -> list[int]:
    """Return the steps of the committed checkpoints in `folder`, ascending."""
    found = folder.glob("step-*/commit.json")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in found if path.parent.suffix != ".partial")


def newest_intact(folder: Path, only_every: int = 1) -> tuple[int, list[str]]:
    """Return the newest intact checkpoint's step and what was wrong with those passed over.

    `only_every` restricts to steps that are multiples of it. Raises FileNotFoundError if there is none.
    """
    problems: list[str] = []
    for step in reversed(committed_steps(folder)):
        if step % only_every:
            continue
        try:
            verify(folder / _name(step))
        except ValueError as error:
            problems.append(str(error))
        else:
            return step, problems
    detail = "; ".join(problems) or "none was ever committed"
    raise FileNotFoundError(f"{folder}: no intact checkpoint ({detail})")


def newest_state(folder: Path) -> dict[str, Any] | None:
    """Return the state of the newest checkpoint where that file is intact, whatever its tensors are; None without."""
    for step in reversed(committed_steps(folder)):
        try:
            verify(folder / _name(step), only=("state.json",))
        except ValueError:
            continue
        return read_state(folder / _name(step))
    return None


def verify(checkpoint: Path, only: Sequence[str] = ()) -> None:
    """Raise ValueError naming the file if a file of a checkpoint (`only` some) is missing or not as it was written."""
    try:
        files = json.loads((checkpoint / "commit.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{checkpoint}: no readable commit.json ({_first_line(error)})") from None
    for name in only or files:
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if _checksum(path) != files[name]:
            raise ValueError(f"{path} is damaged: its checksum differs from the one in commit.json")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint holds beside tensors. Raises ValueError for a newer format."""
    state = json.loads((checkpoint / "state.json").read_text())
    if state["format"] != FORMAT:
        raise ValueError(f"{checkpoint}: format {state['format']}, this version reads {FORMAT}: update glm45")
    return state


def load(checkpoint: Path, tensors: Mapping[str, torch.Tensor], group: Any = None) -> dict[str, Any]:
    """See `Checkpoints.load`; `tensors` may be a subset, such as the model without the optimiser."""
    state = read_state(checkpoint)
    reader = dcp.HuggingFaceStorageReader(str(checkpoint))
    entries = reader.read_metadata().state_dict_metadata
    held = {name: tuple(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    for name, tensor in tensors.items():
        if name not in held:
            raise ValueError(f"{checkpoint} has no {name}: it is of another architecture or optimiser")
        if held[name] != tuple(tensor.shape):
            raise ValueError(
                f"{checkpoint}: {name} is {list(held[name])} there and {list(tensor.shape)} here: it is of another "
                "architecture"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(dict(tensors), storage_reader=reader, process_group=group, no_dist=not dist.is_initialized())
    return state


def path_of(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of `step`."""
    return folder / _name(step)


def _checksums(folder: Path, group: Any) -> dict[str, str]:
    """Return the checksum of every file, the files divided among the ranks; each is on disk when this returns."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    world = 1 if group is None else dist.get_world_size(group)
    mine = {name: _checksum(folder / name, sync=True) for name in names[_rank() :: world]}
    if group is None:
        return mine
    parts: list[dict[str, str]] = [{}] * world
    dist.all_gather_object(parts, mine, group)
    return {name: digest for part in parts for name, digest in part.items()}


def _checksum(path: Path, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _name(step: int) -> str:
    return f"step-{step:08d}"
