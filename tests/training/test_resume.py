"""Kill anywhere, resume, bit-equal."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading

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
NUM_STEPS = 24
"""Of the toy recipe."""


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
    """A whole run in one go, and its weights."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, final_weights(train(Run.open(folder, toy_recipe_factory())))


def train_until_killed(run, step, delay):
    """Train, and be killed with SIGKILL `delay` seconds after `step` began; a step of -1 is the start of the run.

    The moment follows the run's progress, not a clock that was started outside: a kill falls where it should however
    fast the machine is, and one that comes too late hits a process that has finished.
    """
    killer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
    original = loop.train_step

    def step_with_a_killer(state, rows):
        if state.step >= step and killer.ident is None:
            killer.start()
        return original(state, rows)

    loop.train_step = step_with_a_killer
    if step < 0:
        killer.start()
    train(run)
    if killer.ident is not None:
        killer.join()


def killed_and_resumed(folder, recipe, seed):
    """Run to the end through one to three SIGKILLs at random moments; return their number and how many hit a save."""
    draw = random.Random(seed)
    num_kills = draw.randint(1, 3)
    kills_in_save = 0
    moments = sorted((draw.randint(-1, NUM_STEPS - 2), draw.uniform(0.0, 0.06)) for _ in range(num_kills))
    for step, delay in moments:
        process = SERVER.Process(target=train_until_killed, args=(Run.open(folder, recipe), step, delay))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, process.exitcode
        kills_in_save += bool(list(folder.glob("checkpoints/*.partial")))
    process = SERVER.Process(target=train, args=(Run.open(folder, recipe),))
    process.start()
    process.join()
    assert process.exitcode == 0, process.exitcode
    return num_kills, kills_in_save


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_runs_equal_the_uninterrupted_one(seed, toy_recipe, tmp_path, uninterrupted):
    expected_folder, weights = uninterrupted
    killed_and_resumed(tmp_path, toy_recipe(), seed)
    assert_same_run(tmp_path, expected_folder, weights)


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_twenty_killed_runs_equal_the_uninterrupted_one(toy_recipe, tmp_path, uninterrupted):
    expected_folder, weights = uninterrupted
    all_kills = all_in_save = 0
    for seed in range(20):
        folder = tmp_path / str(seed)
        kills, in_save = killed_and_resumed(folder, toy_recipe(), 100 + seed)
        all_kills, all_in_save = all_kills + kills, all_in_save + in_save
        assert_same_run(folder, expected_folder, weights)
    print(f"20 runs, {all_kills} kills, {all_in_save} of them in the middle of a save: all equal")
    assert all_in_save > 0, "no kill fell into a save: make the saves slower"


@pytest.mark.slow
def test_resuming_in_every_stage_is_bit_equal(toy_recipe, tmp_path, uninterrupted, monkeypatch):
    """A stop and a start in each stage, with the changed batch size, sequence length and RoPE base."""
    expected_folder, weights = uninterrupted

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
    expected_folder, weights = uninterrupted
    train(Run.open(tmp_path, recipe))
    assert_same_run(tmp_path, expected_folder, weights)


@pytest.mark.slow
def test_a_flipped_byte_is_refused_and_the_checkpoint_before_used(toy_recipe, tmp_path, uninterrupted, capsys):
    expected_folder, _ = uninterrupted
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
    run = Run.open(tmp_path, toy_recipe())
    assert run.fraction() == 0
    train(run)
    assert run.fraction() == 1
    whole = read_record(tmp_path)
    train(Run.open(tmp_path, toy_recipe()))
    assert read_record(tmp_path) == whole
