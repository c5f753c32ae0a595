"""Each domain's verifier on hand-made answers, beside the proofs that it carries itself."""

import asyncio
import json

import pytest

from glm45.corpus.arithmetic import ArithmeticConfig, Problem, write_trace
from glm45.environments.arithmetic import ArithmeticVerifier, arithmetic_task, arithmetic_tasks, is_careful
from glm45.environments.formats import format_faults, language_mixing_rate, repetition_rate
from glm45.environments.instructions import InstructionVerifier, instruction_task, instruction_tasks, reference_reply
from glm45.environments.mathematics import MathematicsVerifier, mathematics_task
from glm45.environments.protocol import SingleTurn, Task, assistant, user
from glm45.environments.science import ScienceVerifier, chosen_letter, expert_verified_only, science_task
from glm45.environments.tasks import is_held_out_task, read_tasks, split_tasks, write_tasks
from glm45.environments.tools import ToolCallVerifier, tool_call, tool_tasks


def test_arithmetic_tells_right_answers_and_careful_traces():
    problem = Problem("add", 47, 85)
    task, verifier = arithmetic_task(problem), ArithmeticVerifier()
    for careful, value in ((True, 1.0), (False, 0.0)):
        trace = write_trace(problem, careful=careful)
        reward = verifier.score(task, assistant(trace.answer, trace.steps))
        assert reward.value == value
        assert reward.parts["careful"] == float(careful)
    assert verifier.score(task, assistant("", "132")).value == 0.0  # thought, but not answered
    assert verifier.score(task, assistant("1320")).value == 0.0
    assert verifier.score(task, assistant("it is <|begin_of_box|>132<|end_of_box|>.")).value == 1.0


def test_most_careful_traces_can_be_told_from_sloppy_ones():
    told = 0
    for task in arithmetic_tasks(3, 300, ArithmeticConfig(min_digits=3)):
        problem = Problem(*(task.metadata[name] for name in ("operation", "left", "right")))
        assert is_careful(task, assistant("", write_trace(problem, careful=True).steps))
        told += not is_careful(task, assistant("", write_trace(problem, careful=False).steps))
    assert told > 280


def test_arithmetic_tasks_are_distinct_and_end_with_an_error():
    tasks = list(arithmetic_tasks(1, 200))
    assert len({task.task_id for task in tasks}) == 200
    with pytest.raises(ValueError, match="seems to have only"):
        list(arithmetic_tasks(1, 2000, ArithmeticConfig(operations=("multiply",), min_digits=2, max_digits=2)))


@pytest.mark.parametrize(
    "answer,given,right",
    [
        (r"\frac{3}{4}", "0.75", True),
        (r"\frac{3}{4}", "$\\frac{6}{8}$", True),
        ("12", "the answer is $12$", True),
        ("12", "the answer is 21", False),
        (r"x^2+2x+1", "$(x+1)^2$", True),
        (r"(1, 2)", "$(1,2)$", True),
        (r"(1, 2)", "$(2,1)$", False),
        ("12", "", False),
    ],
)
def test_mathematics_compares_values(answer, given, right):
    assert MathematicsVerifier().score(mathematics_task("t", "?", answer), assistant(given)).value == float(right)


def test_an_unreadable_reference_is_an_error_not_a_zero():
    with pytest.raises(ValueError, match="the reference"):
        MathematicsVerifier().score(mathematics_task("t", "?", ""), assistant("1"))


@pytest.mark.parametrize(
    "text,letter",
    [
        ("B", "B"),
        ("(c)", "C"),
        ("D. because", "D"),
        ("Answer: A", "A"),
        ("Not A: the answer is B.", "B"),
        ("The answer is a gas, so C.", "C"),
        ("The answer I choose is B.", "B"),
        ("The answer is **B**", "B"),
        ("**B**", "B"),
        ("Option B", "B"),
        (r"Hence $\boxed{\text{D}}$", "D"),
        ("the answer is c", "C"),
        ("Answer: A? No, the answer is B, not option C", "B"),
        ("The answer is I think not there", None),
        ("Because of gravity", None),
        ("", None),
        ("42", None),
    ],
)
def test_the_chosen_letter(text, letter):
    assert chosen_letter(text) == letter


def test_science_shuffles_choices_and_keeps_provenance():
    tasks = [science_task(f"q{i}", "?", ["right", "x", "y", "z"], 0, expert_verified=i % 2 == 0) for i in range(40)]
    assert {task.answer for task in tasks} == set("ABCD")
    for task in tasks:
        assert f"{task.answer}. right" in task.messages[0]["content"]
    unknown = Task(task_id="u", verifier="science", messages=[user("?")], answer="A")
    assert len(list(expert_verified_only([*tasks, unknown]))) == 20
    assert ScienceVerifier().score(tasks[0], assistant("I do not know")).parts == {"correct": 0.0, "readable": 0.0}


def test_tool_calls_match_exactly_or_not_at_all():
    verifier = ToolCallVerifier()
    call = {"name": "remind", "arguments": {"day": "Monday", "hour": 3}}
    task = Task(task_id="t", verifier="tools", messages=[user("?")], answer=[call])

    def value(*calls, **more):
        return verifier.score(task, assistant("", tool_calls=list(calls), **more)).value

    assert value(tool_call("remind", {"hour": 3, "day": "Monday"})) == 1.0
    assert value(tool_call("remind", {"day": "Monday", "hour": "3"})) == 0.0
    assert value(tool_call("remind", {"day": "Monday", "hour": True})) == 0.0
    assert value(tool_call("remind", {"day": "Monday", "hour": 3, "minute": 0})) == 0.0
    assert value(tool_call("recall", {"day": "Monday", "hour": 3})) == 0.0
    assert value(tool_call("remind", call["arguments"]), tool_call("remind", call["arguments"])) == 0.0
    assert value() == 0.0
    assert value(tool_call("remind", call["arguments"]), faults=["unclosed call"]) == 0.0
    assert value({"type": "function", "function": {"name": "remind", "arguments": "{broken"}}) == 0.0


def test_generated_tool_tasks_cover_calls_and_silence():
    assert {len(task.answer) for task in tool_tasks(0, 60)} == {0, 1, 2}


def test_instructions_are_kept_by_their_reference_and_parts_tell_which_failed():
    for task in instruction_tasks(5, 100):
        assert InstructionVerifier().score(task, assistant(reference_reply(task))).value == 1.0, task
    task = instruction_task("?", {"num_words": 2, "starts_with": "a"})
    assert InstructionVerifier().score(task, assistant("a b c")).parts == {"num_words": 0.0, "starts_with": 1.0}
    with pytest.raises(ValueError, match="num_wrods"):
        instruction_task("?", {"num_wrods": 2})


def test_format_faults_name_the_wrong_mode():
    assert format_faults(assistant("4", "2+2"), thinking=True) == []
    assert format_faults(assistant("4"), thinking=True) == ["no reasoning where thinking was asked for"]
    assert format_faults(assistant("4", "2+2"), thinking=False) == ["reasoning where a direct answer was asked for"]
    assert "neither content nor a call" in format_faults(assistant("", "2+2"), thinking=True)
    assert "bad tag" in format_faults(assistant("4", faults=["bad tag"]), thinking=False)


def test_repetition_and_language_mixing_rates():
    prose = "the quick brown fox jumps over the lazy dog while seven wizards mix a potion in the old kitchen"
    assert repetition_rate(prose) == 0.0
    assert repetition_rate("and so it goes " * 20) > 0.9
    assert repetition_rate("xyz" * 100) > 0.9
    assert language_mixing_rate(prose) == 0.0
    assert language_mixing_rate("α + β = γ is a formula") == 0.0
    assert language_mixing_rate("これは日本語の文です") == 0.0
    assert 0.2 < language_mixing_rate("the answer 答案 is 四十二 and so 所以") < 0.6
    assert language_mixing_rate("Ответ", allowed="What is it?") == 1.0
    assert language_mixing_rate("Η CPU εκτελεί", allowed="Τι είναι η CPU;") == pytest.approx(3 / 11)


def test_one_question_in_several_wordings_is_on_one_side_of_the_split():
    train, held_out = split_tasks(tool_tasks(0, 20_000))
    calls = [{json.dumps(task.answer) for task in side if task.answer} for side in (train, held_out)]
    assert all(calls)
    assert not calls[0] & calls[1]
    swapped = [[arithmetic_task(Problem("add", *pair)) for pair in ((a, 57), (57, a))] for a in range(10, 99)]
    assert all(is_held_out_task(one) == is_held_out_task(other) for one, other in swapped)
    assert any(is_held_out_task(one) for one, _ in swapped)


def test_task_files_round_trip_and_refuse_bad_lines(tmp_path):
    tasks = list(tool_tasks(0, 5))
    tasks = list({task.task_id: task for task in tasks}.values())
    path = tmp_path / "tasks.jsonl"
    assert write_tasks(path, tasks) == len(tasks)
    assert list(read_tasks(path)) == tasks
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="occurred before"):
        list(read_tasks(path))
    path.write_text('{"task_id": "x", "prompt": "?"}\n')
    with pytest.raises(ValueError, match="line 1: not a task"):
        list(read_tasks(path))


def test_a_single_turn_environment_is_one_answer():
    environment = SingleTurn(ArithmeticVerifier())
    task = arithmetic_task(Problem("add", 1, 2))
    with pytest.raises(ValueError, match="before the answer"):
        environment.score()
    assert environment.reset(task) == [user("1+2=?")]
    assert asyncio.run(environment.step(assistant("3"))) == ([], True)
    assert environment.score().value == 1.0
