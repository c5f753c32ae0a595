"""A judge's verdicts score answers, are asked once, and where there is none, nothing is learnt."""

import dataclasses
import json

import pytest

from glm45.environments.protocol import Task, assistant, user
from glm45.evaluation.endpoint import HttpTarget
from glm45.evaluation.judge import VERDICTS, Judge
from glm45.evaluation.runner import Suite, SuiteSettings, run_suite
from glm45.evaluation.targets import Answer

TASKS = [
    Task(task_id=str(i), verifier="arithmetic", messages=[user(f"What is {i} + 1?")], answer=str(i + 1))
    for i in range(4)
]


class Wordy:
    """Answers rightly in words that rules cannot read, but for task 3."""

    name = "wordy"

    async def answer(self, task, sampling, seed):
        words = {"1": "It is one.", "2": "It is two.", "3": "It is three.", "4": "It is nine."}
        return Answer({**assistant("x" * 50 + words[task.answer]), "faults": []}, "stop", 5)


def judged(body):
    asked = body["messages"][0]["content"]
    assert "What is" in asked
    reference = asked.partition("<reference>\n")[2].partition("\n")[0]
    answer = asked.partition("<answer>\n")[2].partition("\n</answer>")[0]
    right = {"1": "one", "2": "two", "3": "three", "4": "four"}[reference] in answer
    return "The answer is not INCORRECT.\nCORRECT" if right else "They differ.\n**INCORRECT**"


def test_verdicts_are_the_score_and_are_asked_once(endpoint, chat, tmp_path):
    endpoint.script = lambda path, body: (200, {}, chat(judged(body)))
    tasks = [dataclasses.replace(task, verifier="mathematics") for task in TASKS]  # whose rules read the words as wrong
    judge, suite = Judge(HttpTarget(endpoint.url, "judge", extensions=False)), Suite("s", tasks, SuiteSettings())
    result = run_suite(Wordy(), suite, tmp_path, judge=judge)
    assert result.metrics["score"].mean == 3 / 4
    assert result.metrics["part:rules"].mean == 0
    assert result.metrics["part:agreement"].mean == 1 / 4
    sent = endpoint.asked[0][1]
    assert (sent["temperature"], sent["max_tokens"]) == (0.0, 1024), "the report's settings of its checker"
    assert len((tmp_path / VERDICTS).read_text().splitlines()) == len(endpoint.asked) == 4
    run_suite(Wordy(), suite, tmp_path, judge=judge)
    assert len(endpoint.asked) == 4


def test_a_judge_that_does_not_say_makes_a_failure_not_a_zero(endpoint, chat, tmp_path):
    endpoint.script = lambda path, body: (200, {}, chat("I would rather not say."))
    judge = Judge(HttpTarget(endpoint.url, "judge"))
    result = run_suite(Wordy(), Suite("s", TASKS, SuiteSettings()), tmp_path, judge=judge)
    assert result.failures == {"judge": 4}
    assert "score" not in result.metrics


def test_the_judge_sees_only_what_is_judged(endpoint, chat, tmp_path):
    endpoint.script = lambda path, body: (200, {}, chat("CORRECT"))
    settings = SuiteSettings(last_characters=10)
    run_suite(Wordy(), Suite("s", TASKS[:1], settings), tmp_path, judge=Judge(HttpTarget(endpoint.url, "j")))
    assert "xx" not in endpoint.asked[0][1]["messages"][0]["content"]
    assert json.loads((tmp_path / VERDICTS).read_text())["correct"] is True


def test_references_that_are_no_text_are_left_to_rules(endpoint, tmp_path):
    task = Task(task_id="t", verifier="tools", messages=[user("Hi")], answer=[], tools=[])
    endpoint.script = lambda path, body: pytest.fail("the judge was asked")

    class Polite:
        name = "polite"

        async def answer(self, task, sampling, seed):
            return Answer({**assistant("Hello."), "faults": []}, "stop", 1)

    judge = Judge(HttpTarget(endpoint.url, "j"))
    assert run_suite(Polite(), Suite("s", [task], SuiteSettings()), tmp_path, judge=judge).metrics["score"].mean == 1
