"""The arithmetic family: careful traces are right, sloppy ones exactly where nothing is carried."""

import random
import re

import pytest

from glm45.corpus.arithmetic import ArithmeticConfig, Problem, draw_problem, generate_documents, write_trace

SEVEN_DIGITS = ArithmeticConfig(min_digits=1, max_digits=7)


def problems(count: int) -> list[Problem]:
    source = random.Random(3)
    return [draw_problem(source, SEVEN_DIGITS) for _ in range(count)]


def has_carry(problem: Problem) -> bool:
    """Whether any column but the leading one carries or borrows, worked out without the module's own columns."""
    for power in range(1, len(str(problem.left))):
        modulus = 10**power
        left, right = problem.left % modulus, problem.right % modulus
        if problem.operation == "add" and left + right >= modulus:
            return True
        if problem.operation == "subtract" and left < right:
            return True
        if problem.operation == "multiply" and (left // 10 ** (power - 1)) * problem.right >= 10:
            return True
    return False


def test_every_careful_trace_reaches_the_true_answer():
    for problem in problems(2000):
        assert write_trace(problem, careful=True).answer == problem.answer, problem


def test_a_sloppy_trace_is_right_exactly_when_nothing_is_carried():
    for problem in problems(2000):
        assert (write_trace(problem, careful=False).answer == problem.answer) is not has_carry(problem), problem


def test_every_written_equation_of_a_trace_holds():
    for problem in problems(500):
        for careful in (True, False):
            for left, result in re.findall(r"([\d+*-]+)=(\d+)", write_trace(problem, careful, full=True).steps):
                first, *rest = re.split(r"([+*-])", left)
                value = int(first)
                for sign, number in zip(rest[::2], rest[1::2], strict=True):
                    value = {"+": value + int(number), "-": value - int(number), "*": value * int(number)}[sign]
                assert value == int(result), (problem, left, result)


def test_hand_worked_examples():
    assert write_trace(Problem("add", 47, 85), careful=True).steps == "7+5=12 4+8+1=13"
    assert write_trace(Problem("add", 47, 85), careful=False).steps == "4+8=12 7+5=12"
    assert write_trace(Problem("add", 47, 85), careful=False).answer == "122"
    assert write_trace(Problem("subtract", 42, 17), careful=True).steps == "12-7=5 4-1-1=2"
    assert write_trace(Problem("subtract", 42, 17), careful=False).answer == "35"
    assert write_trace(Problem("multiply", 47, 6), careful=True).steps == "7*6=42 4*6+4=28"


def test_full_traces_are_longer():
    brief, full = (write_trace(Problem("add", 4712, 8599), careful=True, full=full).steps for full in (False, True))
    assert len(full) > 2 * len(brief)


def test_documents_depend_on_seed_and_index_only_and_share_is_kept():
    config = ArithmeticConfig(careful_share=0.3)
    documents = list(generate_documents(5, 1000, config))
    assert documents[:10] == list(generate_documents(5, 10, config))
    assert documents[0] != next(generate_documents(6, 1, config))
    assert 0.25 < sum(d["metadata"]["careful"] for d in documents) / 1000 < 0.35
    assert all(d["text"].startswith(d["prompt"]) for d in documents)
    assert all(d["metadata"]["correct"] == d["text"].rstrip().endswith("\n" + d["answer"]) for d in documents)
    assert all(d["metadata"]["correct"] for d in generate_documents(5, 300))


def test_bad_configurations_are_refused():
    with pytest.raises(ValueError, match="choose from add, subtract, multiply"):
        ArithmeticConfig(operations=("divide",))
    with pytest.raises(ValueError, match="need 1 <= min <= max"):
        ArithmeticConfig(min_digits=4)
