"""Every alarm has a planted case that rings it and a healthy run that does not."""

import pytest

from glm45.rl.health import HealthConfig, alarms

CONFIG = HealthConfig(window=3)


def run(steps=12, **columns):
    """A healthy run with some columns replaced; a column is a function of the step."""
    healthy = {
        "reward": lambda step: 0.4 + 0.03 * step,
        "held_out_full_cap": lambda step: 0.4 + 0.02 * step,
        "held_out_length": lambda step: 30.0,
        "entropy": lambda step: 0.5 - 0.01 * step,
        "cap": lambda step: 64.0,
        "repetition_rate": lambda step: 0.0,
        "language_mixing_rate": lambda step: 0.0,
        "mismatch": lambda step: 1e-5,
        "failure_share": lambda step: 0.0,
    }
    columns = {**healthy, **columns}
    return [{name: column(step) for name, column in columns.items()} for step in range(steps)]


def test_a_healthy_run_rings_nothing():
    assert alarms(run(), CONFIG) == []
    assert alarms([], CONFIG) == []


@pytest.mark.parametrize(
    "word,planted",
    [
        ("reward hacking", {"held_out_full_cap": lambda step: 0.4 - 0.001 * step}),
        ("reward hacking", {"held_out_full_cap": lambda step: 0.4}),
        ("reward hacking", {"held_out_full_cap": lambda step: 0.4 + (0.06 * step if step < 7 else 0.1)}),
        (
            "long-context regression",
            {  # the length goes only after it has paid
                "cap": lambda step: 64.0 if step < 8 else 16.0,
                "held_out_length": lambda step: 20.0 + 2 * step if step < 8 else 12.0,
                "held_out_full_cap": lambda step: 0.4 + 0.04 * step if step < 8 else 0.5,
                "reward": lambda step: 0.5,
            },
        ),
        (
            "long-context regression",
            {
                "cap": lambda step: 64.0 if step < 4 else 16.0,
                "held_out_length": lambda step: 30.0 if step < 4 else 12.0,
                "held_out_full_cap": lambda step: 0.6 if step < 4 else 0.5,
                "reward": lambda step: 0.5,
            },
        ),
        ("entropy collapse", {"entropy": lambda step: 0.5 / 2**step}),
        ("repeat", {"repetition_rate": lambda step: 0.5}),
        ("mix languages", {"language_mixing_rate": lambda step: 0.2}),
        ("disagree", {"mismatch": lambda step: 0.3}),
        ("cannot be judged", {"failure_share": lambda step: 0.2}),
    ],
)
def test_a_planted_case_rings_its_alarm_alone(word, planted):
    found = alarms(run(**planted), CONFIG)
    assert len(found) == 1, found
    assert word in found[0]


def test_a_fall_in_length_without_a_change_of_cap_or_with_rising_accuracy_is_no_regression():
    shorter = {"held_out_length": lambda step: 30.0 - 2 * step}
    assert alarms(run(**shorter), CONFIG) == []
    assert alarms(run(**shorter, cap=lambda step: 64.0 if step < 4 else 32.0), CONFIG) == []


def test_a_run_that_began_under_a_short_cap_is_watched_too():
    """The report's multi-stage run: caps grow, the length does not come back and full-cap accuracy falls."""
    planted = run(
        cap=lambda step: 16.0 if step < 6 else 64.0,
        held_out_length=lambda step: 30.0 if step < 3 else 9.0,
        held_out_full_cap=lambda step: 0.6 - 0.01 * step,
        reward=lambda step: 0.5,
    )
    assert any("long-context regression" in sentence for sentence in alarms(planted, CONFIG))


def test_a_fall_from_the_best_within_the_error_is_chance():
    planted = {"held_out_full_cap": lambda step: 0.5 if step == 8 else 0.4 + 0.005 * step}
    assert "reward hacking" in alarms(run(**planted), CONFIG)[0]
    assert alarms(run(**planted, held_out_full_cap_error=lambda step: 0.03), CONFIG) == []


def test_a_log_with_a_number_that_was_not_finite_is_read():
    rows = run(entropy=lambda step: None if step in (1, 10) else 0.5)
    assert alarms(rows, CONFIG) == []
