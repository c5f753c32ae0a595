"""Procedural arithmetic with written-out steps: documents for a corpus and tasks for reinforcement learning.

A problem is worked in one of two ways. A *careful* trace goes through the columns from the right and takes every
carry or borrow along; it is always right. A *sloppy* trace goes from the left and forgets them; it is right exactly
when there are none. Both are plausible text, so a model that was taught both has a choice to make, and reinforcement
learning something to select. Nothing here is in the report: it is the laptop's stand-in for reasoning data.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from glm45.config import configuration
from glm45.seeds import derive_seed

SYMBOLS = {"add": "+", "subtract": "-", "multiply": "*"}


@configuration
class ArithmeticConfig:
    """Which problems are drawn and how their solutions are written. Not in the report."""

    operations: tuple[str, ...] = ("add", "subtract", "multiply")
    """Drawn with equal probability; `multiply` is by a single digit from 2 to 9. Not in the report."""
    min_digits: int = 2
    """Fewest digits of the longer operand. Not in the report."""
    max_digits: int = 3
    """Most digits of the longer operand; the length of a trace grows with it. Not in the report."""
    careful_share: float = 1.0
    """Share of careful traces among written solutions; the rest are sloppy. Not in the report."""
    full_share: float = 0.0
    """Share of traces that spell out what is written and carried, about three times as long. Not in the report."""

    def __post_init__(self) -> None:
        unknown = set(self.operations) - set(SYMBOLS)
        if unknown or not self.operations:
            raise ValueError(f"operations = {self.operations}: choose from {', '.join(SYMBOLS)}")
        if not 1 <= self.min_digits <= self.max_digits:
            raise ValueError(f"min_digits = {self.min_digits}, max_digits = {self.max_digits}: need 1 <= min <= max")
        for name in ("careful_share", "full_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} = {getattr(self, name)}: a share lies between 0 and 1")


@dataclass(frozen=True, slots=True)
class Problem:
    """One exercise; `prompt` is what a model sees and `answer` the true result in decimal."""

    operation: str
    left: int
    right: int

    @property
    def prompt(self) -> str:
        """The question, short enough for a model with a million parameters."""
        return f"{self.left}{SYMBOLS[self.operation]}{self.right}=?"

    @property
    def question(self) -> str:
        """The prompt with the larger operand first: 2+3 and 3+2 are one question and never divided by a split."""
        return f"{max(self.left, self.right)}{SYMBOLS[self.operation]}{min(self.left, self.right)}=?"

    @property
    def answer(self) -> str:
        """The true result."""
        if self.operation == "add":
            return str(self.left + self.right)
        if self.operation == "subtract":
            return str(self.left - self.right)
        return str(self.left * self.right)

    @property
    def num_digits(self) -> int:
        """Digits of the longer operand: the difficulty."""
        return len(str(self.left))


@dataclass(frozen=True, slots=True)
class Trace:
    """A written solution: its steps, the answer they lead to, and how it was worked."""

    steps: str
    answer: str
    careful: bool


def draw_problem(source: random.Random, config: ArithmeticConfig) -> Problem:
    """Draw a problem; subtraction never goes below zero and the left operand is the longer one."""
    operation = source.choice(config.operations)
    num_digits = source.randint(config.min_digits, config.max_digits)
    lowest = 10 ** (num_digits - 1) if num_digits > 1 else 0
    left = source.randint(lowest, 10**num_digits - 1)
    if operation == "multiply":
        return Problem(operation, left, source.randint(2, 9))
    right = source.randint(lowest, 10**num_digits - 1)
    return (
        Problem(operation, max(left, right), min(left, right))
        if operation == "subtract"
        else Problem(operation, left, right)
    )


def write_trace(problem: Problem, careful: bool, full: bool = False) -> Trace:
    """Work a problem on paper, with every carry (`careful`) or with none, briefly or in `full` words."""
    columns = _columns(problem)
    steps, written, carry = [], [], 0
    # A sloppy worker starts at the left, where the first thing learnt is the leading digit; nothing can be carried.
    for index, (upper, lower) in columns if careful else reversed(columns):
        leading = index == len(columns) - 1
        step, digits, carry = _work_column(problem.operation, upper, lower, carry if careful else 0, leading, careful)
        steps.append(f"{step}, write {digits} carry {carry}" if full else step)
        written.append(digits)
    answer = "".join(reversed(written) if careful else written)
    return Trace(steps="\n".join(steps) if full else " ".join(steps), answer=str(int(answer)), careful=careful)


def _columns(problem: Problem) -> list[tuple[int, tuple[int, int]]]:
    """Pairs of digits from the right; multiplication pairs each digit with the whole multiplier."""
    upper = [int(digit) for digit in reversed(str(problem.left))]
    if problem.operation == "multiply":
        return list(enumerate((digit, problem.right) for digit in upper))
    lower = [int(digit) for digit in reversed(str(problem.right).zfill(len(upper)))]
    return list(enumerate(zip(upper, lower, strict=True)))


def _work_column(
    operation: str, upper: int, lower: int, carry: int, leading: bool, careful: bool
) -> tuple[str, str, int]:
    """Return the column as written, the digits it adds to the answer, and what it carries to the left."""
    if operation == "subtract":
        owed = upper - carry
        if not careful:  # the schoolchild's bug: always the smaller from the larger
            high, low = max(upper, lower), min(upper, lower)
            return f"{high}-{low}={high - low}", str(high - low), 0
        borrow = int(owed < lower)
        shown = f"{upper + 10 * borrow}-{carry}" if carry else f"{upper + 10 * borrow}"
        digit = owed + 10 * borrow - lower
        return f"{shown}-{lower}={digit}", str(digit), borrow
    value = (upper + lower if operation == "add" else upper * lower) + carry
    shown = f"{upper}{SYMBOLS[operation]}{lower}" + (f"+{carry}" if carry else "")
    digits = str(value) if leading else str(value % 10)
    return f"{shown}={value}", digits, 0 if leading else value // 10


def generate_documents(seed: int, count: int, config: ArithmeticConfig | None = None) -> Iterator[dict[str, Any]]:
    """Yield `count` worked problems as dictionaries with `text`, `prompt`, `answer` and `metadata`.

    `text` is the prompt, the steps and the answer they lead to, one to a line; `answer` is always the true one, and
    `metadata["correct"]` says whether the text agrees with it (by default every text does). The document at an index
    depends on the seed and the index alone.
    """
    config = config or ArithmeticConfig()
    for index in range(count):
        source = random.Random(derive_seed(seed, "arithmetic", index))
        problem = draw_problem(source, config)
        trace = write_trace(
            problem, careful=source.random() < config.careful_share, full=source.random() < config.full_share
        )
        yield {
            "text": f"{problem.prompt}\n{trace.steps}\n{trace.answer}\n",
            "prompt": problem.prompt,
            "answer": problem.answer,
            "metadata": {
                "source": "arithmetic",
                "operation": problem.operation,
                "left": problem.left,
                "right": problem.right,
                "num_digits": problem.num_digits,
                "question": problem.question,
                "steps": trace.steps,
                "careful": trace.careful,
                "correct": trace.answer == problem.answer,
            },
        }
