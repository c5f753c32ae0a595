"""Comparisons of arms and of models, against values computed by hand."""

import json
import math

import pytest

from glm45.environments.protocol import Failure, Reward, Task, assistant, user
from glm45.posttraining.comparison import arms_table, compare_arms, retention, retention_table
from glm45.rl.sample import Sample


def write_run(folder, scores: dict[int, float], tokens: int, pools: str = "", chosen: int = 0) -> None:
    """A run of two updates, with an evaluation where `scores` has one; a temperature is chosen after the second."""
    folder.mkdir()
    lines = []
    for step in range(3):
        line = {"step": step} if step == 0 else {"step": step, "generated_tokens": tokens, "num_samples": 4.0}
        if step:
            line |= {"learnt_tokens": 10.0, "truncation": 0.5, "alarms": ["entropy collapse? 1 to 0"] * (step - 1)}
        if step == 2:
            line["temperature_choice_tokens"] = chosen
        if step in scores:
            line |= {"held_out_greedy": scores[step], "held_out_greedy_error": 0.02, "held_out_full_cap": 0.5}
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "config.json").write_text(json.dumps({"pools": pools}))
    (folder / "step.json").write_text(json.dumps({"cpu_seconds": 7.0}))


def test_arms_are_compared_at_equal_tokens_and_charged_for_their_pools(tmp_path):
    (tmp_path / "pools").mkdir()
    (tmp_path / "pools" / "pools.json").write_text(json.dumps({"samples": 30, "generated_tokens": 60}))
    (tmp_path / "pools" / "step.json").write_text(json.dumps({"cpu_seconds": 5.0}))
    write_run(tmp_path / "cheap", {0: 0.1, 1: 0.2, 2: 0.3}, tokens=50)
    write_run(
        tmp_path / "dear", {0: 0.1, 1: 0.4, 2: 0.6}, tokens=40, pools=str(tmp_path / "pools" / "pools.json"), chosen=7
    )
    rows = compare_arms({name: tmp_path / name for name in ("cheap", "dear")})
    assert rows["cheap"]["generated tokens"] == 100
    assert rows["dear"]["generated tokens"] == 60 + 2 * 40 + 7
    assert rows["dear"]["of these for choosing"] == 67
    assert rows["dear"]["core-seconds"] == 12.0
    assert rows["dear"]["samples"] == 8 + 30
    assert rows["dear"]["after"]["greedy"] == {"value": 0.6, "error": 0.02}
    assert rows["dear"]["at equal tokens"]["greedy"]["value"] == 0.4  # 100 tokens, after the first update
    assert rows["cheap"]["at equal tokens"]["greedy"]["value"] == 0.3
    table = arms_table(rows)
    assert "within 100 generated tokens" in table
    assert "| dear  | 10.0 ± 2.0" in table
    assert "entropy collapse" in table
    alone = arms_table(compare_arms({"cheap": tmp_path / "cheap"}))
    assert "equal tokens" not in alone.lower()


def answers(*right: tuple[int, int]) -> list[list[Sample]]:
    """Groups of one prompt each, with so many right samples of so many."""
    groups = []
    for number, (num_right, size) in enumerate(right):
        task = Task(task_id=str(number), verifier="x", messages=[user("?")], answer=None)
        group = [Sample(task=task, group_id=number, index=index) for index in range(size)]
        for index, sample in enumerate(group):
            sample.append_generated([1], [0.0], assistant("!"), 0, truncated=False)
            sample.judge(Reward(float(index < num_right)))
        groups.append(group)
    return groups


def test_retention_and_its_error_are_of_paired_prompts():
    found = retention(answers((2, 2), (2, 2), (1, 2), (1, 2)), answers((2, 2), (1, 2), (1, 2), (1, 2)))
    assert (found.expert, found.unified, found.num_prompts) == (0.75, 0.625, 4)
    assert found.kept == pytest.approx(5 / 6)
    gaps = [1 - 5 / 6, 0.5 - 5 / 6, 0.5 - 5 / 12, 0.5 - 5 / 12]
    assert found.kept_error == pytest.approx(math.sqrt(sum(gap * gap for gap in gaps) / 3 / 4) / 0.75)
    assert "| tool   | 75.0      | 62.5            | 83.3 ±" in retention_table({"tool": found})
    same = answers((1, 2), (2, 2))
    assert retention(same, same).kept_error == 0.0
    nothing = retention(answers((0, 2)), same[:1])
    assert nothing.kept is None
    assert "nothing to keep" in retention_table({"tool": nothing})


def test_an_answer_that_could_not_be_judged_says_nothing_about_retention():
    expert, unified = answers((2, 2), (1, 2), (2, 2)), answers((1, 2), (1, 2), (2, 2))
    for sample in (unified[0][1], *unified[2]):
        sample.reward = None
        sample.judge(Failure("timeout", "slow"))
    found = retention(expert, unified)
    assert (found.expert, found.unified, found.num_prompts) == (0.75, pytest.approx(2 / 3), 2)
    with pytest.raises(ValueError, match="no prompt has an answer of both"):
        retention(expert[2:], unified[2:])
