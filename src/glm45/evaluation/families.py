"""Generated questions in the manner of BIG-Bench Hard, for base models: three solved examples, then one to continue.

The kinds of question are BBH's; every question here is made from a seed, and only held-out ones are asked. The report
evaluates base models on BBH itself (its table 2).
"""

import datetime as dt
import itertools
import random
from collections.abc import Callable, Iterator

from glm45.data.splits import is_held_out
from glm45.environments.protocol import Task
from glm45.evaluation.likelihood import choice_task
from glm45.seeds import derive_seed

Question = tuple[str, list[str], int]
"""The question, its choices, and the index of the right one."""

NUM_SHOTS = 3
"""Solved examples before a question, as in BBH."""
PEOPLE = ("Alice", "Bob", "Claire", "Dave", "Eve", "Fred", "Gertrude", "Helen")
FRUITS = ("apple", "banana", "orange", "plum", "peach", "grape")
TOOLS = ("hammer", "drill", "saw", "chisel", "wrench", "file")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COLOURS = ("red", "blue", "green", "black", "white", "yellow")
YES_NO = ["Yes", "No"]


def boolean_expressions(source: random.Random) -> Question:
    """A truth value from nots, ands and ors; brackets leave no doubt about precedence."""
    text, value = _boolean(source, depth=2)
    return f"{text} is", ["True", "False"], 0 if value else 1


def _boolean(source: random.Random, depth: int) -> tuple[str, bool]:
    if depth == 0:
        value = source.random() < 0.5
        return str(value), value
    left, a = _boolean(source, depth - 1)
    right, b = _boolean(source, depth - 1)
    negated = source.random() < 0.5
    word, value = ("and", a and b) if source.random() < 0.5 else ("or", a or b)
    return (f"not ( {left} {word} {right} )", not value) if negated else (f"( {left} {word} {right} )", value)


def closing_brackets(source: random.Random) -> Question:
    """Which brackets close a sequence (BBH's Dyck languages)."""
    pairs = {"(": ")", "[": "]", "{": "}"}
    text, still_open = "", ""
    while len(text) < source.randint(6, 12) or len(still_open) < 2:
        if still_open and source.random() < 0.4:
            text, still_open = f"{text}{pairs[still_open[-1]]} ", still_open[:-1]
        else:
            bracket = source.choice("([{")
            text, still_open = f"{text}{bracket} ", still_open + bracket
    right = [pairs[bracket] for bracket in reversed(still_open)]
    wrong = [[*right[:-1], other] for other in pairs.values() if other != right[-1]]
    return _shuffled(source, f"Close all brackets: {text.strip()}", [" ".join(right), *map(" ".join, wrong)])


def navigate(source: random.Random) -> Question:
    """Whether steps forward and backward, with turns around, lead back to the start; half of them do."""
    steps = [(source.randint(1, 9), source.random() < 0.3) for _ in range(source.randint(2, 3))]
    position, facing, text = 0, 1, ""
    for length, turns in steps:
        position += facing * length
        text += f" Take {length} steps forward."
        if turns:
            facing, text = -facing, f"{text} Turn around."
    if (position > 0) == (facing > 0):
        facing, text = -facing, f"{text} Turn around."
    back = abs(position) if source.random() < 0.5 else abs(position) + source.randint(1, 4)
    home = position + facing * back == 0
    return f"Do these instructions lead back to the start?{text} Take {back} steps forward.", YES_NO, 0 if home else 1


def object_counting(source: random.Random) -> Question:
    """How many of some things there are, among other things."""
    wanted, others = source.sample((FRUITS, TOOLS), 2)
    kinds = {FRUITS: "fruits", TOOLS: "tools"}
    chosen = [(name, source.randint(1, 3)) for name in source.sample(wanted, 3)]
    listed = chosen + [(name, source.randint(1, 3)) for name in source.sample(others, 2)]
    source.shuffle(listed)
    things = ", ".join(f"{NUMBERS[number]} {name}{'s' * (number > 1)}" for name, number in listed)
    total = sum(number for _, number in chosen)
    near = [value for value in range(max(1, total - 2), total + 3) if value != total][:3]
    return _shuffled(source, f"I have {things}. How many {kinds[wanted]} do I have?", list(map(str, [total, *near])))


def shuffled_objects(source: random.Random) -> Question:
    """Who holds what after swaps."""
    people, balls = source.sample(PEOPLE, 3), source.sample(COLOURS, 3)
    text = ", ".join(f"{person} has the {ball} ball" for person, ball in zip(people, balls, strict=True))
    holds = dict(zip(people, balls, strict=True))
    for _ in range(source.randint(2, 3)):
        a, b = source.sample(people, 2)
        holds[a], holds[b] = holds[b], holds[a]
        text += f". {a} and {b} swap"
    asked = source.choice(people)
    wrong = [ball for ball in balls if ball != holds[asked]]
    return _shuffled(source, f"{text}. Which ball has {asked}?", [holds[asked], *wrong])


def logical_deduction(source: random.Random) -> Question:
    """Who is where in a row, from comparisons."""
    first, second, third = source.sample(PEOPLE, 3)
    facts = [f"{first} is older than {second}", f"{second} is older than {third}"]
    source.shuffle(facts)
    place = source.choice(("oldest", "youngest", "in the middle"))
    right = {"oldest": first, "in the middle": second, "youngest": third}[place]
    wrong = [person for person in (first, second, third) if person != right]
    return _shuffled(source, f"{'. '.join(facts)}. Who is {place}?", [right, *wrong])


def web_of_lies(source: random.Random) -> Question:
    """Whether the last of a chain of people, who speak of each other, tells the truth."""
    people = source.sample(PEOPLE, 4)
    honest = source.random() < 0.5
    text = f"{people[0]} {'tells the truth' if honest else 'lies'}."
    for before, person in itertools.pairwise(people):
        says_honest = source.random() < 0.5
        text += f" {person} says that {before} {'tells the truth' if says_honest else 'lies'}."
        honest = says_honest == honest
    return f"{text} Does {people[-1]} tell the truth?", YES_NO, 0 if honest else 1


def date_understanding(source: random.Random) -> Question:
    """A date some days or weeks away."""
    today = dt.date(2000, 1, 1) + dt.timedelta(days=source.randrange(10_000))
    text, days = source.choice((("tomorrow", 1), ("a week from today", 7), ("ten days ago", -10), ("yesterday", -1)))
    right = today + dt.timedelta(days=days)
    wrong = [right + dt.timedelta(days=shift) for shift in (1, 31, 365)]
    question = f"Today is {_date(today)}. What is the date {text}?"
    return _shuffled(source, question, [_date(each) for each in (right, *wrong)])


def _date(day: dt.date) -> str:
    return day.strftime("%m/%d/%Y")


def _shuffled(source: random.Random, question: str, choices: list[str]) -> Question:
    """Return a question whose choices, the first of which is right, are in random order."""
    order = source.sample(range(len(choices)), len(choices))
    return question, [choices[index] for index in order], order.index(0)


FAMILIES: dict[str, Callable[[random.Random], Question]] = {
    family.__name__: family
    for family in (
        *(boolean_expressions, closing_brackets, navigate, object_counting),
        *(shuffled_objects, logical_deduction, web_of_lies, date_understanding),
    )
}


def family_tasks(family: str, seed: int, num_tasks: int) -> Iterator[Task]:
    """Yield different held-out questions of a family, each after the same solved examples, which are not held out.

    Raises ValueError if the family is too small to have so many.
    """
    make = FAMILIES[family]
    shots: list[str] = []
    asked: set[str] = set()
    for index in range(5000 + 200 * num_tasks):
        if len(asked) == num_tasks:
            return
        question, choices, right = make(random.Random(derive_seed(seed, "bbh", family, index)))
        if not is_held_out(question):
            shots += [f"Q: {question}\nA: {choices[right]}\n\n"][: NUM_SHOTS - len(shots)]
        elif len(shots) == NUM_SHOTS and question not in asked:
            asked.add(question)
            context = f"{''.join(shots)}Q: {question}\nA:"
            yield choice_task(f"{family}/{len(asked)}", context, [f" {choice}" for choice in choices], right, family)
    raise ValueError(f"only {len(asked)} different held-out questions of {family} where {num_tasks} were asked for")
