"""The whole recipe, from raw text to a report, as a newcomer runs it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glm45.config import override
from glm45.recipes.whole import RUNS, whole_run, whole_steps


def test_every_step_of_a_whole_run_names_a_function_that_exists():
    import importlib

    for name in RUNS:
        for step in whole_steps(whole_run(name)):
            module, name = step.function.split(":")
            assert callable(getattr(importlib.import_module(module), name))


def test_an_unknown_run_is_refused():
    with pytest.raises(ValueError, match="no run 'demon'; known: demo"):
        whole_run("demon")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_fast_demo_goes_from_raw_text_to_a_report(tmp_path):
    command = [sys.executable, "-m", "glm45", "run", "demo", "--fast", "--run", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "run/report.html").read_text()
    for section in (
        "What was run",
        ">Data<",
        "Training: base",
        "Reinforcement learning",
        "Evaluation",
        "Lineage",
    ):
        assert section in page
    exported = json.loads((tmp_path / "run/model/config.json").read_text())
    assert exported["model_type"] == "glm4_moe"
    again = subprocess.run(command, capture_output=True, text=True)
    assert "running" not in again.stderr, "a finished run was run again"
    assert again.returncode == 0


def test_a_seed_changes_every_step_but_the_corpus():
    first, second = (
        {step.name: step.config for step in whole_steps(override(whole_run("demo"), [f"seed={seed}"]))}
        for seed in (0, 1)
    )
    changed = {name for name in first if first[name] != second[name]}
    assert changed == set(first) - {"corpus", "evaluation", "publish"}


def start(folder, name):
    return subprocess.Popen(
        [sys.executable, "-m", "glm45", "run", name, "--run", str(folder)], stderr=subprocess.DEVNULL
    )


def children(process):
    """Process ids of the steps that a command has at work."""
    tasks = Path(f"/proc/{process.pid}/task")
    return [int(pid) for file in tasks.glob("*/children") for pid in file.read_text().split()]


def final_table(folder):
    """What every model scored on every suite, and the unified model's weights."""
    results = sorted(folder.glob("steps/evaluation/*/*/result.json"))
    scores = {str(file.relative_to(folder)): json.loads(file.read_text())["metrics"] for file in results}
    assert scores
    return scores, (folder / "model/model.safetensors").read_bytes()


@pytest.mark.proof
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("name", ["demo_fast", "demo"])
def test_a_run_killed_ten_times_ends_with_the_table_of_an_uninterrupted_one(name, tmp_path):
    """SIGKILL hits the command, or a step at work, at moments spread over the run.

    GLM45_RUNS may name a folder with finished runs, which then need not be made again.
    """
    whole, folder = Path(os.environ.get("GLM45_RUNS", tmp_path / "whole")) / name, tmp_path / "killed"
    assert start(whole, name).wait() == 0
    seconds = sum(json.loads(file.read_text())["wall_seconds"] for file in whole.glob("steps/*/step.json"))
    draw = random.Random(0)
    for number in range(10):
        command = start(folder, name)
        time.sleep(draw.uniform(0.03, 0.12) * seconds)
        assert command.poll() is None, f"the run ended before kill {number}: make the moments denser"
        os.kill(draw.choice([command.pid, *children(command)]), signal.SIGKILL)
        assert command.wait() != 0
        print(
            f"kill {number}: {sorted(file.parent.name for file in folder.glob('steps/*/step.json'))} were done",
            flush=True,
        )
    assert start(folder, name).wait() == 0
    assert final_table(folder) == final_table(whole)
