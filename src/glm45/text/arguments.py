"""How the text between `<arg_value>` and `</arg_value>` becomes JSON: by the tool's schema.

A parameter that can be a string is taken as it stands. Any other value must be JSON and is passed on as written; a
Python literal (`True`, `None`, `{'a': 1}`) is turned into JSON; what is neither becomes a string. A parameter that no
schema describes is JSON where it is JSON and a string otherwise.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring  # C speed; keeps everything but quotes, backslashes and control characters
from typing import Any, Literal, NamedTuple

ValueKind = Literal["string", "nullable_string", "json", "unknown"]

MAX_REFERENCES = 16
"""References followed in a schema before it is taken for one that refers to itself."""


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


STRICT_JSON = json.JSONDecoder(parse_constant=_refuse, parse_int=str, parse_float=str)
"""Numbers stay text: however long, they are only checked."""


class Conversion(NamedTuple):
    """A value as JSON, and what was wrong with it."""

    json: str
    problem: str | None


def escape(text: str) -> str:
    """Return the inside of a JSON string. Escaping is by character: parts may be escaped apart and joined."""
    return encode_basestring(text)[1:-1]


def tool_parameters(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Mapping[str, Any]] | None:
    """Return the parameter schema of every tool by name, for tools in OpenAI's form or flat; None without tools.

    Raises ValueError, with its index, for one that is no function with a name.
    """
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)):
        raise ValueError(f"the tools are no list: {str(tools)[:80]}")
    return dict(_named_parameters(tool, index) for index, tool in enumerate(tools))


def _named_parameters(tool: Any, index: int) -> tuple[str, Mapping[str, Any]]:
    function = (tool.get("function") or tool) if isinstance(tool, Mapping) else None
    if isinstance(function, Mapping) and isinstance(function.get("name"), str):
        parameters = function.get("parameters") or {}
        if isinstance(parameters, Mapping):
            return function["name"], parameters
    raise ValueError(f"tool {index} is no function with a name and an object of parameters: {str(tool)[:80]}")


def value_kind(parameters: Mapping[str, Any], key: str) -> ValueKind:
    """Return how to read the values of a parameter: `type` (also lists), `anyOf`, `oneOf`, `allOf`, `enum`, `$ref`."""
    properties = parameters.get("properties")
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    types = _types(schema, parameters, MAX_REFERENCES) if isinstance(schema, Mapping) else set()
    if not types:
        return "unknown"
    if "string" not in types:
        return "json"
    return "nullable_string" if "null" in types else "string"


def convert(text: str, kind: ValueKind) -> Conversion:
    """Return a whole value of a parameter that cannot be a plain string as JSON, never raising."""
    stripped = text.strip()
    if is_json(stripped):
        return Conversion(stripped, None)
    if kind == "unknown":
        return Conversion(encode_basestring(text), None)
    literal = _python_literal(stripped)
    if literal is not None:
        return Conversion(literal, "a Python literal instead of JSON")
    return Conversion(encode_basestring(text), "not JSON, though the schema does not allow a string")


def is_json(text: str) -> bool:
    """Return whether text is JSON to the letter: no NaN, no Infinity."""
    try:
        STRICT_JSON.decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def _types(schema: Mapping[str, Any], root: Mapping[str, Any], references: int) -> set[str]:
    """Return the JSON types that a schema allows; empty where it does not say."""
    reference = schema.get("$ref")
    if isinstance(reference, str) and references:
        target = _resolve(reference, root)
        return _types(target, root, references - 1) if target is not None else set()
    declared = schema.get("type")
    if declared is not None:
        return {each for each in (declared if isinstance(declared, list) else [declared]) if isinstance(each, str)}
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(choices, list):
        types = {_type_of(choice) for choice in choices}
        return set() if "string" in types and types - {"string", "null"} else types  # mixed: 1 is a number, auto is not
    found: set[str] = set()
    for combination in ("anyOf", "oneOf", "allOf"):
        choices = schema.get(combination)
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, Mapping):
                found |= _types(choice, root, references)
    return found


def _resolve(reference: str, root: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what a local reference such as `#/$defs/Unit` names."""
    node: Any = root
    for part in reference.removeprefix("#/").split("/"):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node if isinstance(node, Mapping) else None


def _type_of(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", type(None): "null"}
    return names.get(type(value), "object")


def _python_literal(text: str) -> str | None:
    try:
        return json.dumps(ast.literal_eval(text), ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
