"""Run under torchrun by test_parallel.py: layouts of as many processes as there are against one process.

Prints one JSON line a layout: the largest differences, each over the largest magnitude of its tensor. On two processes
it also saves a checkpoint with divided experts into FOLDER, on four it loads that at every layout.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from glm45.data.loader import Batch
from glm45.model.config import preset
from glm45.model.transformer import Glm45
from glm45.training.checkpoint import Checkpoints, Retention, training_tensors
from glm45.training.evaluation import held_out_losses
from glm45.training.gradients import clip_gradients, forward_backward, gradient_squares
from glm45.training.health import UpdateNorms
from glm45.training.layout import Layout
from glm45.training.losses import MicroBatch
from glm45.training.optimizers import OptimizerConfig, build_optimizers, set_learning_rate
from glm45.training.parallel import World, parallelize

LAYOUTS = {
    2: {
        "replicas": Layout(replicate=2),
        "fsdp": Layout(shard=2),
        "expert x fsdp": Layout(shard=2, expert=2),
        "tensor": Layout(tensor=2),
        "context": Layout(context=2),
        "pipeline": Layout(pipeline=2),
    },
    4: {
        "fsdp": Layout(shard=4),
        "hsdp": Layout(replicate=2, shard=2),
        "expert x fsdp": Layout(shard=4, expert=2),
        "replicas x expert": Layout(replicate=2, shard=2, expert=2),
        "tensor x fsdp": Layout(shard=2, tensor=2),
        "tensor x replicas": Layout(replicate=2, tensor=2),
        "context x fsdp": Layout(shard=2, context=2),
        "context, heads repeated": Layout(context=4),
        "context x expert": Layout(shard=2, context=2, expert=4),
        "context x tensor": Layout(context=2, tensor=2),
        "tensor x expert": Layout(shard=2, tensor=2, expert=4),
        "context x tensor x expert": Layout(context=2, tensor=2, expert=2),
        "pipeline x fsdp": Layout(pipeline=2, shard=2),
        "pipeline x expert": Layout(pipeline=2, shard=2, expert=2),
        "pipeline x tensor": Layout(pipeline=2, tensor=2),
        "pipeline x context": Layout(pipeline=2, context=2),
        "pipeline x tensor x expert": Layout(pipeline=2, tensor=2, expert=2),
        "interleaved": Layout(pipeline=2, replicate=2, pipeline_schedule="interleaved"),
    },
}
ROWS, LENGTH, STEPS = 8, 32, 5
DTYPE = torch.float64
OPTIMIZER = OptimizerConfig(clip_norm=0.5)
MODEL = dataclasses.replace(preset("pico"), num_hidden_layers=4)


def packed_rows(step):
    """Return a batch of packed documents, the last row padded."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 300, (ROWS, LENGTH), generator=generator)
    starts = torch.rand(ROWS, LENGTH, generator=generator) < 0.15
    starts[:, 0] = False
    documents = starts.long().cumsum(1)
    documents[-1, LENGTH * 2 // 3 :] = -1
    index = torch.arange(LENGTH).expand(ROWS, -1)
    first = torch.where(starts, index, 0).cummax(1).values
    mask = (torch.rand(ROWS, LENGTH, generator=generator) < 0.9) & (documents >= 0)
    return [tokens, documents, index - first, mask]


def batch(step, kept):
    return Batch(*(tensor[kept] for tensor in packed_rows(step)))


def own_rows(step, world):
    """This rank's part of a batch."""
    share = ROWS // world.num_data_ranks
    return MicroBatch.of(batch(step, slice(world.data_rank * share, (world.data_rank + 1) * share)))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def build(world):
    # In fp64, rounding cannot hide a mistake, nor AdamW blow up the noise of gradients that should be zero.
    model = Glm45(MODEL, seed=1, compute_dtype=DTYPE).to(DTYPE).train()
    pipeline = parallelize(model, world)
    return model, pipeline, build_optimizers(model, OPTIMIZER, world.replicas)


def one_step(model, pipeline, optimizers, world, step):
    """Return the loss, the norm and the whole gradient of a step, taken, and the relative updates by group."""
    loss = forward_backward(model, own_rows(step, world), world, 2, 0.3, 1e-2, step % 2 == 1, pipeline)
    norm = sum(gradient_squares(model, world).values()) ** 0.5
    gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    clip_gradients(model, norm, OPTIMIZER.clip_norm)
    set_learning_rate(optimizers, 1e-2, OPTIMIZER)
    before = UpdateNorms(model)
    for optimizer in optimizers:
        optimizer.step()
    updates = before.look(model, world)
    model.update_router_bias(loss.loads_LE[pipeline.own_rows] if pipeline else loss.loads_LE, 1e-3)
    model.zero_grad()
    return loss, norm, gradients, updates


def trajectory(world):
    model, pipeline, optimizers = build(world)
    results = [one_step(model, pipeline, optimizers, world, step) for step in range(STEPS)]
    weights = {name: whole(tensor).detach().clone() for name, tensor in model.state_dict().items()}
    held_out = {"unseen": [batch(STEPS, slice(start, start + 2)) for start in (0, 2, 6)]}
    loss = held_out_losses(model, held_out, world, pipeline)["unseen"]
    return results, weights, loss, training_tensors(model, optimizers)


def largest_difference(own, expected):
    """Largest difference over the largest magnitude of each tensor; names not held by this rank are others' affair."""
    differences = {
        name: ((own[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-3)).item()
        for name in own
    }
    name = max(differences, key=differences.get)
    return differences[name], name


def save(folder, tensors):
    """Save a checkpoint, and beside it the whole tensors in one file."""
    checkpoints = Checkpoints(folder / "checkpoints", Retention())
    checkpoints.save(STEPS, tensors, {})
    checkpoints.close()
    everything = {name: whole(tensor).detach().contiguous() for name, tensor in tensors.items()}
    if dist.get_rank() == 0:
        save_file(everything, folder / "whole.safetensors")


def loads_bit_equal(folder, world):
    """Whether a fresh model and optimiser at this layout become what was saved at the other one."""
    model, _, optimizers = build(world)
    tensors = training_tensors(model, optimizers)
    for tensor in tensors.values():
        tensor.detach().zero_()
    checkpoints = Checkpoints(folder / "checkpoints", Retention())
    checkpoints.load(STEPS, tensors)
    checkpoints.close()
    expected = load_file(folder / "whole.safetensors")
    return all(torch.equal(whole(tensor), expected[name]) for name, tensor in tensors.items())


def compare(name, layout, expected, folder):
    world = World.start(layout)
    results, weights, held_out, tensors = trajectory(world)
    expected_results, expected_weights, expected_held_out, _ = expected
    report = {
        "gradient": max(
            largest_difference(own[2], want[2]) for own, want in zip(results, expected_results, strict=True)
        ),
        "weights": largest_difference(weights, expected_weights),
        "held-out": abs(held_out - expected_held_out),
        "loss": max(abs(a[0].total - b[0].total) for a, b in zip(results, expected_results, strict=True)),
        "norm": max(abs(a[1] / b[1] - 1) for a, b in zip(results, expected_results, strict=True)),
        "updates": max(
            abs(a[3][group] - b[3][group])
            for a, b in zip(results, expected_results, strict=True)
            for group in a[3].keys() | b[3].keys()
        ),
        "loads": max(
            (a[0].loads_LE - b[0].loads_LE).abs().max().item() for a, b in zip(results, expected_results, strict=True)
        ),
    }
    if dist.get_world_size() == 2 and name == "expert x fsdp":
        save(folder, tensors)
    if dist.get_world_size() == 4:
        report["loads differently"] = not loads_bit_equal(folder, world)
    every_rank = [None] * dist.get_world_size()
    dist.all_gather_object(every_rank, report)
    return {key: max(rank_report[key] for rank_report in every_rank) for key in report}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("layouts", nargs="+")
    options = parser.parse_args()
    torch.set_num_threads(1)
    alone = World(Layout(replicate=1), torch.device("cpu"))
    expected = trajectory(alone)
    dist.init_process_group("gloo")
    for name in options.layouts:
        layout = LAYOUTS[dist.get_world_size()][name]
        result = {"layout": name, **compare(name, layout, expected, options.folder)}
        if dist.get_rank() == 0:
            print(json.dumps(result), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
