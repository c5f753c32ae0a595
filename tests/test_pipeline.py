"""Steps run once, resume, and become stale exactly when what they depend on changes."""

import fcntl
import json
import multiprocessing
import os
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
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent), prepend=os.pathsep)


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


def test_unknown_names_are_refused_before_anything_is_thrown_away(tmp_path):
    graph(tmp_path).run(only=["a", "b"])
    with pytest.raises(ValueError, match="no step 'typo'"):
        graph(tmp_path).run(again=["a", "typo"])
    with pytest.raises(ValueError, match="'d' needs"):
        graph(tmp_path).run(again=["b"], only=["d"])
    assert graph(tmp_path).pending() == ["c", "d"]


@pytest.mark.slow
def test_a_step_and_what_needs_it_run_again_when_asked(tmp_path):
    graph(tmp_path).run()
    assert graph(tmp_path).run(again=["b"]) == ["b", "d"]
    assert runs(tmp_path) == {"a": 1, "b": 2, "c": 1, "d": 2}


def test_looking_at_a_finished_run_reads_every_record_once(tmp_path, monkeypatch):
    """Steps that each need all before them: without a memory every path through the graph is a reading."""
    names = [f"s{number}" for number in range(20)]
    steps = [Step(name, "test_pipeline:count", {}, tuple(names[:number])) for number, name in enumerate(names)]
    pipeline = Pipeline(tmp_path, steps)
    for name in names:
        pipeline.folder_of(name).mkdir(parents=True)
        identity, token = pipeline._identity(pipeline.steps[name]), f"token-{name}"
        (pipeline.folder_of(name) / "step.json").write_text(json.dumps({"identity": identity, "token": token}))
    read = []
    record = pipeline.record
    monkeypatch.setattr(pipeline, "record", lambda name: read.append(name) or record(name))
    assert pipeline.pending() == []
    asked = len(read)
    assert asked <= 20 + 20 * 19 / 2  # its own, and its inputs' for its identity
    assert [pipeline.fraction(name)[0] for name in names] == [1.0] * 20
    assert len(read) == asked


def test_a_failure_names_the_step_and_its_cause(tmp_path):
    with pytest.raises(StepError, match=r"step 'bad' failed: ValueError: cannot do bad .*output\.log"):
        Pipeline(tmp_path, [Step("bad", "test_pipeline:fail")]).run()


def test_records_hold_lineage_and_cost(tmp_path):
    pipeline = graph(tmp_path)
    pipeline.run()
    lineage = pipeline.lineage()
    assert lineage["d"]["tokens"] == {"b": lineage["b"]["token"], "c": lineage["c"]["token"]}
    assert all(record["peak_memory_bytes"] > 1e6 and record["cpu_seconds"] > 0 for record in lineage.values())


def large(context: Context) -> None:
    """Hold 60 MB in each of two helpers, each of which is busy for a second and a half."""
    size = 60_000_000
    helpers = [multiprocessing.get_context("fork").Process(target=hold, args=(size,)) for _ in range(2)]
    for helper in helpers:
        helper.start()
    for helper in helpers:
        helper.join()


def hold(size: int) -> None:
    block, end = bytearray(size), time.process_time() + 1.5
    while time.process_time() < end:
        block[:: 1 << 12] = bytes(len(block[:: 1 << 12]))


@pytest.mark.slow
def test_costs_are_of_all_processes_of_a_step_together_and_of_no_other(tmp_path):
    ballast = bytearray(b"x" * 400_000_000)  # of the command's, which the system counts as a peak of its children
    pipeline = Pipeline(tmp_path, [Step("s", "test_pipeline:large")])
    pipeline.run()
    del ballast
    record = pipeline.record("s")
    assert 120e6 < record["peak_memory_bytes"] < 220e6
    assert 2.8 < record["cpu_seconds"] < 5


@pytest.mark.slow
def test_costs_of_a_killed_attempt_count(tmp_path):
    (tmp_path / "hold").touch()
    pipeline = Pipeline(tmp_path, [Step("s", "test_pipeline:slow")])
    kept = tmp_path / "steps/s/started.json"

    def kill(*_):
        if kept.exists() and json.loads(kept.read_text())["costs"].get("wall_seconds", 0) > 0.9:
            children = map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
            # Of those of this process, which may have been left others by tests before.
            (step,) = (pid for pid in children if b"glm45.pipeline" in Path(f"/proc/{pid}/cmdline").read_bytes())
            os.kill(step, signal.SIGKILL)

    with pytest.raises(StepError, match="ended by signal 9"):
        pipeline.run(watch=kill)
    before = json.loads(kept.read_text())["costs"]
    (tmp_path / "hold").unlink()
    pipeline.run()
    record = pipeline.record("s")
    assert record["wall_seconds"] > before["wall_seconds"] + 0.7
    assert record["cpu_seconds"] > before["cpu_seconds"] > 0


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
