"""Arithmetic with written-out steps as tasks: the laptop's reasoning domain (see `glm45.corpus.arithmetic`)."""

import random
from collections.abc import Iterator

from glm45.corpus.arithmetic import ArithmeticConfig, Problem, draw_problem, write_trace
from glm45.environments.protocol import Message, Reward, Task, assistant, final_answer, user
from glm45.seeds import derive_seed


def arithmetic_task(problem: Problem, thinking: bool = True) -> Task:
    """Return a problem as a task."""
    return Task(
        task_id=f"arithmetic/{problem.prompt}",
        verifier="arithmetic",
        messages=[user(problem.prompt)],
        answer=problem.answer,
        thinking=thinking,
        metadata={
            "operation": problem.operation,
            "left": problem.left,
            "right": problem.right,
            "num_digits": problem.num_digits,
            "question": problem.question,
        },
    )


def arithmetic_tasks(seed: int, count: int, config: ArithmeticConfig | None = None) -> Iterator[Task]:
    """Yield `count` tasks with different prompts. Raises ValueError if the family has fewer."""
    config = config or ArithmeticConfig()
    seen: set[str] = set()
    source = random.Random(derive_seed(seed, "arithmetic tasks"))
    misses = 0
    while len(seen) < count:
        problem = draw_problem(source, config)
        misses = misses + 1 if problem.prompt in seen else 0
        if misses > 1000:
            raise ValueError(f"{count} different tasks asked for, but {config} seems to have only {len(seen)}")
        if not misses:
            seen.add(problem.prompt)
            yield arithmetic_task(problem)


def is_careful(task: Task, response: Message) -> bool:
    """Whether the written steps are the careful ones: they begin with the careful trace's first column.

    A one-column problem, or one whose outer columns are equal, reads the same both ways and counts as careful.
    """
    problem = Problem(**{name: task.metadata[name] for name in ("operation", "left", "right")})
    first_column = write_trace(problem, careful=True).steps.split(" ")[0]
    return (response.get("reasoning_content") or "").strip().startswith(first_column)


class ArithmeticVerifier:
    """1 when the content is the answer's digits and nothing else."""

    def score(self, task: Task, response: Message) -> Reward:
        """Compare the final answer with the true one; `careful` reports the kind of trace and is not rewarded."""
        correct = float(final_answer(response) == task.answer)
        return Reward(correct, {"correct": correct, "careful": float(is_careful(task, response))})

    def examples(self) -> Iterator[tuple[Task, Message, Message]]:
        """Yield a worked sum, difference and product."""
        for problem in (Problem("add", 47, 85), Problem("subtract", 42, 17), Problem("multiply", 47, 6)):
            careful, sloppy = (write_trace(problem, careful=careful) for careful in (True, False))
            yield (
                arithmetic_task(problem),
                assistant(careful.answer, careful.steps),
                assistant(sloppy.answer, sloppy.steps),
            )
