"""Typed configuration: frozen dataclasses, to and from JSON, with dotted overrides from the command line.

Every configuration of the project is decorated with `@configuration`. This module is the only place where one is
built from untyped data; unknown keys and wrong types are refused there, with the dotted path at fault. It needs the
standard library alone, so that the model runs wherever torch does.
"""

import dataclasses
import difflib
import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def configuration(cls: type[Config]) -> type[Config]:
    """Make `cls` a frozen, keyword-only, slotted dataclass that `from_dict` reads strictly."""
    return dataclasses.dataclass(frozen=True, kw_only=True, slots=True)(cls)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a JSON-ready dictionary of a configuration, nested configurations included."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_dict(kind: type[Config], values: dict[str, Any]) -> Config:
    """Build `kind` from a dictionary: the inverse of `to_dict`.

    Raises ValueError, in one line, with the dotted path of the unknown key or of the value of a wrong type.
    """
    return _build(kind, values, path="")


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


def read_json(path: str | Path) -> Any:
    """Return the JSON of a file. Raises ValueError with the file's name where it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


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


def _build(kind: Any, values: Any, path: str) -> Any:
    """Build a configuration from a dictionary found at `path`."""
    where = path or kind.__name__
    if isinstance(values, kind):
        return values
    if not isinstance(values, dict):
        raise ValueError(f"{where} = {values!r}: expected the fields of {kind.__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = get_type_hints(kind)
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise ValueError(f"unknown key {_join(path, name)!r} of {kind.__name__}; {hint}")
    needed = [
        name
        for name, field in fields.items()
        if name not in values and field.default is field.default_factory is dataclasses.MISSING
    ]
    if needed:
        raise ValueError(f"{where}: missing {', '.join(needed)}")
    return kind(**{name: _convert(hints[name], value, _join(path, name)) for name, value in values.items()})


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def _convert(kind: Any, value: Any, path: str) -> Any:
    """Return `value` as `kind`, converting only where nothing is lost; `path` is for the error."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, path, kind)
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError(f"{path} = {value!r}: choose one of {', '.join(map(repr, arguments))}")
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path)
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        variadic = origin is list or arguments[-1] is Ellipsis
        if not variadic and len(value) != len(arguments):
            raise ValueError(f"{path} = {value!r}: expected {len(arguments)} values")
        kinds = [arguments[0]] * len(value) if variadic else arguments
        return origin(_convert(k, v, _join(path, i)) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {_convert(arguments[0], k, path): _convert(arguments[1], v, _join(path, k)) for k, v in value.items()}
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if origin is None and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    name = kind.__name__ if isinstance(kind, type) and not arguments else str(kind)
    raise ValueError(f"{path} = {value!r}: expected {name}")


def _convert_union(kinds: tuple[Any, ...], value: Any, path: str, union: Any) -> Any:
    if value is None and type(None) in kinds:
        return None
    problems = []
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return _convert(kind, value, path)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError(problems[0] if len(problems) == 1 else f"{path} = {value!r}: expected {union}")
