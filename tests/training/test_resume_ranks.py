"""Kill one of two data-parallel processes, or what started them; resume both; bit-equal."""

import fcntl
import multiprocessing
import os
import random
import signal
import socket
import threading

import pytest
from safetensors.torch import load_file

from glm45.training import loop
from glm45.training.checkpoint import committed_steps, path_of
from glm45.training.launch import LAUNCHER
from glm45.training.loop import train
from glm45.training.run import Run

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "glm45.training.loop", "torch.utils.tensorboard"])
NUM_STEPS = 24
"""Of the toy recipe."""


def train_rank(run, rank, port, victim, step, delay):
    """Train as one of two ranks; where `victim` says so, send SIGKILL `delay` seconds after `step` began."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", LAUNCHER: str(os.getppid())}
    target = {"rank 0": (0, os.getpid()), "rank 1": (1, os.getpid()), "launcher": (0, os.getppid())}.get(victim)
    original = loop.train_step
    killer = threading.Timer(delay, os.kill, (target[1], signal.SIGKILL)) if target and target[0] == rank else None

    def step_with_a_killer(state, rows):
        if killer and killer.ident is None and state.step >= step:
            killer.start()
        return original(state, rows)

    loop.train_step = step_with_a_killer
    with (run.folder / "ranks").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # until this process ends, in whatever way
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
def uninterrupted(toy_recipe_factory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_two_ranks(folder, toy_recipe_factory())
    return folder


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "launcher"])
def test_a_run_of_two_killed_processes_equals_the_uninterrupted_one(victim, toy_recipe, tmp_path, uninterrupted):
    """The other rank ends by itself, with an error; after the launcher's death both save and leave."""
    draw = random.Random(victim)
    run_two_ranks(tmp_path, toy_recipe(), victim, draw.randint(0, NUM_STEPS - 3), draw.uniform(0, 0.06))
    assert committed_steps(tmp_path / "checkpoints")[-1] < NUM_STEPS
    run_two_ranks(tmp_path, toy_recipe())
    assert (tmp_path / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
    expected, found = final_tensors(uninterrupted), final_tensors(tmp_path)
    assert found.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in found.items())
