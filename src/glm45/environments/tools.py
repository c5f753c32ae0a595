"""Function calling, one step at a time, judged by exact match (report section 3.4, step-wise rule-based RL).

Reward = 1 if the format is correct and the calls match the annotated ones: same names, same parameters, every field
equal; 0 otherwise. The right step may also be to call nothing and reply.
"""

import json
import random
from collections.abc import Iterator
from typing import Any

from glm45.environments.protocol import Message, Reward, Task, assistant, user
from glm45.seeds import derive_seed

CITIES = ("Rome", "Oslo", "Lima", "Cairo", "Paris", "Delhi", "Tokyo", "Quito", "Seoul", "Milan", "Perth", "Dubai")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def function(name: str, **parameters: str) -> dict[str, Any]:
    """Return an OpenAI-style schema of a function whose parameters (name to JSON type) are all required."""
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


CHORES = (
    *("call Ann", "buy milk", "feed the cat", "pay rent", "water plants", "fix the bike", "read", "rest"),
    *("cook", "bake bread", "take a walk", "mow the lawn"),
)

WEATHER = function("weather", city="string", day="string")
REMIND = function("remind", what="string", hour="integer")
ADD = function("add", a="integer", b="integer")


def tool_call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return an OpenAI-style call."""
    return {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def tool_tasks(seed: int, count: int) -> Iterator[Task]:
    """Yield requests that need one call, two calls or none, each with one or two of three small tools offered.

    The schemas are most of a prompt's tokens, hence not all three. Requests for the same calls are one question: what
    is held out is held out in all wordings. Not in the report.
    """
    for index in range(count):
        source = random.Random(derive_seed(seed, "tool tasks", index))
        text, calls = _draw_request(source)
        answer = [{"name": name, "arguments": arguments} for name, arguments in calls]
        asked = sorted(json.dumps(call, sort_keys=True) for call in answer)
        yield Task(
            task_id=f"tools/{text}",
            verifier="tools",
            messages=[user(text)],
            answer=answer,
            tools=_offer(source, {name for name, _ in calls}),
            thinking=False,
            metadata={"question": " ".join(asked) or text},
        )


def _draw_request(source: random.Random) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    city, other = source.sample(CITIES, 2)
    day, hour, chore = source.choice(DAYS), source.randint(1, 12), source.choice(CHORES)
    weekend, a, b = source.choice(DAYS[4:]), source.randint(1, 99), source.randint(1, 9)
    return source.choice(
        (
            (f"How is the weather in {city} on {day}?", [("weather", {"city": city, "day": day})]),
            (f"Remind me to {chore} at {hour}.", [("remind", {"what": chore, "hour": hour})]),
            (f"What is {a} plus {b}?", [("add", {"a": a, "b": b})]),
            (f"How much is {a} plus {b}?", [("add", {"a": a, "b": b})]),
            (
                f"Weather in {city} and {other} on {weekend}?",
                [("weather", {"city": each, "day": weekend}) for each in (city, other)],
            ),
            (f"Thanks, {city} was lovely on {day}.", []),
        )
    )


def _offer(source: random.Random, needed: set[str]) -> list[dict[str, Any]]:
    """Draw one or two tools, the needed one among them, in random order."""
    tools = {tool["function"]["name"]: tool for tool in (WEATHER, REMIND, ADD)}
    others = sorted(set(tools) - needed)
    offered = [*needed, *source.sample(others, source.randint(0 if needed else 1, 2 - len(needed)))]
    source.shuffle(offered)
    return [tools[name] for name in offered]


def read_calls(response: Message) -> list[dict[str, Any]] | None:
    """Return a response's calls as {"name", "arguments"}, or None if its format is not correct."""
    if response.get("faults"):
        return None
    calls = []
    for call in response.get("tool_calls") or []:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError:
                return None
        if not isinstance(arguments, dict):
            return None
        calls.append({"name": name, "arguments": arguments})
    return calls


def same_value(left: Any, right: Any) -> bool:
    """Equality of JSON values with types: 1 is 1.0, but neither is true or "1"."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_value(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_value, left, right))
    return left == right


class ToolCallVerifier:
    """1 when every call matches in order, and where none is called for, when the model replies in words."""

    def score(self, task: Task, response: Message) -> Reward:
        """Compare the calls with the annotated ones."""
        calls = read_calls(response)
        matches = calls is not None and same_value(calls, task.answer)
        if not task.answer:
            matches = matches and bool((response.get("content") or "").strip())
        return Reward(float(matches), {"correct": float(matches), "format": float(calls is not None)})

    def examples(self) -> Iterator[tuple[Task, Message, Message]]:
        """Yield a call, two calls and a reply."""
        for task in tool_tasks(0, 20):
            calls = [tool_call(call["name"], call["arguments"]) for call in task.answer]
            stranger = [*calls, tool_call("weather", {"city": "Atlantis"})]
            yield (
                task,
                assistant("" if calls else "You are welcome.", tool_calls=calls),
                assistant("", tool_calls=stranger),
            )
