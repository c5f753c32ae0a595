"""Mathematics with a known answer, compared by `math-verify`: 1/2, 0.5 and \\frac{1}{2} are one number."""

import logging
import re
from collections.abc import Iterator
from typing import Any

from glm45.environments.protocol import Message, Reward, Task, assistant, final_answer, user

WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
"""A word that is no LaTeX command: text without one is mathematics from end to end."""


def mathematics_task(task_id: str, question: str, answer: str, metadata: dict[str, Any] | None = None) -> Task:
    """Return a question whose `answer` is LaTeX or plain text, without dollar signs."""
    return Task(
        task_id=task_id,
        verifier="mathematics",
        messages=[user(question)],
        answer=answer,
        metadata=metadata or {},
    )


class MathematicsVerifier:
    """1 when the final answer equals the reference as mathematics.

    The library's own timers use `signal.alarm`, which raises outside the main thread and has made other systems score
    0 without a word: they are off, and the process that this runs in is killed instead.
    """

    def score(self, task: Task, response: Message) -> Reward:
        """Compare. Raises ValueError if the reference itself cannot be read: that is nobody's wrong answer."""
        from math_verify import parse, verify

        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timers are off
        reference = parse(f"${task.answer}$", parsing_timeout=None)
        if not reference:
            raise ValueError(f"task {task.task_id!r}: the reference {task.answer!r} cannot be read as mathematics")
        text = final_answer(response)
        # In text without dollar signs the library looks for a last number alone: of "(1, 2)" it finds the 2.
        spelt = f"${text}$" if "$" not in text and not WORD.search(text) else text
        given = parse(spelt, parsing_timeout=None) or parse(f"${text}$", parsing_timeout=None)
        correct = float(bool(given) and verify(reference, given, timeout_seconds=None))
        return Reward(correct, {"correct": correct, "readable": float(bool(given))})

    def examples(self) -> Iterator[tuple[Task, Message, Message]]:
        """Yield a fraction in three spellings, a root and a set."""
        half = mathematics_task("half", "What is 3/6?", r"\frac{1}{2}")
        for gold in ("0.5", "$1/2$", r"so it is $\boxed{\frac{1}{2}}$"):
            yield half, assistant(gold), assistant("$2$")
        root = mathematics_task("root", "Simplify sqrt(8).", r"2\sqrt{2}")
        yield root, assistant(r"$\sqrt{8}$"), assistant(r"$\sqrt{6}$")
        pair = mathematics_task("pair", "Solve x^2 = 4.", r"\{-2, 2\}")
        yield pair, assistant(r"$\{2, -2\}$"), assistant(r"$\{2\}$")
        point = mathematics_task("point", "Where do they meet?", "(1, 2)")
        yield point, assistant("(1, 2)"), assistant("(2, 1)")
        two = mathematics_task("two", "What is 1 + 1?", "2")
        yield two, assistant("The answer is 2."), assistant("0, 1, 2")
