"""Steps run once, resume, and become stale exactly when what they depend on changes."""

import fcntl
import json
import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glm45.pipeline import Context, Pipeline, Step, StepError

HERE = Path(__file__)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Let the steps' processes import this file's functions."""
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))


def count(context: Context) -> None:
    """Write how often the step ran, and what it read."""
    runs = context.run / f"{context.folder.name}.runs"
    runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
    read = {name: json.loads((folder / "value").read_text()) for name, folder in context.inputs.items()}
    (context.folder / "value").write_text(json.dumps([context.config.get("value"), read]))


def fail(context: Context) -> None:
    raise ValueError(f"cannot do {context.folder.name}")


def slow(context: Context) -> None:
    """Count up in a file of the step's own, as resumable work does; while `hold` is there, no further than to five.

    A forked helper beside it, such as a pool's manager, inherits the step's locks.
    """
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True).start()
    done, hold = context.folder / "done", context.run / "hold"
    for number in range(int(done.read_text()) if done.exists() else 0, 20):
        context.progress(number / 20, f"at {number}")
        time.sleep(0.05)
        while number == 5 and hold.exists():
            time.sleep(0.01)
        done.write_text(str(number + 1))


def graph(folder, value=1):
    step = lambda name, *needs, **config: Step(name, "test_pipeline:count", config, needs)  # noqa: E731
    return Pipeline(folder, [step("a", value=value), step("b", "a"), step("c"), step("d", "b", "c")])


def runs(folder):
    return {name: len((folder / f"{name}.runs").read_text()) for name in "abcd"}


def test_a_finished_run_is_not_run_again(tmp_path):
    graph(tmp_path).run()
    graph(tmp_path).run()
    assert runs(tmp_path) == {"a": 1, "b": 1, "c": 1, "d": 1}
    assert json.loads((tmp_path / "steps/d/value").read_text()) == [
        None,
        {"b": [None, {"a": [1, {}]}], "c": [None, {}]},
    ]


@pytest.mark.slow
def test_running_a_step_again_makes_exactly_its_dependants_stale(tmp_path):
    graph(tmp_path).run()
    pipeline = graph(tmp_path)
    pipeline.invalidate("b")
    assert pipeline.pending() == ["b", "d"]
    pipeline.run()
    assert runs(tmp_path) == {"a": 1, "b": 2, "c": 1, "d": 2}


@pytest.mark.slow
def test_a_changed_configuration_makes_the_step_and_its_dependants_stale(tmp_path):
    graph(tmp_path).run()
    assert graph(tmp_path, value=2).pending() == ["a", "b", "d"]
    graph(tmp_path, value=2).run()
    assert runs(tmp_path) == {"a": 2, "b": 2, "c": 1, "d": 2}


@pytest.mark.slow
def test_steps_can_be_chosen_and_skipped(tmp_path):
    graph(tmp_path).run(skip=["b"])
    assert graph(tmp_path).pending() == ["b", "d"]
    with pytest.raises(ValueError, match="'d' needs 'b', which has not been run"):
        graph(tmp_path).run(only=["d"])
    graph(tmp_path).run(only=["b"])
    assert graph(tmp_path).pending() == ["d"]
    with pytest.raises(ValueError, match="no step 'x'"):
        graph(tmp_path).run(only=["x"])


def test_a_failure_names_the_step_and_its_cause(tmp_path):
    with pytest.raises(StepError, match=r"step 'bad' failed: ValueError: cannot do bad .*output\.log"):
        Pipeline(tmp_path, [Step("bad", "test_pipeline:fail")]).run()


def test_records_hold_lineage_and_cost(tmp_path):
    pipeline = graph(tmp_path)
    pipeline.run()
    lineage = pipeline.lineage()
    assert lineage["d"]["tokens"] == {"b": lineage["b"]["token"], "c": lineage["c"]["token"]}
    assert all(record["peak_memory_bytes"] > 1e6 and record["cpu_seconds"] > 0 for record in lineage.values())


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_goes_on_inside_the_step(tmp_path, how):
    program = (
        "import signal, sys; from glm45.pipeline import Pipeline, Step\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a script's background jobs ignore it
        "Pipeline(sys.argv[1], [Step('s', 'test_pipeline:slow')]).run()"
    )
    (tmp_path / "hold").touch()
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stderr=subprocess.DEVNULL)
    done = tmp_path / "steps/s/done"
    while not done.exists() or int(done.read_text() or 0) < 5:
        time.sleep(0.02)
    process.send_signal(how)
    process.wait()
    with (tmp_path / "steps/s/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the step, too, is gone
    (tmp_path / "hold").unlink()
    assert done.read_text() == "5"
    pipeline = Pipeline(tmp_path, [Step("s", "test_pipeline:slow")])
    assert pipeline.fraction("s")[1].startswith("at ")
    seen = []
    pipeline.run(watch=lambda p, running: seen.append(p.fraction("s")[0]))
    assert done.read_text() == "20"
    assert min(seen) >= 5 / 20
    assert how == signal.SIGKILL or pipeline.record("s")["wall_seconds"] > 0.9


def test_two_commands_in_one_folder_are_refused(tmp_path):
    pipeline = Pipeline(tmp_path, [Step("s", "test_pipeline:slow")])

    def second(*_):
        with pytest.raises(ValueError, match="another command is running"):
            Pipeline(tmp_path, [Step("s", "test_pipeline:slow")]).run()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(watch=second)


def test_graphs_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two steps"):
        Pipeline(tmp_path, [Step("a", "x:y"), Step("a", "x:y")])
    with pytest.raises(ValueError, match="needs 'b'"):
        Pipeline(tmp_path, [Step("a", "x:y", needs=("b",)), Step("b", "x:y")])


def test_a_watched_body_tells_how_far_it_is(tmp_path):
    context = Context(folder=tmp_path, config={}, inputs={}, run=tmp_path)
    told, deadline = tmp_path / "progress.json", time.monotonic() + 60
    with context.watching(lambda: 0.25):
        while not told.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert json.loads(told.read_text()) == {"fraction": 0.25, "message": ""}
