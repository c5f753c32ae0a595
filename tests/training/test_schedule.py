"""Schedules and plans against the report's values and hand-computed ones."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45.training.schedule import LearningRate, Plan, plot
from glm45.training.stages import Stage


def stage(**changes):
    return Stage(**{"name": "s", "tokens": 64_000, "sequence_length": 10, "batch_tokens": 640} | changes)


def test_cosine_has_the_values_of_the_report():
    """0 -> 2.5e-4 -> 2.5e-5, half-way between the two at half of the decay."""
    rate = LearningRate(warmup_fraction=0.1)
    assert rate.at(0.05) == pytest.approx(1.25e-4)
    assert rate.at(0.1) == pytest.approx(2.5e-4)
    assert rate.at(0.55) == pytest.approx((2.5e-4 + 2.5e-5) / 2)
    assert rate.at(1.0) == pytest.approx(2.5e-5)
    assert rate.at(0.325) == pytest.approx(2.5e-5 + 2.25e-4 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_wsd_is_stable_and_then_falls_linearly():
    rate = LearningRate(shape="wsd", warmup_fraction=0.1, decay_fraction=0.4)
    assert rate.at(0.1) == rate.at(0.3) == rate.at(0.6) == 2.5e-4
    assert rate.at(0.8) == pytest.approx((2.5e-4 + 2.5e-5) / 2)
    assert rate.at(1.0) == pytest.approx(2.5e-5)


def test_batch_warmup_goes_through_multiples_of_its_start():
    """16M -> 64M over 500B tokens, scaled down: a quarter, a half, three quarters, whole, for equal tokens."""
    plan = Plan([stage(batch_warmup_from=160, batch_warmup_tokens=14_400)])
    assert [segment.rows for segment in plan.segments] == [16, 32, 48, 64]
    assert [segment.num_steps * segment.step_tokens for segment in plan.segments[:3]] == [4800, 4800, 4800]
    assert plan.tokens == 64_000 // 640 * 640 - (64_000 - 14_400) % 640


def test_switches_fall_on_stage_boundaries():
    first, second = stage(tokens=6400), stage(tokens=6400, sequence_length=40, rope_theta=1e6, mtp_weight=0.1)
    plan = Plan([first, second])
    assert plan.num_steps == 20
    assert plan.step(9).segment.stage is first
    assert plan.step(10).segment.stage is second
    assert plan.step(10).first_row == 0
    assert plan.step(19).tokens_after == plan.tokens == 12_800


@given(start=st.integers(1, 8), times=st.integers(1, 6), warmup=st.integers(1, 3000), extra=st.integers(0, 3000))
def test_no_row_is_skipped_or_repeated_while_the_batch_grows(start, times, warmup, extra):
    batch = start * times * 10
    plan = Plan(
        [stage(tokens=batch + extra, batch_tokens=batch, batch_warmup_from=start * 10, batch_warmup_tokens=warmup)]
    )
    next_row = 0
    for index in range(plan.num_steps):
        step = plan.step(index)
        assert step.first_row == next_row
        next_row += step.segment.rows
        assert step.tokens_after == next_row * 10
    assert next_row == plan.stage_rows(0)
    assert plan.tokens == next_row * 10 <= batch + extra


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"batch_tokens": 645}, "multiple of sequence_length 10: for example 640"),
        ({"tokens": 100}, "fewer than one batch of 640"),
        ({"batch_warmup_from": 300, "batch_warmup_tokens": 10}, "divide batch_tokens 640"),
        ({"batch_warmup_from": 160}, "set both"),
    ],
)
def test_a_stage_that_cannot_run_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        stage(**changes)


def test_plot_draws_a_file(tmp_path):
    plot([stage(), stage(name="long", sequence_length=40, rope_theta=1e6)], LearningRate(), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
