"""Pools by unbiased pass@k, stages, caps, plateaus and the temperature: against enumeration and planted curves."""

import itertools
import json

import pytest

from glm45.rl.curriculum import Curriculum, CurriculumStage, LengthSchedule, Plateau, PoolThresholds, pass_at_k
from glm45.rl.temperature import TemperatureConfig, TemperatureController, highest_harmless


@pytest.mark.parametrize("num_correct", range(7))
@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(num_correct, k):
    samples = [index < num_correct for index in range(6)]
    subsets = list(itertools.combinations(samples, k))
    assert pass_at_k(6, num_correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="pass@8 from 4 samples"):
        pass_at_k(4, 1, 8)


def test_prompts_are_classified_by_their_thresholds():
    thresholds = PoolThresholds()
    assert [thresholds.classify(correct) for correct in (0, 1, 8, 9, 16)] == [
        "deeper",
        "moderate",
        "moderate",
        "easy",
        "easy",
    ]
    assert thresholds.classify(4, num_samples=12) == "moderate"
    assert thresholds.classify(5, num_samples=12) == "easy"
    with pytest.raises(ValueError, match="need 1 <= k < num_samples"):
        PoolThresholds(num_samples=8)


def test_a_stage_ends_at_its_step():
    curriculum = Curriculum(
        [CurriculumStage(pool="moderate", until_step=3), CurriculumStage(pool="hard", samples_per_prompt=512)]
    )
    assert [curriculum.advance(step, 0.0) for step in (1, 2, 3, 4)] == [False, False, True, False]
    assert curriculum.stage.samples_per_prompt == 512


def test_a_stage_ends_on_a_plateau_and_resumes_from_json():
    stages = [CurriculumStage(plateau_window=3, plateau_gain=0.01), CurriculumStage(pool="hard")]
    rising, flat = Curriculum(stages), Curriculum(stages)
    assert not any(rising.advance(step, 0.02 * step) for step in range(1, 30))
    curve = [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    steps = [flat.advance(step, value) for step, value in enumerate(curve, start=1)]
    assert steps.index(True) == 9  # one step earlier the windows are 0.4 0.5 0.5 and 0.5 0.5 0.5
    resumed = Curriculum(stages)
    for step, value in enumerate(curve, start=1):
        before = json.loads(json.dumps(resumed.state_dict()))
        resumed = Curriculum(stages)
        resumed.load_state_dict(before)
        assert resumed.advance(step, value) == steps[step - 1]


def test_plateau_needs_two_windows():
    plateau = Plateau(2, 0.1)
    for value in (1.0, 1.0, 1.0):
        plateau.add(value)
        assert not plateau.reached()
    plateau.add(1.0)
    assert plateau.reached()


def test_caps_follow_the_schedule():
    multi = LengthSchedule(caps=((0, 16), (320, 32), (1200, 48), (1600, 64)))
    assert [multi.cap(step) for step in (0, 319, 320, 1599, 2160)] == [16, 16, 32, 48, 64]
    assert multi.full == 64
    with pytest.raises(ValueError, match="first at step 0"):
        LengthSchedule(caps=((5, 16),))


def test_the_next_temperature_is_the_highest_that_costs_at_most_one_percent():
    assert highest_harmless({0.6: 0.80, 1.0: 0.795, 1.2: 0.793, 1.4: 0.70}, 0.01) == 1.2
    assert highest_harmless({0.6: 0.80, 1.0: 0.70}, 0.01) == 0.6


def test_the_temperature_changes_on_a_plateau_only():
    config = TemperatureConfig(candidates=(0.8, 1.2, 1.6), plateau_window=2, plateau_gain=0.01)
    controller = TemperatureController(config)
    assert [controller.due(value) for value in (0.1, 0.2, 0.3, 0.4, 0.4)] == [False] * 5
    assert controller.due(0.3)
    assert controller.candidates == [0.8, 1.0, 1.2, 1.6]
    controller.choose({0.8: 0.9, 1.0: 0.9, 1.2: 0.895, 1.6: 0.5})
    assert controller.value == 1.2
    assert not controller.due(0.3)  # a new series: the old values say nothing
    state = json.loads(json.dumps(controller.state_dict()))
    again = TemperatureController(config)
    again.load_state_dict(state)
    assert again.value == 1.2
    assert not TemperatureController(TemperatureConfig()).due(0.0)


def test_a_step_that_generated_nothing_is_no_step_of_reward_zero():
    curriculum = Curriculum([CurriculumStage(plateau_window=2, plateau_gain=0.01), CurriculumStage(pool="hard")])
    controller = TemperatureController(TemperatureConfig(candidates=(0.8,), plateau_window=2, plateau_gain=0.01))
    for step, reward in enumerate((0.5, 0.6, None, 0.7, None, 0.8), start=1):
        assert not curriculum.advance(step, reward)
        assert not controller.due(reward)
    assert controller.due(0.1)
    assert curriculum.advance(7, 0.1)
