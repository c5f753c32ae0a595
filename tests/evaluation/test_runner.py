"""Suites are judged rightly, resume where they were, and say how sure their figures are."""

import json
import math
import re

import pytest

from glm45.environments.protocol import Task, assistant, user
from glm45.environments.tasks import is_held_out_task, prompt_text
from glm45.environments.tools import tool_call
from glm45.evaluation.benchmarks import BENCHMARKS
from glm45.evaluation.runner import TRANSCRIPTS, Suite, SuiteSettings, run_suite
from glm45.evaluation.statistics import bootstrap
from glm45.evaluation.suites import GROUPS, SUITES, SuiteOptions, build_suite, expand
from glm45.evaluation.targets import Answer, Sampling
from glm45.evaluation.word_problems import word_problems

GENERATED = [name for name in SUITES if name not in (*BENCHMARKS, "base", "ifeval", "pathology", "long")]
NUMERIC = ["arithmetic-thinking", "arithmetic-direct", "long"]


class Scripted:
    """A target that answers by a function, and counts."""

    def __init__(self, reply, name="scripted"):
        self.name, self.reply, self.asked = name, reply, []

    async def answer(self, task, sampling, seed):
        self.asked.append((task.task_id, seed))
        return Answer({**self.reply(task, len(self.asked)), "faults": []}, "stop", 7)

    def close(self):
        pass


def gold(task, _):
    if task.verifier == "tools":
        calls = [tool_call(call["name"], call["arguments"]) for call in task.answer]
        return assistant("" if calls else "Glad to hear it.", tool_calls=calls)
    if task.verifier == "instructions":
        from glm45.environments.instructions import reference_reply

        return assistant(reference_reply(task))
    return assistant(str(task.answer))


@pytest.mark.parametrize("name", [*GENERATED, "long"])
def test_gold_answers_score_one_and_corrupted_ones_zero(name, tmp_path):
    suite = build_suite(name, SuiteOptions(num_tasks=6))
    right = run_suite(Scripted(gold), suite, tmp_path / "right")
    wrong = run_suite(
        Scripted(lambda task, _: assistant("zebra?!", tool_calls=[tool_call("x", {})])), suite, tmp_path / "wrong"
    )
    assert right.metrics["score"].mean == 1
    assert not right.failures
    assert wrong.metrics["score"].mean == 0


@pytest.mark.parametrize("name", NUMERIC)
def test_nearly_right_numbers_score_zero(name, tmp_path):
    suite = build_suite(name, SuiteOptions(num_tasks=6))
    for off in (1, -1, 10):
        nearly = lambda task, _, off=off: assistant(str(int(task.answer) + off))  # noqa: E731
        assert run_suite(Scripted(nearly, f"{off}"), suite, tmp_path).metrics["score"].mean == 0


def test_the_form_of_answers_is_judged_whatever_they_say(tmp_path):
    suite = build_suite("pathology", SuiteOptions(num_tasks=6))
    fine = lambda task, _: assistant("It is fine.", "Let me think." if task.thinking else "")  # noqa: E731
    silly = lambda task, _: assistant("on and on " * 30, "Let me think." if task.thinking else "")  # noqa: E731
    for name, reply, score in (("fine", fine, 1), ("silly", silly, 0)):
        assert run_suite(Scripted(reply, name), suite, tmp_path).metrics["score"].mean == score


def test_groups_stand_for_public_benchmarks():
    assert expand(["tools", "code", "aime"]) == ["tools", "humaneval", "aime24", "aime25"]
    assert all(name in SUITES for group in GROUPS.values() for name in group)


def test_word_problems_are_right():
    """By the numbers in their texts, the way a reader would."""
    for task in word_problems(1, 200):
        question = task.messages[0]["content"]
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        if question.endswith(("keep?", "days?", "change?")):
            whole = numbers.pop(numbers.index(max(numbers)))
            expected = whole - math.prod(numbers)
        else:
            expected = numbers[0] * numbers[1] + numbers[2]
        assert int(task.answer) == expected


@pytest.mark.parametrize("name", GENERATED)
def test_generated_suites_ask_only_held_out_prompts_and_the_same_ones_each_time(name):
    tasks = build_suite(name, SuiteOptions(num_tasks=7)).tasks
    assert all(is_held_out_task(task) for task in tasks)
    assert len({prompt_text(task) for task in tasks}) == len(tasks) == 7
    assert tasks == build_suite(name, SuiteOptions(num_tasks=7)).tasks


def sums(count):
    return [
        Task(task_id=f"t{i}", verifier="mathematics", messages=[user(f"{i}+1?")], answer=str(i + 1))
        for i in range(count)
    ]


def test_an_interrupted_suite_asks_only_for_what_is_missing(tmp_path):
    suite = Suite("sums", sums(6), SuiteSettings(num_samples=2))
    run_suite(Scripted(gold), suite, tmp_path)
    file = tmp_path / TRANSCRIPTS
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:7], lines[7][:20]]) + "\n")  # killed in the middle of a line
    again = Scripted(gold)
    result = run_suite(again, suite, tmp_path)
    assert len(again.asked) == 5
    assert result.metrics["score"].mean == 1
    changed = Scripted(gold)
    run_suite(
        changed, Suite("sums", sums(6), SuiteSettings(num_samples=2, sampling=Sampling(temperature=1.0))), tmp_path
    )
    assert len(changed.asked) == 12, "answers drawn in another way do not count"


def test_samples_of_a_task_are_averaged_and_counted_for_pass_at_k(tmp_path):
    reply = lambda task, n: assistant(task.answer if n % 2 else "0")  # noqa: E731
    suite = Suite("sums", sums(4), SuiteSettings(num_samples=4, ks=(1, 2, 4, 8)))
    result = run_suite(Scripted(reply), suite, tmp_path)
    assert result.metrics["score"].mean == pytest.approx(0.5)
    assert "pass@8" not in result.metrics
    assert result.num_answers == 16
    stored = json.loads((tmp_path / "result.json").read_text())
    assert stored["metrics"]["score"]["mean"] == pytest.approx(0.5)


def test_only_the_end_of_an_answer_is_judged_if_asked(tmp_path):
    suite = Suite("sums", sums(2), SuiteSettings(last_characters=4))
    wordy = lambda task, _: assistant("99 " * 50 + f"<|begin_of_box|>{task.answer}<|end_of_box|>")  # noqa: E731
    assert run_suite(Scripted(wordy), suite, tmp_path / "a").metrics["score"].mean == 0


def test_empty_and_ambiguous_suites_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no tasks"):
        run_suite(Scripted(gold), Suite("x", [], SuiteSettings()), tmp_path)
    with pytest.raises(ValueError, match="several tasks with the id 't0'"):
        run_suite(Scripted(gold), Suite("x", sums(1) * 2, SuiteSettings()), tmp_path)
    with pytest.raises(ValueError, match="no suite 'y'"):
        build_suite("y", SuiteOptions())


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    import numpy as np

    generator = np.random.default_rng(0)
    draws = [bootstrap(list(generator.binomial(1, 0.3, 100).astype(float)), resamples=400) for _ in range(200)]
    assert 0.88 <= sum(e.low <= 0.3 <= e.high for e in draws) / 200 <= 0.99
    with pytest.raises(ValueError, match="no task"):
        bootstrap([])
