"""Kill anywhere, resume, bit-equal."""

import fcntl
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from glm45.config import override
from glm45.model.transformer import Glm45
from glm45.training import loop
from glm45.training.checkpoint import committed_steps, load, path_of, training_tensors, verify
from glm45.training.launch import LAUNCHER
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


def train_with(killer, run, step):
    """Train, and start a killer (a timer) when `step` begins; a step of -1 is the start of the run.

    The moment follows the run's progress, not a clock that was started outside: a kill falls where it should however
    fast the machine is, and one that comes too late hits a process that has finished.
    """
    original = loop.train_step

    def step_with_a_killer(state, rows):
        if state.step >= step and killer.ident is None:
            killer.start()
        return original(state, rows)

    loop.train_step = step_with_a_killer
    if step < 0:
        killer.start()
    train(run)


def kill_after(delay, pid):
    """Return a timer that sends SIGKILL `delay` seconds after it is started."""
    return threading.Timer(delay, os.kill, (pid, signal.SIGKILL))


def train_until_killed(run, step, delay):
    killer = kill_after(delay, os.getpid())
    train_with(killer, run, step)
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
    assert f"Go on with: glm45 train {tmp_path}" in done.stdout
    assert committed_steps(tmp_path / "checkpoints")[-1] == 5
    expected_folder, weights = uninterrupted
    train(Run.open(tmp_path, recipe))
    assert_same_run(tmp_path, expected_folder, weights)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["*.safetensors", "state.json"])
def test_a_flipped_byte_is_refused_and_the_checkpoint_before_used(file, toy_recipe, tmp_path, uninterrupted, capsys):
    """The damaged checkpoint is then made anew."""
    expected_folder, weights = uninterrupted
    train(Run.open(tmp_path, toy_recipe()))
    steps = committed_steps(tmp_path / "checkpoints")
    damaged = next(path_of(tmp_path / "checkpoints", steps[-1]).glob(file))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    train(Run.open(tmp_path, toy_recipe()))
    said = capsys.readouterr().out
    assert "damaged: its checksum differs" in said
    assert f"going on at step {steps[-2]}" in said
    verify(damaged.parent)
    assert_same_run(tmp_path, expected_folder, weights)


def test_a_changed_recipe_is_refused_with_the_difference(toy_recipe, tmp_path):
    Run.open(tmp_path, toy_recipe()).write()
    (tmp_path / "metrics.jsonl").touch()
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


def train_rank(run, rank, port, victim, step, delay):
    """Train as one of two ranks; where `victim` says so, send SIGKILL `delay` seconds after `step` began."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", LAUNCHER: str(os.getppid())}
    victims = {"rank 0": (0, os.getpid()), "rank 1": (1, os.getpid()), "launcher": (0, os.getppid())}
    at_rank, pid = victims.get(victim, (None, None))
    with (run.folder / "ranks").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # until this process ends, in whatever way
        if rank == at_rank:
            train_with(kill_after(delay, pid), run, step)
        else:
            train(run)


def start_two_ranks(run, *arguments):
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=train_rank, args=(run, rank, *arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()


def run_two_ranks(folder, recipe, victim=None, step=0, delay=0.0):
    """Train in two processes that a third one starts, until all three are gone."""
    run = Run.open(folder, recipe)
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = SERVER.Process(target=start_two_ranks, args=(run, port, victim, step, delay))
    launcher.start()
    launcher.join()
    assert launcher.exitcode == (-signal.SIGKILL if victim == "launcher" else 0)
    with (folder / "ranks").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def final_tensors(folder):
    """Every tensor of the last checkpoint: weights and optimiser state."""
    steps = committed_steps(folder / "checkpoints")
    assert steps[-1] == NUM_STEPS
    files = sorted(path_of(folder / "checkpoints", steps[-1]).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def two_uninterrupted(toy_recipe_factory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_two_ranks(folder, toy_recipe_factory())
    return folder


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "launcher"])
def test_a_run_of_two_killed_processes_equals_the_uninterrupted_one(victim, toy_recipe, tmp_path, two_uninterrupted):
    """The other rank ends by itself, with an error; after the launcher's death both save and leave."""
    draw = random.Random(victim)
    run_two_ranks(tmp_path, toy_recipe(), victim, draw.randint(0, NUM_STEPS - 3), draw.uniform(0, 0.06))
    assert committed_steps(tmp_path / "checkpoints")[-1] < NUM_STEPS
    run_two_ranks(tmp_path, toy_recipe())
    assert (tmp_path / "metrics.jsonl").read_bytes() == (two_uninterrupted / "metrics.jsonl").read_bytes()
    expected, found = final_tensors(two_uninterrupted), final_tensors(tmp_path)
    assert found.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in found.items())
