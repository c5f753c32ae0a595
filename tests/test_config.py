"""Configurations are read strictly, and overrides say what was wrong."""

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
