"""The whole loop on toy data, in one process."""

import json
from pathlib import Path

import pytest

from glm45.training import loop
from glm45.training.checkpoint import committed_steps
from glm45.training.loop import train
from glm45.training.metrics import JsonLines, read_record
from glm45.training.run import Run


def test_a_run_learns_and_writes_its_folder(toy_recipe, tmp_path):
    train(Run.open(tmp_path, toy_recipe()))
    record = read_record(tmp_path)
    steps = [line for line in record if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["next_token_loss"] < steps[0]["next_token_loss"] - 0.5


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_where_none_was_scheduled(toy_recipe, tmp_path):
    train(Run.open(tmp_path, toy_recipe("checkpoints.every=100", "evaluation.every=5", "checkpoints.keep_last=1")))
    losses = {line["step"]: line["mean"] for line in read_record(tmp_path) if line.get("event") == "evaluation"}
    best = min(losses, key=losses.get)
    assert committed_steps(tmp_path / "checkpoints") == sorted({0, best, 24})


def test_no_dry_batch_is_larger_than_any_real_one(toy_recipe, tmp_path, monkeypatch):
    """The micro-batch would hold 128 rows of 32 tokens; the largest batch has 4."""
    shapes = []
    original = loop.forward_backward

    def seen(model, batch, *arguments):
        shapes.append(tuple(batch.tokens_BT.shape))
        return original(model, batch, *arguments)

    monkeypatch.setattr(loop, "forward_backward", seen)
    train(Run.open(tmp_path, toy_recipe("micro_batch_tokens=4096")))
    dry, real = set(shapes[:2]), set(shapes[2:])
    assert dry == {(4, 32), (2, 64)}
    assert dry <= real


def test_a_stage_without_memory_is_named_before_the_first_step(toy_recipe, tmp_path, monkeypatch):
    original = loop.forward_backward

    def too_long(model, batch, *arguments):
        if batch.tokens_BT.shape[1] == 64:
            raise RuntimeError("not enough memory: you tried to allocate 9 bytes")
        return original(model, batch, *arguments)

    monkeypatch.setattr(loop, "forward_backward", too_long)
    with pytest.raises(MemoryError, match=r"stage 'long': 1 rows of 64 tokens do not fit .*Lower micro_batch_tokens"):
        train(Run.open(tmp_path, toy_recipe()))
    assert read_record(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_error_with_advice():
    """Closing the file does not hide it behind another error."""
    lines = JsonLines(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left on device; free some space and run the same command again"):
        lines.write({"step": 1})
    lines.close()


def test_gradient_and_update_norms_are_in_the_record_by_group(toy_recipe, tmp_path):
    train(Run.open(tmp_path, toy_recipe()))
    looks = [line for line in read_record(tmp_path) if "gradient_norms" in line]
    assert [line["step"] for line in looks] == [8, 16, 24]
    for line in looks:
        assert line["gradient_norms"].keys() == line["relative_updates"].keys()
        assert sum(norm**2 for norm in line["gradient_norms"].values()) ** 0.5 == pytest.approx(line["grad_norm"])
        assert all(0 < update < 1 for update in line["relative_updates"].values())


def test_tensorboard_has_every_number(toy_recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(Run.open(tmp_path, toy_recipe("log_every=4")))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = {line["step"]: line["loss"] for line in read_record(tmp_path) if "loss" in line}
    assert {event.step: pytest.approx(event.value) for event in events.Scalars("loss")} == {
        step: losses[step] for step in range(4, 25, 4)
    }
    timings = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert events.Scalars("tokens_per_second")[0].value == pytest.approx(timings[3]["tokens_per_second"])
