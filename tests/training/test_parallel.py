"""Every layout on gloo against one process: many checks in two launches, since a launch takes ten seconds."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glm45.model.config import preset
from glm45.training.checkpoint import Checkpoints, Retention, training_tensors
from glm45.training.layout import Layout
from glm45.training.parallel import World
from glm45.training.pipeline import divide_layers

WORKER = Path(__file__).parent / "layouts_worker.py"
pytestmark = pytest.mark.timeout(1800)  # four processes on a busy machine
LAYOUTS, build = (runpy.run_path(str(WORKER))[name] for name in ("LAYOUTS", "build"))
ALWAYS = {
    *("hsdp", "expert x fsdp", "tensor x fsdp", "context x expert", "context x tensor x expert"),
    *("pipeline x tensor x expert", "interleaved"),
}
"""Layouts of four processes that hold every kind of division, mixed; the others are proofs."""
ON_FOUR = [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.proof) for name in LAYOUTS[4]]


def launch(processes, folder, layouts):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*command, str(WORKER), str(folder), *layouts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line.pop("layout"): line for line in lines}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def on_two(folder):
    return launch(2, folder, LAYOUTS[2])


@pytest.fixture(scope="module")
def on_four(request, folder, on_two):
    asked = {item.callspec.params["layout"] for item in request.session.items if "on_four" in item.fixturenames}
    return launch(4, folder, sorted(asked))


def assert_equal_to_one_process(report):
    """Gradients of five batches, weights after their five steps of Muon and AdamW, held-out loss; rounding in fp64."""
    for name in ("gradient", "weights"):
        difference, parameter = report[name]
        assert difference < 1e-9, f"{name} of {parameter}"
    assert report["loss"] < 1e-9
    assert report["norm"] < 1e-9
    assert report["held-out"] < 1e-9
    assert report["updates"] < 1e-7  # they are rounded to eight digits
    assert report["loads"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS[2])
def test_two_processes_equal_one(layout, on_two):
    assert_equal_to_one_process(on_two[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ON_FOUR)
def test_four_processes_equal_one(layout, on_four):
    assert_equal_to_one_process(on_four[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ON_FOUR)
def test_a_checkpoint_of_divided_experts_loads_bit_equal_on_four(layout, on_four):
    assert not on_four[layout]["loads differently"]


@pytest.mark.slow
def test_a_checkpoint_of_divided_experts_loads_bit_equal_on_one(on_two, folder):
    model, _, optimizers = build(World(Layout(replicate=1), torch.device("cpu")))
    tensors = training_tensors(model, optimizers)
    Checkpoints(folder / "checkpoints", Retention()).load(5, tensors)
    expected = load_file(folder / "whole.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_layers_are_divided_evenly_with_room_for_the_head():
    assert divide_layers(4, 4) == [range(1), range(1, 2), range(2, 3), range(3, 4)]
    assert [len(part) for part in divide_layers(92, 4)] == [23, 23, 24, 22]
    for parts in range(1, 9):
        ranges = divide_layers(13, parts)
        assert [layer for part in ranges for layer in part] == list(range(13))
        assert min(map(len, ranges)) >= 1


@pytest.mark.parametrize(
    "layout, said",
    [
        (Layout(tensor=16), "tensor 16 does not divide num_key_value_heads 8"),
        (Layout(expert=64, shard=64), "expert 64 does not divide n_routed_experts 160"),
        (Layout(expert=4, shard=2), "expert 4 does not divide shard . context . tensor 2"),
        (Layout(shard=3), "does not divide hidden_size 5120"),
        (Layout(context=64), "does not divide num_attention_heads 96"),
        (Layout(pipeline=48, pipeline_schedule="interleaved"), "96 pipeline stages are more than num_hidden_layers 92"),
    ],
)
def test_a_layout_that_cannot_divide_the_model_is_refused_with_numbers(layout, said):
    with pytest.raises(ValueError, match=said):
        layout.check(preset("glm-4.5"), [4096, 131_072])


def test_a_layout_takes_the_ranks_that_are_there_as_replicas():
    assert Layout(shard=2, tensor=2).resolve(8).replicate == 2
    with pytest.raises(ValueError, match=r"needs 4 processes.*there are 3"):
        Layout(shard=2, tensor=2).resolve(3)
