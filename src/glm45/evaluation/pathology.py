"""What can be wrong with answers whatever the question: form, repetition, mixed languages."""

import dataclasses
from collections.abc import Iterable, Iterator

from glm45.environments.formats import format_faults, language_mixing_rate, repetition_rate
from glm45.environments.protocol import Message, Reward, Task, assistant, user

VERIFIER = "glm45.evaluation.pathology:PathologyVerifier"

MOST_REPETITION = 0.2
"""Largest share of four-grams that occurred before. Not in the report."""
MOST_MIXING = 0.05
"""Largest share of letters of another script. Not in the report."""


def without_pathology(tasks: Iterable[Task]) -> Iterator[Task]:
    """Ask the same questions and judge the form of the answers only."""
    for task in tasks:
        mode = "thinking" if task.thinking else "direct"  # both ask the same arithmetic
        yield dataclasses.replace(task, verifier=VERIFIER, answer=None, task_id=f"pathology/{mode}/{task.task_id}")


class PathologyVerifier:
    """1 for an answer without any of the faults, whatever it says."""

    def score(self, task: Task, response: Message) -> Reward:
        """Look at reasoning and content together; the parts are 1 where all is well."""
        text = f"{response.get('reasoning_content') or ''}\n{response.get('content') or ''}"
        parts = {
            "format": float(not format_faults(response, task.thinking)),
            "no_repetition": float(repetition_rate(text) <= MOST_REPETITION),
            "one_language": float(language_mixing_rate(text) <= MOST_MIXING),
        }
        return Reward(float(all(parts.values())), parts)

    def examples(self) -> Iterator[tuple[Task, Message, Message]]:
        """Yield a direct question."""
        task = Task(task_id="p", verifier=VERIFIER, messages=[user("Say hello.")], answer=None, thinking=False)
        yield task, assistant("Hello there, how are you?"), assistant("go on and on " * 30)
