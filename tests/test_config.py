"""Configurations are read strictly, and overrides say what was wrong."""

from dataclasses import field
from pathlib import Path
from typing import Literal

import pytest

from glm45.config import configuration, from_dict, override, to_dict


@configuration
class Inner:
    lr: float = 0.1
    sizes: tuple[int, ...] = (1, 2)


@configuration
class Outer:
    name: str = "a"
    steps: int = 3
    inner: Inner = Inner()
    parts: tuple[Inner, ...] = (Inner(), Inner(lr=0.2))


def test_round_trip_through_a_dictionary():
    config = Outer(name="b", inner=Inner(lr=0.5))
    assert from_dict(Outer, to_dict(config)) == config


def test_overrides_reach_nested_fields_and_list_items():
    changed = override(Outer(), ["inner.lr=0.25", "parts.1.lr=3", "name=x", "inner.sizes=[4,5]"])
    assert changed == Outer(name="x", inner=Inner(lr=0.25, sizes=(4, 5)), parts=(Inner(), Inner(lr=3.0)))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stepz=1", "did you mean 'steps'"),
        ("inner.rate=1", "there is no 'rate'"),
        ("steps", "has no '='"),
        ("steps=many", "steps = 'many'"),
        ("parts.7.lr=1", "not an index"),
        ("name.x=1", "there is no 'x'"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(assignment, message):
    with pytest.raises(ValueError, match=message) as error:
        override(Outer(), [assignment])
    assert "\n" not in str(error.value)


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match=r"unknown key 'inner\.speed'"):
        from_dict(Outer, {"inner": {"speed": 1}})


@configuration
class Wide:
    kind: Literal["a", "b"]
    path: Path | None = None
    table: dict[str, float] = field(default_factory=dict)
    pair: tuple[int, str] = (1, "x")
    flag: bool = False
    either: Inner | str = "none"


def test_every_kind_of_field_is_read():
    values = {"kind": "b", "path": "/x", "table": {"m": 1}, "pair": [2, "y"], "flag": True, "either": {"lr": 1}}
    wide = Wide(kind="b", path=Path("/x"), table={"m": 1.0}, pair=(2, "y"), flag=True, either=Inner(lr=1.0))
    assert from_dict(Wide, values) == wide
    assert from_dict(Wide, to_dict(wide)) == wide


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "missing kind"),
        ({"kind": "c"}, "choose one of 'a', 'b'"),
        ({"kind": "a", "flag": 1}, "flag = 1: expected bool"),
        ({"kind": "a", "pair": [1]}, "expected 2 values"),
        ({"kind": "a", "pair": [True, "x"]}, r"pair\.0 = True: expected int"),
        ({"kind": "a", "table": {"m": "x"}}, r"table\.m = 'x': expected float"),
        ({"kind": "a", "either": 3}, "either = 3"),
    ],
)
def test_wrong_values_are_refused_with_their_path(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Wide, values)
