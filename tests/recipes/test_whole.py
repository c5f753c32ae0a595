"""The whole recipe, from raw text to a report, as a newcomer runs it."""

import json
import subprocess
import sys

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
        "Data: corpus",
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
