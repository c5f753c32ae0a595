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

from glm45 import cli
from glm45.config import override
from glm45.pipeline import Context, Pipeline, Step
from glm45.recipes import whole as whole_runs
from glm45.recipes.display import RunDisplay
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


def test_experts_are_kept_in_use_in_every_stage_of_a_whole_run():
    for name in ("demo", "nano_cpu", "one_gpu"):
        rates = {stage.router_bias_rate for stage in whole_run(name).training.stages}
        assert len(rates) == 1, name
        assert rates != {0.0}, name


def touch(context: Context) -> None:
    (context.folder / "out").write_text(str(context.config))


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Call `glm45 run demo` with three steps in place of the demo's; returns status, output and tokens."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)

    def steps(whole):
        return [
            Step("a", "test_whole:touch", {"seed": whole.seed}, seconds=5),
            Step("b", "test_whole:touch", needs=("a",), seconds=5),
            Step("c", "test_whole:touch", seconds=5),
        ]

    monkeypatch.setattr(whole_runs, "whole_steps", steps)

    def call(*arguments):
        status = cli.main(["run", "demo", "--run", str(tmp_path), *arguments])
        said = capsys.readouterr()
        records = {file.parent.name: json.loads(file.read_text()) for file in tmp_path.glob("steps/*/step.json")}
        return status, said.out + said.err, {name: record["token"] for name, record in records.items()}

    return call


@pytest.mark.slow
def test_steps_of_a_run_are_chosen_skipped_listed_and_run_again(run, tmp_path):
    status, said, tokens = run("--skip", "b")
    assert (status, set(tokens)) == (0, {"a", "c"})
    assert "c: done in" in said
    assert "0:05 of work left" in said, "b is left, at five seconds"
    assert [line.split(maxsplit=1) for line in run("--list")[1].splitlines()] == [
        ["a", "up to date"],
        ["b", "to do"],
        ["c", "up to date"],
    ]
    assert set(run("--only", "b")[2]) == {"a", "b", "c"}
    status, said, before = run("--again", "a", "typo")
    assert status == 1
    assert "no step 'typo'" in said
    assert run("--list")[1].count("up to date") == 3
    after = run("--again", "a")[2]
    assert {name for name in after if after[name] != before[name]} == {"a", "b"}
    written = (tmp_path / "report.html").stat().st_mtime_ns
    status, said, same = run()
    assert (status, same) == (0, after)
    assert (tmp_path / "report.html").stat().st_mtime_ns == written, "nothing was done"
    run("seed=1", "--only", "a")
    assert "from other inputs: b." in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 1


def test_the_time_left_of_a_resumed_step_is_by_the_pace_of_this_command(tmp_path):
    """Half was done before; a tenth more in ten seconds leaves forty."""
    pipeline = Pipeline(tmp_path, [Step("a", "x:y", seconds=300), Step("b", "x:y", needs=("a",), seconds=20)])
    context = Context(folder=pipeline.folder_of("a"), config={}, inputs={}, run=tmp_path)
    context.folder.mkdir(parents=True)
    display, started = RunDisplay(), {"a": time.time() - 10}
    context.progress(0.5)
    assert display._seconds_left(pipeline, "a", started) == pytest.approx(150)
    context.progress(0.6)
    assert display._seconds_left(pipeline, "a", started) == pytest.approx(40, abs=1)
    assert display._left(pipeline, started) == ", about 1:00 of work left"
    unknown = Pipeline(tmp_path, [Step("a", "x:y"), Step("b", "x:y", needs=("a",))])
    assert display._left(unknown, started) == ""


def test_the_table_shows_every_step(tmp_path):
    import io

    from rich.console import Console

    pipeline = Pipeline(tmp_path, [Step("first", "x:y", seconds=30), Step("second", "x:y", needs=("first",))])
    console = Console(file=io.StringIO(), width=120)
    console.print(RunDisplay()._table(pipeline, {"first": time.time()}))
    shown = console.file.getvalue()
    assert "first" in shown
    assert "0:00 / about 0:30" in shown
    assert "second" in shown


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
