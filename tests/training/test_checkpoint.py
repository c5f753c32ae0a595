"""Checkpoints: exact, atomic, verified, kept by policy."""

import os

import pytest
import torch

from glm45.model.config import preset
from glm45.model.transformer import Glm45
from glm45.training.checkpoint import Checkpoints, Retention, newest_state, path_of, training_tensors, verify
from glm45.training.optimizers import OptimizerConfig, build_optimizers, set_learning_rate


@pytest.fixture
def trained():
    """A model and its optimisers after two steps."""
    torch.manual_seed(0)
    model = Glm45(preset("pico"), seed=1)
    optimizers = build_optimizers(model, OptimizerConfig())
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        set_learning_rate(optimizers, 1e-3, OptimizerConfig())
        for optimizer in optimizers:
            optimizer.step()
    return model, optimizers


def test_everything_comes_back_bit_for_bit(trained, tmp_path):
    tensors = training_tensors(*trained)
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    checkpoints = Checkpoints(tmp_path, Retention())
    checkpoints.save(7, tensors, {"some": "state"})
    for tensor in tensors.values():  # the copies are taken before `save` returns
        tensor.detach().zero_()
    checkpoints.wait()
    state = checkpoints.load(7, tensors)
    assert state["some"] == "state"
    assert len(saved) > 3 * len(list(trained[0].parameters())) - 40
    for name, tensor in tensors.items():
        assert torch.equal(tensor, saved[name]), name


def test_the_policy_keeps_last_every_best_and_the_scheduled_one(trained, tmp_path):
    checkpoints = Checkpoints(tmp_path, Retention(every=2, keep_last=2, keep_every=4))
    for step in (2, 3, 4, 5, 6, 7, 9):
        checkpoints.save(step, training_tensors(trained[0], []), {})
        checkpoints.wait()
        checkpoints.prune(best=3)
    assert checkpoints.steps() == [3, 4, 6, 7, 9]


def test_what_a_rollback_undid_is_no_checkpoint_any_more(trained, tmp_path):
    checkpoints = Checkpoints(tmp_path, Retention(keep_last=9))
    for step in (2, 4, 5):
        checkpoints.save(step, training_tensors(trained[0], []), {"first": True})
        checkpoints.wait()
    checkpoints.discard_after(2)
    assert checkpoints.steps() == [2]
    checkpoints.save(4, training_tensors(trained[0], []), {"first": False})
    checkpoints.wait()
    assert not checkpoints.load(4, training_tensors(trained[0], []))["first"]


def test_the_newest_readable_state_is_found_past_a_damaged_one(trained, tmp_path):
    checkpoints = Checkpoints(tmp_path, Retention())
    assert newest_state(tmp_path) is None
    for step in (1, 2):
        checkpoints.save(step, training_tensors(trained[0], []), {"facts": step})
    checkpoints.wait()
    assert newest_state(tmp_path)["facts"] == 2
    (path_of(tmp_path, 2) / "state.json").write_text("{")
    assert newest_state(tmp_path)["facts"] == 1


def test_an_unfinished_save_is_no_checkpoint_and_is_removed(trained, tmp_path):
    checkpoints = Checkpoints(tmp_path, Retention())
    checkpoints.save(1, training_tensors(trained[0], []), {})
    checkpoints.close()
    os.rename(path_of(tmp_path, 1), tmp_path / "step-00000001.partial")
    checkpoints = Checkpoints(tmp_path, Retention())
    assert checkpoints.steps() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage, said", [(b"x", "damaged"), (None, "missing")])
def test_damage_is_named_and_the_one_before_used(trained, tmp_path, damage, said):
    checkpoints = Checkpoints(tmp_path, Retention())
    for step in (1, 2):
        checkpoints.save(step, training_tensors(trained[0], []), {})
    checkpoints.wait()
    file = path_of(tmp_path, 2) / "state.json"
    if damage:
        file.write_bytes(file.read_bytes() + damage)
    else:
        file.unlink()
    with pytest.raises(ValueError, match=said):
        verify(path_of(tmp_path, 2))
    step, problems = checkpoints.newest()
    assert step == 1
    assert said in problems[0]


def test_another_architecture_is_refused_with_the_first_difference(trained, tmp_path):
    checkpoints = Checkpoints(tmp_path, Retention())
    checkpoints.save(1, training_tensors(trained[0], []), {})
    checkpoints.wait()
    other = Glm45(preset("demo"))
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight is \[320, 32\] there and \[2048, 128\] here"):
        checkpoints.load(1, training_tensors(other, []))


def test_a_full_disk_leaves_the_earlier_checkpoint(trained, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, Retention())
    checkpoints.save(1, training_tensors(trained[0], []), {})
    checkpoints.wait()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("glm45.training.checkpoint.dcp.save", full)
    checkpoints.save(2, training_tensors(trained[0], []), {})
    with pytest.raises(OSError, match=r"No space left on device.*earlier checkpoints are intact"):
        checkpoints.wait()
    assert checkpoints.newest() == (1, [])
