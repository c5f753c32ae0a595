"""The whole recipe, from raw text to a report, as a newcomer runs it."""

import json
import subprocess
import sys

import pytest

from glm45.recipes.whole import whole_run


def test_every_step_of_the_demo_names_a_function_that_exists():
    import importlib

    for fast in (False, True):
        for step in whole_run("demo", fast=fast):
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
