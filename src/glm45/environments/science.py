"""Multiple-choice science. The report trains only on questions that experts verified (section 3.2, Science RL)."""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from string import ascii_uppercase

from glm45.environments.protocol import Message, Reward, Task, assistant, final_answer, user
from glm45.seeds import derive_seed

# A letter alone or with a mark behind it; without one only a capital, and none that is a word ("I", as "a" is).
ALONE = r"\(?([A-Za-z])(?=[.):,;!]|\s*$)"
LETTER = rf"(?:{ALONE}|\(?([A-HJ-Z])(?![\w'’-]))"
CHOICES = (
    re.compile(rf"\b(?i:answer)\b(?:[^.:;\n]{{0,40}}?\b(?i:is)\b\s*:?|\s*:)\s*(?i:option\s+)?{LETTER}"),
    re.compile(rf"\b(?i:answer)\s+{ALONE}"),
    re.compile(rf"\A{ALONE}"),  # "B", "(b)", "B. because"; "I do not know" is no choice
    re.compile(rf"\b(?i:option|choice)\s+{LETTER}"),
    re.compile(r"\b(?i:so|thus|hence|therefore),?\s+\(?([A-Z])\)?[.!]?\s*\Z"),
)
"""Ways to state a choice, the surest first."""
MARKUP = re.compile(r"[*_`$}]|\\\w+\{")
"""Emphasis and LaTeX's braces, such as `**B**` and `\\boxed{B}`."""


def science_task(
    task_id: str, question: str, choices: Sequence[str], answer_index: int, expert_verified: bool, seed: int = 0
) -> Task:
    """Return a question whose choices are shuffled by `seed` and the task id, so that no position is worth learning.

    Raises ValueError if the answer is not one of the choices.
    """
    if not 0 <= answer_index < len(choices) <= len(ascii_uppercase):
        raise ValueError(f"task {task_id!r}: answer_index = {answer_index} with {len(choices)} choices")
    order = list(range(len(choices)))
    random.Random(derive_seed(seed, "choices", task_id)).shuffle(order)
    lines = [f"{ascii_uppercase[place]}. {choices[index]}" for place, index in enumerate(order)]
    return Task(
        task_id=task_id,
        verifier="science",
        messages=[user("\n".join([question, *lines, "Answer with one letter."]))],
        answer=ascii_uppercase[order.index(answer_index)],
        metadata={"expert_verified": expert_verified, "num_choices": len(choices)},
    )


def expert_verified_only(tasks: Iterable[Task]) -> Iterator[Task]:
    """Keep the tasks that say that an expert verified them; a task that does not say is left out."""
    return (task for task in tasks if task.metadata.get("expert_verified") is True)


def chosen_letter(text: str) -> str | None:
    """Return the letter that an answer chooses, the last one where it states several, or None if it names none."""
    plain = MARKUP.sub("", text).strip()
    for choice in CHOICES:
        if stated := list(choice.finditer(plain)):
            return stated[-1][stated[-1].lastindex or 1].upper()
    return None


class ScienceVerifier:
    """1 when the chosen letter is the reference; an answer without a letter is wrong, never a random guess."""

    def score(self, task: Task, response: Message) -> Reward:
        """Compare letters."""
        letter = chosen_letter(final_answer(response))
        correct = float(letter == task.answer)
        return Reward(correct, {"correct": correct, "readable": float(letter is not None)})

    def examples(self) -> Iterator[tuple[Task, Message, Message]]:
        """Yield one question, answered in several forms."""
        task = science_task("water", "What is water?", ["H2O", "CO2", "NaCl", "O2"], 0, expert_verified=True)
        wrong = next(letter for letter in "ABCD" if letter != task.answer)
        for form in ("{}", "({})", "{}.", "Answer: {}", "It boils, so the answer is {}."):
            yield task, assistant(form.format(task.answer)), assistant(form.format(wrong))
