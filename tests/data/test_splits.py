"""The division of prompts: stable, of the asked size, nested."""

import pytest

from glm45.data.splits import is_held_out

PROMPTS = [f"{a} + {b} = ?" for a in range(100) for b in range(100)]


def test_the_division_never_changes():
    """Frozen on purpose: models were trained with it. If this fails, held-out prompts leak into training."""
    held_out = [number for number in range(200) if is_held_out(str(number))]
    assert held_out == [36, 52, 55, 140, 141, 162, 180]


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 1.0])
def test_about_the_asked_share_is_held_out(fraction):
    share = sum(is_held_out(prompt, fraction) for prompt in PROMPTS) / len(PROMPTS)
    assert abs(share - fraction) < 0.02


def test_a_larger_fraction_holds_out_a_superset():
    small, large = ({p for p in PROMPTS if is_held_out(p, fraction)} for fraction in (0.05, 0.2))
    assert small < large


def test_any_text_is_placed_and_outer_space_does_not_count():
    assert is_held_out("\ud800 lone surrogate") in (True, False)
    assert all(is_held_out(prompt) == is_held_out(f"  {prompt}\n") for prompt in PROMPTS[:100])


def test_a_share_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"1\.5"):
        is_held_out("x", 1.5)
