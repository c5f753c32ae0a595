"""Needle in a haystack: one fact somewhere in a long text, and a question about it."""

import random
from collections.abc import Iterator

from glm45.environments.mathematics import mathematics_task
from glm45.environments.protocol import Task
from glm45.seeds import derive_seed

NAMES = ("Ada", "Ben", "Cleo", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivo", "Jill")
PLACES = ("harbour", "garden", "market", "library", "station", "kitchen", "workshop", "meadow")
DEEDS = ("walked to the", "rested near the", "painted the", "left the", "talked about the", "dreamt of the")
SAMPLE = " ".join(f"{name} {deed} {place}." for name in NAMES for deed in DEEDS for place in PLACES)
"""Text of the kind that needles are hidden in."""


def needle_tasks(seed: int, count: int, characters: int) -> Iterator[Task]:
    """Yield texts of about `characters` characters with a number hidden at depths spread evenly from start to end."""
    for index in range(count):
        source = random.Random(derive_seed(seed, "needle", index, characters))
        keeper, number = source.choice(NAMES), source.randint(1000, 9999)
        lines: list[str] = []
        written = 0
        while written < characters:
            lines.append(f"{source.choice(NAMES)} {source.choice(DEEDS)} {source.choice(PLACES)}.")
            written += len(lines[-1]) + 1
        depth = (index + 0.5) / count
        lines.insert(round(depth * len(lines)), f"The number that {keeper} keeps is {number}.")
        question = " ".join(lines) + f"\nWhich number does {keeper} keep? Answer with the number."
        metadata = {"depth": depth, "family": f"{characters:,} characters"}
        yield mathematics_task(f"needle/{characters}/{index}/{keeper}-{number}", question, str(number), metadata)
