"""Instructions whose constraints plain rules can check: the laptop's general domain.

The report's instruction-following RL adds a reward model and a critique to such rules (section 3.4); those need a
judge and are not here.
"""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from glm45.environments.protocol import Message, Reward, Task, assistant, user
from glm45.environments.tools import CITIES
from glm45.seeds import derive_seed

WORDS = (
    *("river", "stone", "apple", "cloud", "tiger", "paper", "green", "music", "bread", "light", "horse", "ocean"),
    *CITIES,
)


def _is_json(text: str, _: Any) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


CONSTRAINTS: dict[str, Callable[[str, Any], bool]] = {
    "equals": lambda text, value: text == value,
    "num_words": lambda text, value: len(text.split()) == value,
    "max_words": lambda text, value: len(text.split()) <= value,
    "min_words": lambda text, value: len(text.split()) >= value,
    "starts_with": lambda text, value: text.startswith(value),
    "ends_with": lambda text, value: text.endswith(value),
    "contains": lambda text, value: value in text,
    "excludes": lambda text, value: value not in text,
    "upper_case": lambda text, _: text.upper() == text and text.lower() != text,
    "lower_case": lambda text, _: text.lower() == text and text.upper() != text,
    "num_lines": lambda text, value: len(text.splitlines()) == value,
    "json": _is_json,
}
"""Rules by name: (stripped content, value of the constraint) -> whether it holds."""


def instruction_task(text: str, constraints: dict[str, Any], thinking: bool = False) -> Task:
    """Return an instruction with its checkable constraints (name to value). Raises ValueError for an unknown rule."""
    if not constraints or (unknown := set(constraints) - set(CONSTRAINTS)):
        raise ValueError(f"instruction {text!r}: constraints {sorted(unknown) if constraints else 'missing'}")
    return Task(
        task_id=f"instructions/{text}",
        verifier="instructions",
        messages=[user(text)],
        answer=None,
        thinking=thinking,
        metadata={"constraints": constraints},
    )


def instruction_tasks(seed: int, count: int) -> Iterator[Task]:
    """Yield short instructions about words; direct answers, no thinking. Not in the report."""
    for index in range(count):
        source = random.Random(derive_seed(seed, "instructions", index))
        word, other, third = source.sample(WORDS, 3)
        times, number, another = source.randint(2, 4), source.randint(10, 99), source.randint(1, 99)
        text, constraints = source.choice(
            (
                (f"Say {word} {times} times.", {"equals": " ".join([word] * times)}),
                (f"Say {word} in capitals.", {"equals": word.upper()}),
                (f"Say {word}, then {other}.", {"equals": f"{word} {other}"}),
                (f"Say {word} and {number}.", {"equals": f"{word} {number}"}),
                (f"Say {number}, then {word}.", {"equals": f"{number} {word}"}),
                (f"Say {number} and {another}.", {"equals": f"{number} {another}"}),
                (f"Say {word}, {other} and {third}.", {"equals": f"{word} {other} {third}"}),
                (f"Spell {word}.", {"equals": " ".join(word)}),
                (f"Say {times} words. Begin with {word}.", {"num_words": times, "starts_with": word}),
                (f"Say {times} words. End with {word}.", {"num_words": times, "ends_with": word}),
            )
        )
        yield instruction_task(text, constraints)


def reference_reply(task: Task) -> str:
    """Return a reply to a generated instruction that keeps every constraint; for cold-start data."""
    constraints = task.metadata["constraints"]
    if "equals" in constraints:
        return constraints["equals"]
    first, last = constraints.get("starts_with"), constraints.get("ends_with")
    filler = [word for word in WORDS if word not in (first, last)][: constraints["num_words"] - 1]
    return " ".join([first, *filler] if first else [*filler, last])


class InstructionVerifier:
    """1 when every constraint holds; each is a part of its own."""

    def score(self, task: Task, response: Message) -> Reward:
        """Check every rule on the stripped content."""
        text = (response.get("content") or "").strip()
        checks = task.metadata["constraints"].items()
        parts = {name: float(CONSTRAINTS[name](text, value)) for name, value in checks}
        return Reward(float(all(parts.values())), parts)

    def examples(self) -> Iterator[tuple[Task, Message, Message]]:
        """Yield generated instructions and one of each rule."""
        for task in instruction_tasks(0, 12):
            yield task, assistant(reference_reply(task)), assistant("I would rather not say anything about it.")
        for constraint, value, good, bad in (
            ("max_words", 2, "a b", "a b c"),
            ("min_words", 2, "a b", "a"),
            ("contains", "ab", "cabd", "ba"),
            ("excludes", "ab", "ba", "cab"),
            ("upper_case", True, "NO.", "No."),
            ("lower_case", True, "no.", "No."),
            ("num_lines", 2, "a\nb", "a b"),
            ("json", True, '{"a": 1}', "{a: 1}"),
        ):
            yield instruction_task(constraint, {constraint: value}), assistant(good), assistant(bad)
