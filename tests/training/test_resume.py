"""Kill anywhere, resume, bit-equal."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from glm45.config import override
from glm45.model.transformer import Glm45
from glm45.training import loop
from glm45.training.checkpoint import committed_steps, load, path_of, training_tensors
from glm45.training.loop import train
from glm45.training.metrics import read_record
from glm45.training.run import Run

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "glm45.training.loop", "torch.utils.tensorboard"])


def final_weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_run(folder, expected_folder, weights):
    """The log of record byte for byte, and the weights bit for bit."""
    assert (folder / "metrics.jsonl").read_bytes() == (expected_folder / "metrics.jsonl").read_bytes()
    run = Run.read(folder)
    model = Glm45(run.config.model)
    steps = committed_steps(run.checkpoints)
    load(path_of(run.checkpoints, steps[-1]), training_tensors(model, []))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.fixture(scope="module")
def uninterrupted(toy_recipe_factory, tmp_path_factory):
    """A whole run in one go, its weights, and its duration."""
    folder = tmp_path_factory.mktemp("whole")
    begun = time.monotonic()
    weights = final_weights(train(Run.open(folder, toy_recipe_factory())))
    return folder, weights, time.monotonic() - begun


def killed_and_resumed(folder, recipe, seed, duration):
    """Run to the end through SIGKILLs at random moments; return how often it was killed and how often in a save."""
    draw = random.Random(seed)
    kills = kills_in_save = 0
    while True:
        process = SERVER.Process(target=train, args=(Run.open(folder, recipe),))
        process.start()
        # The last attempts are left alone, or a run shorter than its start could go on for ever.
        process.join(draw.uniform(0.05, 0.9) * duration if kills < 5 else None)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            kills_in_save += bool(list(folder.glob("checkpoints/*.partial")))
        elif process.exitcode == 0:
            return kills, kills_in_save
        else:
            pytest.fail(f"the run failed with {process.exitcode}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_runs_equal_the_uninterrupted_one(seed, toy_recipe, tmp_path, uninterrupted):
    expected_folder, weights, duration = uninterrupted
    kills, _ = killed_and_resumed(tmp_path, toy_recipe(), seed, duration)
    assert kills > 0
    assert_same_run(tmp_path, expected_folder, weights)


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_twenty_killed_runs_equal_the_uninterrupted_one(toy_recipe, tmp_path, uninterrupted):
    expected_folder, weights, duration = uninterrupted
    all_kills = all_in_save = 0
    for seed in range(20):
        folder = tmp_path / str(seed)
        kills, in_save = killed_and_resumed(folder, toy_recipe(), 100 + seed, duration)
        all_kills, all_in_save = all_kills + kills, all_in_save + in_save
        assert_same_run(folder, expected_folder, weights)
    print(f"20 runs, {all_kills} kills, {all_in_save} of them in the middle of a save: all equal")
    assert all_in_save > 0, "no kill fell into a save: make the saves slower"


@pytest.mark.slow
def test_resuming_in_every_stage_is_bit_equal(toy_recipe, tmp_path, uninterrupted, monkeypatch):
    """A stop and a start in each stage, with the changed batch size, sequence length and RoPE base."""
    expected_folder, weights, _ = uninterrupted

    original = loop.train_step
    for limit in (4, 7, 19):

        def step_or_fail(state, rows, limit=limit):
            if state.step == limit:
                raise ConnectionError("the power fails")
            return original(state, rows)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_step", step_or_fail)
            with pytest.raises(ConnectionError):
                train(Run.open(tmp_path, toy_recipe()))
    train(Run.open(tmp_path, toy_recipe()))
    assert_same_run(tmp_path, expected_folder, weights)


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_go_on(toy_recipe, toy_data, tmp_path, uninterrupted):
    """From the command line; the second command ends with the same log of record."""
    recipe = toy_recipe()
    Run.open(tmp_path, recipe).write()
    program = (
        "import sys, os, signal; from glm45.training import loop; from glm45.training.run import Run;"
        "original = loop.train_step\n"
        "def step(state, rows):\n"
        "    if state.step == 4: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return original(state, rows)\n"
        "loop.train_step = step\n"
        "from glm45.training.command import run_training\n"
        "sys.exit(run_training(Run.read(sys.argv[1]), [], 1))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "stopped at step 5" in done.stdout
    assert f"Go on with: glm45 train toy --run {tmp_path}" in done.stdout
    assert committed_steps(tmp_path / "checkpoints")[-1] == 5
    expected_folder, weights, _ = uninterrupted
    train(Run.open(tmp_path, recipe))
    assert_same_run(tmp_path, expected_folder, weights)


@pytest.mark.slow
def test_a_flipped_byte_is_refused_and_the_checkpoint_before_used(toy_recipe, tmp_path, uninterrupted, capsys):
    expected_folder, _, _ = uninterrupted
    train(Run.open(tmp_path, toy_recipe()))
    steps = committed_steps(tmp_path / "checkpoints")
    damaged = next(path_of(tmp_path / "checkpoints", steps[-1]).glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    train(Run.open(tmp_path, toy_recipe()))
    said = capsys.readouterr().out
    assert "damaged: its checksum differs" in said
    assert f"going on at step {steps[-2]}" in said
    assert (tmp_path / "metrics.jsonl").read_bytes() == (expected_folder / "metrics.jsonl").read_bytes()


def test_a_changed_recipe_is_refused_with_the_difference(toy_recipe, tmp_path):
    Run.open(tmp_path, toy_recipe()).write()
    with pytest.raises(ValueError, match=r"learning_rate.peak: 0.005 -> 0.1"):
        Run.open(tmp_path, override(toy_recipe(), ["learning_rate.peak=0.1"]))
    Run.open(tmp_path, override(toy_recipe(), ["learning_rate.peak=0.1"]), allow_change=True)
    Run.open(tmp_path, override(toy_recipe(), ["micro_batch_tokens=128"]))  # does not change what is computed


@pytest.mark.slow
def test_a_resumed_run_keeps_the_lines_before(toy_recipe, tmp_path):
    """The log of record is cut at the checkpoint and no further."""
    train(Run.open(tmp_path, toy_recipe()))
    whole = read_record(tmp_path)
    train(Run.open(tmp_path, toy_recipe()))
    assert read_record(tmp_path) == whole
