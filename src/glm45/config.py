"""Typed configuration: frozen dataclasses, to and from JSON, with dotted overrides from the command line.

Every configuration of the project is decorated with `@configuration`. This module is the only place where one is
built from untyped data; unknown keys and wrong types are refused there, with the dotted path at fault.
"""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from typing import Any, TypeVar, dataclass_transform

Config = TypeVar("Config")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def configuration(cls: type[Config]) -> type[Config]:
    """Make `cls` a frozen, keyword-only, slotted dataclass that `from_dict` reads strictly."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True, slots=True)(cls)
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return cls


def to_dict(config: Any) -> dict[str, Any]:
    """Return a JSON-ready dictionary of a configuration, nested configurations included."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_dict(kind: type[Config], values: dict[str, Any]) -> Config:
    """Build `kind` from a dictionary: the inverse of `to_dict`.

    Raises ValueError, in one line, with the dotted path of every unknown key and every value of a wrong type.
    """
    from pydantic import TypeAdapter, ValidationError  # slow to import, needed only here

    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        problems = [_explain(kind, dict(problem)) for problem in error.errors()]
        raise ValueError(f"{kind.__name__}: " + "; ".join(problems)) from None


def override(config: Config, assignments: Sequence[str]) -> Config:
    """Return `config` with dotted assignments applied, such as `["optimizer.lr=3e-4", "seed=2"]`.

    A value is read as JSON where it is JSON and as a plain string otherwise. Raises ValueError for an assignment
    without "=", a path that does not exist (with the nearest name that does) or a value of the wrong type.
    """
    values = to_dict(config)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"override {assignment!r} has no '=': write name=value, for example seed=2")
        *parents, name = path.split(".")
        node: Any = values
        for depth, parent in enumerate(parents):
            node = _child(node, parent, path=".".join(parents[: depth + 1]))
        _child(node, name, path=path)
        node[int(name) if isinstance(node, list) else name] = _json_or_text(text)
    return from_dict(type(config), values)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _child(node: Any, name: str, path: str) -> Any:
    if isinstance(node, list):
        if not name.isdigit() or int(name) >= len(node):
            raise ValueError(f"override {path!r}: {name!r} is not an index of a list of {len(node)}")
        return node[int(name)]
    known = list(node) if isinstance(node, dict) else []
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known) or 'nothing'}"
        raise ValueError(f"override {path!r}: there is no {name!r}; {hint}")
    return node[name]


def _explain(kind: type, problem: dict[str, Any]) -> str:
    path = ".".join(str(part) for part in problem["loc"]) or kind.__name__
    if problem["type"] == "unexpected_keyword_argument":
        return f"unknown key {path!r}"
    if problem["type"] == "value_error":  # raised by a __post_init__: its message already says everything
        return str(problem["ctx"]["error"])
    return f"{path} = {problem['input']!r}: {problem['msg']}"
