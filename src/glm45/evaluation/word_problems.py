"""Grade-school word problems from templates, in the manner of GSM-Symbolic: names and numbers are drawn anew.

The package's own templates (`gsm` in `glm45.evaluation.benchmarks`) keep their numbers: to draw others would mean to
run the expressions in them. These are ours.
"""

import random
from collections.abc import Iterator

from glm45.environments.mathematics import mathematics_task
from glm45.environments.protocol import Task
from glm45.evaluation.long_context import NAMES
from glm45.seeds import derive_seed

THINGS = ("apples", "stamps", "marbles", "pencils", "shells", "cards")

TEMPLATES = {
    "whole": (
        "{name} fills {a} boxes with {b} {things} each; {c} are left over. How many are there?",
        "{name} is {a} and {other} is {b} times as old. How old is {other} in {c} years?",
        "{name} walks {a} miles a day for {b} days and then {c} miles more. How many miles are that?",
    ),
    "rest": (
        "{name} gives each of {a} friends {b} of {whole} {things}. How many does {name} keep?",
        "{name} reads {a} pages a day. How many pages of {whole} are left after {b} days?",
        "{name} buys {a} {things} at {b} coins each and pays with {whole} coins. How much is the change?",
    ),
}
"""Questions by what they ask for: the whole, a * b + c, or the rest, c."""


def word_problems(seed: int, count: int) -> Iterator[Task]:
    """Yield `count` problems with whole numbers."""
    for index in range(count):
        source = random.Random(derive_seed(seed, "word problems", index))
        kind, (name, other) = source.choice(sorted(TEMPLATES)), source.sample(NAMES, 2)
        a, b, c = source.randint(3, 12), source.randint(2, 9), source.randint(1, 20)
        numbers = {"a": a, "b": b, "c": c, "whole": a * b + c}
        things = source.choice(THINGS)
        question = source.choice(TEMPLATES[kind]).format(name=name, other=other, things=things, **numbers)
        answer = str(a * b + c if kind == "whole" else c)
        yield mathematics_task(f"word problems/{question}", question, answer, {"family": "word problems"})
