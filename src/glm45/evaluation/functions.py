"""Function calls judged as the Berkeley Function-Calling Leaderboard judges its AST categories.

A reference gives each parameter a list of accepted values, where "" means that it may be left out. Strings are
compared without case, spaces and some punctuation. Our own implementation; docs/log.md tells how it was compared.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glm45.environments.protocol import Message, Reward, Task, assistant, user
from glm45.environments.tools import read_calls, tool_call

TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "number": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "object": dict,
    "any": str,
}
IGNORED = re.compile(r"[ ,./\-_*^]")
OPTIONAL = ""


def function_name(name: str) -> str:
    """Return a name that OpenAI-style tools may have: their names hold no dots."""
    return name.replace(".", "_")


def calls_match(calls: Sequence[Mapping[str, Any]], task: Task) -> bool:
    """Say whether calls (`name`, `arguments`) are the reference's, in any order; a reference without calls wants none.

    Each reference call, in order, takes the first call left that fits.
    """
    references: list[dict[str, dict[str, list[Any]]]] = task.answer or []
    if len(calls) != len(references):
        return False
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in task.tools}
    left = list(calls)
    for reference in references:
        ((name, accepted),) = reference.items()
        fitting = next((call for call in left if _fits(call, function_name(name), accepted, schemas)), None)
        if fitting is None:
            return False
        left.remove(fitting)
    return True


def _fits(
    call: Mapping[str, Any], name: str, accepted: Mapping[str, list[Any]], schemas: Mapping[str, dict[str, Any]]
) -> bool:
    schema = schemas.get(name)
    if call["name"] != name or schema is None:
        return False
    arguments, properties = call["arguments"], schema.get("properties", {})
    if any(parameter not in arguments for parameter in schema.get("required", [])):
        return False
    for parameter, value in arguments.items():
        if parameter not in properties or parameter not in accepted:
            return False
        if not _accepts(value, accepted[parameter], properties[parameter]):
            return False
    return all(parameter in arguments or OPTIONAL in accepted[parameter] for parameter in accepted)


def _accepts(value: Any, accepted: Sequence[Any], schema: Mapping[str, Any]) -> bool:
    """Say whether a value of a parameter is one of the accepted ones."""
    kind: Any = TYPES.get(schema.get("type", "any"), str)
    if kind is float and type(value) is int:
        value = float(value)
    inner = TYPES.get(schema.get("items", {}).get("type", "any"), str) if kind is list else None
    accepted_type = _type_of_first(accepted)
    if type(value) is not kind or (inner is not None and not _elements_fit(value, accepted, inner)):
        # A reference may name a variable where the schema wants a value: then its own type counts.
        return type(value) is accepted_type and value in accepted
    if accepted_type is not None and accepted_type is not kind:
        return value in accepted
    if kind is dict:
        return any(_dictionary_fits(value, each) for each in accepted if isinstance(each, Mapping))
    if inner is dict:
        return any(_dictionaries_fit(value, each) for each in accepted if isinstance(each, list))
    return _plain(value) in [_plain(each) for each in accepted]


def _elements_fit(values: Sequence[Any], accepted: Sequence[Any], inner: type) -> bool:
    """Say whether every element has the schema's type, or that of an accepted list's elements."""
    lists = [each for each in accepted if isinstance(each, list)]
    if len(lists) < len(accepted):  # leaving it out is accepted too, so its elements say nothing
        return True
    return any(all(type(v) is inner or type(v) is _type_of_first(each) for v in values) for each in lists)


def _type_of_first(accepted: Sequence[Any]) -> type | None:
    return next((type(each) for each in accepted if each != OPTIONAL), None)


def _dictionary_fits(value: Mapping[str, Any], accepted: Mapping[str, list[Any]]) -> bool:
    known = all(key in accepted and _plain(v) in [_plain(a) for a in accepted[key]] for key, v in value.items())
    return known and all(key in value or OPTIONAL in options for key, options in accepted.items())


def _dictionaries_fit(values: Sequence[Any], accepted: Sequence[Any]) -> bool:
    return len(values) == len(accepted) and all(
        isinstance(v, Mapping) and isinstance(a, Mapping) and _dictionary_fits(v, a)
        for v, a in zip(values, accepted, strict=True)
    )


def _plain(value: Any) -> Any:
    """Return a string without what is not compared, a list with its strings so; anything else as it is."""
    if isinstance(value, str):
        return IGNORED.sub("", value).lower().replace("'", '"')
    if isinstance(value, list):
        return [_plain(each) if isinstance(each, str) else each for each in value]
    return value


class FunctionVerifier:
    """1 when the calls are the reference's in any order, and where there is none, when nothing is called."""

    def score(self, task: Task, response: Message) -> Reward:
        """Compare the calls."""
        calls = read_calls(response)
        correct = float(calls is not None and calls_match(calls, task))
        return Reward(correct, {"correct": correct, "format": float(calls is not None)})

    def examples(self) -> Iterator[tuple[Task, Message, Message]]:
        """Yield a call with a spelling that counts as equal, and a question that needs none."""
        schema = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
        tool = {"type": "function", "function": {"name": "forecast", "parameters": {**schema, "required": ["city"]}}}
        reference = [{"forecast": {"city": ["New York", "NYC"], "days": ["", 3]}}]
        task = Task(
            task_id="forecast",
            verifier="functions",
            messages=[user("Rain in New York?")],
            answer=reference,
            tools=[tool],
        )
        right = assistant("", tool_calls=[tool_call("forecast", {"city": "new-york", "days": 3})])
        yield task, right, assistant("", tool_calls=[tool_call("forecast", {"city": "Boston"})])
        nothing = Task(task_id="hello", verifier="functions", messages=[user("Hi")], answer=[], tools=[tool])
        yield nothing, assistant("Hello."), right
