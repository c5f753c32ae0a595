"""What `glm45 train` and `glm45 export` do, once their arguments are read."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from glm45.model import hub
from glm45.model.transformer import Glm45
from glm45.training.checkpoint import committed_steps, load, newest_intact, path_of, training_tensors, verify
from glm45.training.estimate import ASSUMED_PEAK_SHARE, check_memory, estimate, measure_peak_flops
from glm45.training.launch import default_processes, launch, started_by_torchrun
from glm45.training.loop import RunStoppedError, load_tokenizer, train
from glm45.training.run import Run, TrainConfig
from glm45.training.schedule import Plan, plot
from glm45.training.state import choose_precision

H100_BF16 = 989e12
"""Dense bf16 operations a second of the GPU that estimates for other machines assume."""

GPU_BYTES = 80e9
"""Its memory."""


def run_training(run: Run, arguments: list[str], processes: int | None) -> int:
    """Train, in as many processes as are asked for or pay on this machine; return the exit status.

    `arguments` are those of the command line, for the processes to be started.
    """
    if started_by_torchrun():
        try:
            _check(run.config, int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        except (ValueError, OSError, MemoryError):
            if int(os.environ["RANK"]) > 0:
                return 1  # rank 0 says it
            raise
    else:
        # What a user can mend is told once, before there are many processes.
        processes = default_processes(run.config) if processes is None else processes
        _check(run.config, processes, processes)
        if processes > 1:
            with run.exclusive():
                pass
            return launch(arguments, processes)
    try:
        train(run)
    except RunStoppedError as stopped:
        print(stopped, flush=True)
        return 128 + (stopped.signal or signal.SIGTERM)
    return 0


def _check(config: TrainConfig, processes: int, processes_here: int) -> None:
    """Raise ValueError, OSError or MemoryError for a run that cannot be in so many processes, so many of them here."""
    config.layout.resolve(processes)
    available, where = available_memory()
    on_cpu = not torch.cuda.is_available()
    check_memory(config, available / (processes_here if on_cpu else 1), where, on_cpu)
    load_tokenizer(config)


def dry_run(run: Run) -> None:
    """Print what a run would do, and save the resolved configuration and a plot of its schedules.

    Raises MemoryError if a rank fits neither this machine nor a GPU of 80 GB.
    """
    config, plan = run.config, Plan(run.config.stages)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = config.layout.ranks_per_copy == 1
    if here:
        config = replace(config, layout=config.layout.resolve(default_processes(config)))
    dtype = getattr(torch, choose_precision(config, device))
    peak = measure_peak_flops(device, dtype) if here else H100_BF16
    console, table = Console(), Table("stage", "tokens", "steps", "length", "batch", "RoPE base", "MTP", "bias rate")
    for number, stage in enumerate(config.stages):
        table.add_row(
            stage.name,
            _short(stage.tokens),
            f"{plan.stage_steps(number):,}",
            f"{stage.sequence_length:,}",
            _short(stage.batch_tokens),
            f"{stage.rope_theta:,.0f}",
            f"{stage.mtp_weight}",
            f"{stage.router_bias_rate}",
        )
    console.print(table)
    expected = estimate(config, peak, on_cpu=here and device.type == "cpu")
    size = sum(expected["bytes_per_rank"].values())
    parts = ", ".join(f"{name} {_short(value)}B" for name, value in expected["bytes_per_rank"].items() if value)
    where = "processes of this machine" if here else "H100s, at least"
    console.print(f"{expected['tokens']:,} tokens in {expected['steps']:,} steps, {expected['flops']:.2e} operations")
    console.print(f"memory: about {_short(size)}B a rank ({parts})", soft_wrap=True)
    console.print(
        f"time: about {_duration(expected['seconds'])} on {expected['ranks']} {where}, if each reaches "
        f"{ASSUMED_PEAK_SHARE:.0%} of its {_short(peak)}flop/s",
        soft_wrap=True,
    )
    available, where = available_memory()
    if not here or size > available:
        check_memory(config, GPU_BYTES, "a GPU of 80 GB")
    if size > available:
        console.print(f"{where} has {_short(available)}B free: the run needs another one", soft_wrap=True)
    with run.exclusive():
        run.write()
    plot(config.stages, config.learning_rate, run.folder / "schedule.png")
    console.print(f"wrote {run.folder / 'config.json'} and schedule.png")


def export(folder: Path, out: Path, dtype: str, step: int | None) -> Path:
    """Write a run's newest intact checkpoint, or that of `step`, in the hub layout, with its tokenizer.

    Raises ValueError or FileNotFoundError for a run without such a checkpoint.
    """
    run = Run.read(folder)
    steps = committed_steps(run.checkpoints)
    if step is not None and step not in steps:
        raise ValueError(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps)) or 'none'}")
    if step is None:
        step, problems = newest_intact(run.checkpoints)
        for problem in problems:
            print(f"passed over: {problem}")
    chosen = path_of(run.checkpoints, step)
    verify(chosen)
    model = Glm45(run.config.model)
    load(chosen, training_tensors(model, []))
    trained = Plan(run.config.stages).step(max(step, 1) - 1).segment.stage
    model.set_rope_theta(trained.rope_theta)
    tokenizer = load_tokenizer(run.config) if Path(run.config.data).exists() else None
    if tokenizer is not None:
        model.config = replace(model.config, eos_token_id=tokenizer.eos_token_ids)
    hub.save(model, out, dtype=getattr(torch, dtype))
    if tokenizer is not None:
        tokenizer.save(out)
    return chosen


def available_memory() -> tuple[float, str]:
    """Return the bytes that a process may use and where they are."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory), "this GPU"
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return float("inf"), "this machine"
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return float(lines["MemAvailable"].split()[0]) * 1024, "this machine"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds / 60:,.1f} minutes"


def _short(number: float) -> str:
    """Three digits with a unit: 67108864 is 67.1M."""
    power = min(len(f"{number:.0f}") - 1, 12) // 3
    return f"{number / 1000**power:.3g}{' kMGT'[power].strip()}"
