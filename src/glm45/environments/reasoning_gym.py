"""Any family of `reasoning-gym` as tasks, with its own scorer.

A task carries the recipe of its entry (family, options, seed, index), not the entry: entries hold Python objects that
do not survive JSON, and the library makes the same one again from the recipe.
"""

import json
from collections.abc import Iterator
from dataclasses import fields
from functools import cache, lru_cache
from typing import Any

from glm45.environments.protocol import Message, Reward, Task, assistant, final_answer, user

SHORT_PROMPTS = {
    "basic_arithmetic": "{expression}=?",
    "chain_sum": "{expression}=?",
    "count_bits": "ones in binary {number}?",
    "fraction_simplification": "simplify {numerator}/{denominator}",
    "gcd": "gcd {numbers}?",
    "lcm": "lcm {numbers}?",
    "prime_factorization": "factors of {number} with ×?",
    "products": "{expression}=?",
    "simple_equations": "{variable}? {equation}",
    "spell_backward": "reverse {word}",
}
"""Prompts for models too small for the library's sentences, as formats over an entry's metadata."""


def family_names() -> list[str]:
    """Return the name of every family of the library; its `composite`, a mixture of families, is none."""
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - {"composite"})


def level_options(family: str, level: int) -> dict[str, Any]:
    """Return a family's options at a level of the library's own curriculum: its knob of difficulty.

    Raises ValueError if the family has no curriculum or not so many levels.
    """
    from reasoning_gym.factory import create_curriculum, has_curriculum

    if not has_curriculum(family):
        raise ValueError(f"family {family!r} has no curriculum: give its options by name instead of a level")
    curriculum = create_curriculum(family)
    highest = max(len(attribute.levels) for attribute in curriculum.attributes.values()) - 1
    if not 0 <= level <= highest:
        raise ValueError(f"family {family!r}: level {level} is not between 0 and {highest}")
    curriculum.set_global_level(level)
    made = curriculum.generate_configuration()
    return {item.name: getattr(made, item.name) for item in fields(made) if item.name not in ("seed", "size")}


def reasoning_gym_tasks(
    family: str,
    seed: int,
    count: int,
    level: int | None = None,
    options: dict[str, Any] | None = None,
    short_prompt: bool = False,
) -> Iterator[Task]:
    """Yield `count` entries of a family, at a level of its curriculum or with options (JSON values) of its own.

    Raises ValueError for an unknown family, a level or options that it refuses, and a short prompt that is not in
    SHORT_PROMPTS.
    """
    if family not in family_names():
        raise ValueError(f"reasoning-gym has no family {family!r}; see family_names()")
    if short_prompt and family not in SHORT_PROMPTS:
        raise ValueError(f"no short prompt for {family!r}: there is one for {', '.join(SHORT_PROMPTS)}")
    for index in range(count):
        recipe = {"family": family, "level": level, "options": options or {}, "seed": seed, "size": count}
        entry = _dataset(json.dumps(recipe))[index]
        question = SHORT_PROMPTS[family].format(**entry["metadata"]) if short_prompt else entry["question"]
        yield Task(
            task_id="/".join(map(str, ("reasoning_gym", *recipe.values(), index))),
            verifier="reasoning_gym",
            messages=[user(question)],
            answer=entry["answer"] if isinstance(entry["answer"], str) else None,
            metadata={"recipe": recipe, "index": index},
        )


class ReasoningGymVerifier:
    """The family's own score, between 0 and 1; some families give part of a point for a near miss."""

    def score(self, task: Task, response: Message) -> Reward:
        """Make the entry again and let its family score the final answer.

        A few scorers raise on answers of a strange form (`prime_factorization` on words): that is a Failure too. Raises
        ValueError for a family whose scorer refuses its own answers.
        """
        _prove_family(task.metadata["recipe"]["family"])
        dataset = _dataset(json.dumps(task.metadata["recipe"]))
        entry = dataset[task.metadata["index"]]
        value = float(dataset.score_answer(final_answer(response), entry))
        return Reward(value, {"correct": float(value == 1.0)})

    def examples(self) -> Iterator[tuple[Task, Message, Message]]:
        """Yield two families; any other proves itself at its first answer."""
        for family in ("chain_sum", "spell_backward"):
            for task in reasoning_gym_tasks(family, seed=1, count=2):
                yield task, assistant(task.answer), assistant("?")


@cache
def _prove_family(family: str) -> None:
    """Raise ValueError if a family's own answer does not score 1, as those of some families do not, or nothing does."""
    dataset = _dataset(json.dumps({"family": family, "level": None, "options": {}, "seed": 1, "size": 1}))
    entry = dataset[0]
    if isinstance(entry["answer"], str) and (score := dataset.score_answer(entry["answer"], entry)) != 1.0:
        raise ValueError(f"family {family!r} gives its own answer {entry['answer']!r} {score}: leave it out")


@lru_cache(maxsize=64)
def _dataset(recipe: str) -> Any:
    import reasoning_gym

    parts = json.loads(recipe)
    options = level_options(parts["family"], parts["level"]) if parts["level"] is not None else {}
    try:
        return reasoning_gym.create_dataset(
            parts["family"], seed=parts["seed"], size=parts["size"], **{**options, **parts["options"]}
        )
    except (AssertionError, TypeError) as error:  # some curricula have levels that their own family refuses
        level, chosen = parts["level"], parts["options"]
        raise ValueError(f"{parts['family']} refuses level {level} with options {chosen}: {error}") from None
