import json

import pytest

from glm45.corpus.recipe import load
from glm45.environments.mathematics import mathematics_task
from glm45.recipes import decontamination
from glm45.recipes.decontamination import against_evaluations


@pytest.fixture
def suites(monkeypatch):
    """Two suites: one of a template and questions, one whose package has not been fetched."""

    def absent(options):
        raise FileNotFoundError("fetch it")

    tasks = [mathematics_task(str(n), f"What is {n} plus {n}?\nThink step by step.", str(2 * n)) for n in range(5)]
    monkeypatch.setattr(decontamination, "SUITES", {"sums": lambda options: tasks, "public": absent})


def test_a_corpus_is_held_against_the_suites_at_hand_and_names_the_others(suites, tmp_path):
    config = against_evaluations(load("demo"), tmp_path).decontamination
    assert config.files == (str(tmp_path / "sums.jsonl"),)
    assert config.not_compared == ("public",)
    items = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text().splitlines()]
    assert items[3] == {"question": "What is 3 plus 3?", "answer": "6"}  # without the template that all share


def test_unchanged_suites_are_not_written_again(suites, tmp_path):
    against_evaluations(load("demo"), tmp_path)
    written = (tmp_path / "sums.jsonl").stat().st_mtime_ns
    against_evaluations(load("demo"), tmp_path)
    assert (tmp_path / "sums.jsonl").stat().st_mtime_ns == written
