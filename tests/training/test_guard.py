"""Bad batches: skipped, survived, gone back from."""

import dataclasses
import math

import pytest
import torch

from glm45.training import loop
from glm45.training.guard import Guard, GuardConfig
from glm45.training.loop import train
from glm45.training.metrics import read_record
from glm45.training.run import Run


def inject(monkeypatch, bad_losses):
    """Make the loss of some steps (counted from 0) what is asked; a NaN gets NaN gradients, too."""
    original = loop.train_step
    forward_backward = loop.forward_backward

    def step(state, rows):
        def damaged(model, *arguments):
            loss = forward_backward(model, *arguments)
            if rows.step.index not in bad_losses:
                return loss
            value = bad_losses[rows.step.index]
            for parameter in model.parameters():
                parameter.grad.mul_(value)
            return dataclasses.replace(loss, total=value)

        monkeypatch.setattr(loop, "forward_backward", damaged)
        return original(state, rows)

    monkeypatch.setattr(loop, "train_step", step)


def steps_of(folder):
    return [line for line in read_record(folder) if "loss" in line]


@pytest.mark.slow
def test_a_nan_and_a_spike_are_skipped_and_survived(toy_recipe, tmp_path, monkeypatch):
    inject(monkeypatch, {9: math.nan, 12: 1000.0})
    model = train(Run.open(tmp_path, toy_recipe("guard.min_history=8")))
    record = steps_of(tmp_path)
    skipped = {line["step"]: line["skipped"] for line in record if "skipped" in line}
    assert list(skipped) == [10, 13]
    assert skipped[10] == "non-finite loss"
    assert "loss spike above" in skipped[13]
    assert record[9]["loss"] is None  # JSON has no NaN
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert record[-1]["next_token_loss"] < record[0]["next_token_loss"] - 0.5


@pytest.mark.slow
def test_a_skipped_step_changes_no_weight(toy_recipe, tmp_path, monkeypatch):
    """Two runs that differ in the bad step's gradient end alike."""
    ends = []
    for number, value in enumerate((math.nan, math.inf)):
        with monkeypatch.context() as patch:
            inject(patch, {9: value})
            ends.append(train(Run.open(tmp_path / str(number), toy_recipe())))
    for (name, first), second in zip(ends[0].state_dict().items(), ends[1].state_dict().values(), strict=True):
        assert torch.equal(first, second), name


@pytest.mark.slow
def test_a_row_of_bad_batches_takes_the_run_back_and_past_them(toy_recipe, tmp_path, monkeypatch):
    inject(monkeypatch, dict.fromkeys((7, 8, 9), math.nan))
    train(Run.open(tmp_path, toy_recipe("guard.max_skips=3")))
    record = read_record(tmp_path)
    (rollback,) = [line for line in record if line.get("event") == "rollback"]
    assert rollback == {"event": "rollback", "step": 9, "from_step": 10, "bad_steps": [8, 9, 10]}
    steps = steps_of(tmp_path)
    assert [line["step"] for line in steps] == list(range(1, 25)), "one line a step, none lost, none twice"
    assert [line["step"] for line in steps if "skipped" in line] == [8, 9, 10]


@pytest.mark.slow
def test_a_run_that_stays_bad_stops_with_advice(toy_recipe, tmp_path, monkeypatch):
    inject(monkeypatch, dict.fromkeys(range(4, 24), math.nan))
    with pytest.raises(ValueError, match=r"stayed bad after 1 rollbacks.*lower learning_rate.peak"):
        train(Run.open(tmp_path, toy_recipe("guard.max_skips=2", "guard.max_rollbacks=1")))


def test_spikes_are_judged_by_the_losses_of_the_same_stage():
    guard = Guard(GuardConfig(min_history=4, spike_sigmas=3))
    for step, loss in enumerate([2.0, 2.1, 1.9, 2.0]):
        assert guard.verdict(step, loss, 1.0) is None
    assert "spike" in guard.verdict(4, 3.0, 1.0)
    guard.begin_stage()
    assert guard.verdict(5, 3.0, 1.0) is None


def test_a_guard_goes_on_from_its_state():
    first, second = Guard(GuardConfig(min_history=2)), Guard(GuardConfig(min_history=2))
    for step, loss in enumerate([2.0, 2.1, math.nan, 9.0]):
        first.verdict(step, loss, 1.0)
    second.load_state(first.state())
    assert second.state() == first.state()
    assert second.skips_in_row == [2, 3]
