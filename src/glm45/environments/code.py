"""Programming tasks judged by unit tests, run in the sandbox.

What the program should give never enters the sandbox: inputs go in, outputs come out and are compared outside, so a
program cannot pass by reading the tests, by leaving early or by lying about equality.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from glm45.environments.protocol import Message, Reward, Task, assistant, user
from glm45.environments.sandbox import SandboxLimits, run_python
from glm45.environments.tools import same_value

FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)

# Calls the function once per line of arguments and writes one JSON line of result each, to what was standard output
# before the solution could print to it.
DRIVER = """
import importlib, json, os, sys
results = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(sys.path[0], "cases.json")) as source:
    cases = json.load(source)
function = getattr(importlib.import_module("solution"), cases["function"])
for arguments in cases["arguments"]:
    try:
        line = json.dumps({"value": function(*arguments)})
    except Exception as error:
        line = json.dumps({"error": f"{type(error).__name__}: {error}"})
    results.write(line + "\\n")
    results.flush()
"""


def function_task(task_id: str, question: str, function: str, cases: list[tuple[list[Any], Any]]) -> Task:
    """Return a task to write `function`; each case is (arguments, expected value), both JSON."""
    expected = [json.loads(json.dumps(value)) for _, value in cases]
    return Task(
        task_id=task_id,
        verifier="code",
        messages=[user(question)],
        answer=expected,
        metadata={"function": function, "arguments": [arguments for arguments, _ in cases]},
    )


def program_task(task_id: str, question: str, cases: list[tuple[str, str]]) -> Task:
    """Return a task to write a program; each case is (standard input, expected standard output)."""
    return Task(
        task_id=task_id,
        verifier="code",
        messages=[user(question)],
        answer=[stdout for _, stdout in cases],
        metadata={"stdin": [stdin for stdin, _ in cases]},
    )


def extract_program(response: Message) -> str:
    """Return the last fenced block of the content, or all of it if nothing is fenced."""
    content = response.get("content") or ""
    blocks = FENCED.findall(content)
    return blocks[-1] if blocks else content


class CodeVerifier:
    """1 when every test passes; `passed_share` says how many did, `ended_well` whether no limit was met."""

    def __init__(self, limits: SandboxLimits | None = None):
        self._limits = limits or SandboxLimits()

    def score(self, task: Task, response: Message) -> Reward:
        """Run the tests. Raises SandboxUnavailableError where there is no sandbox."""
        program = extract_program(response)
        if "function" in task.metadata:
            passed, ended_well = self._call_function(task, program)
        else:
            passed, ended_well = self._run_program(task, program)
        correct = float(all(passed))
        parts = {"correct": correct, "passed_share": sum(passed) / len(passed), "ended_well": float(ended_well)}
        return Reward(correct, parts)

    def _call_function(self, task: Task, program: str) -> tuple[list[bool], bool]:
        cases = {"function": task.metadata["function"], "arguments": task.metadata["arguments"]}
        result = run_python(
            DRIVER, limits=self._limits, files={"solution.py": program, "cases.json": json.dumps(cases)}
        )
        lines = result.stdout.splitlines()
        lines += [""] * (len(task.answer) - len(lines))
        passed = [_equals(line, expected) for line, expected in zip(lines, task.answer, strict=False)]
        return passed, result.status == "ok"

    def _run_program(self, task: Task, program: str) -> tuple[list[bool], bool]:
        """All tests share the time: an endless program is wrong before whoever waits for the verdict gives up."""
        passed, ended_well, left_s = [], True, self._limits.wall_s
        for stdin, expected in zip(task.metadata["stdin"], task.answer, strict=True):
            if left_s <= 0:
                passed.append(False)
                continue
            result = run_python(program, stdin, replace(self._limits, wall_s=left_s))
            passed.append(result.status == "ok" and _trimmed(result.stdout) == _trimmed(expected))
            ended_well = ended_well and result.status == "ok"
            left_s -= result.wall_s
        return passed, ended_well

    def examples(self) -> Iterator[tuple[Task, Message, Message]]:
        """Yield a function and a program."""
        double = function_task("double", "Write double(x).", "double", [([2], 4), ([-1], -2)])
        yield (
            double,
            assistant("```python\ndef double(x):\n    return 2 * x\n```"),
            assistant("```python\ndef double(x):\n    return x * x\n```"),
        )
        echo = program_task("echo", "Print the input in capitals.", [("a\n", "A\n"), ("b c\n", "B C\n")])
        yield echo, assistant("```python\nprint(input().upper())\n```"), assistant("```python\nprint('A')\n```")


def _equals(line: str, expected: Any) -> bool:
    try:
        result = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(result, dict) and "value" in result and same_value(result["value"], expected)


def _trimmed(text: str) -> list[str]:
    """Lines without trailing spaces, and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
