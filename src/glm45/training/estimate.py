"""Memory and time of a run before it starts, and the peak speed that it is measured against."""

import time
from typing import Any

import torch

from glm45.model.census import census, training_flops_per_token
from glm45.training.run import TrainConfig
from glm45.training.schedule import Plan

FP32, BF16 = 4, 2
"""Bytes of a number."""

CPU_LIBRARIES = 0.3e9
"""Bytes of a training process beyond its tensors, once torch has been imported."""

ASSUMED_PEAK_SHARE = 0.35
"""Share of the product peak that training reaches, for estimates of time."""


def measure_peak_flops(device: torch.device, dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    """Return the operations a second of square matrix products: the best of a few, about 0.1 s."""
    size = size * 8 if device.type == "cuda" else size
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def memory_per_rank(config: TrainConfig, on_cpu: bool = False) -> dict[str, float]:
    """Return the bytes of weights, gradients, optimiser state and activations of the fullest rank, by estimate.

    Weights, gradients and Muon's momentum in fp32, AdamW's two moments for the embedding. Activations: about 34
    values of the hidden size a layer and token in bf16, or one with recomputation; plus one layer's whole weights in
    bf16, gathered. Passing are Muon's update and the snapshot for update norms. On a CPU the copy that a checkpoint is
    written from is in the same memory, and the libraries. Within a tenth on the demo and `nano_cpu` on a CPU
    (docs/log.md); not measured on a GPU.
    """
    model, layout = config.model, config.layout
    counted = census(model)
    routed = counted.components["routed experts"] * (1 + model.num_nextn_predict_layers / model.num_hidden_layers)
    dense = counted.total - routed
    own = counted.total / layout.ranks_per_copy
    embedding = counted.components["embedding"] / (layout.shard * layout.context)
    row_tokens = max(config.micro_batch_tokens, *(stage.sequence_length for stage in config.stages))
    tokens = row_tokens / (layout.tensor * layout.context)
    # A pipeline holds as many micro-batches as it is long, each on one part of the layers.
    layers, layer = model.num_hidden_layers, 34 * model.hidden_size * BF16
    kept = model.hidden_size * BF16 * 2 * layers + layer if config.activation_checkpointing else layer * layers
    gathered = BF16 * (dense + routed / layout.expert) / layers / layout.tensor
    optimizer = (own + embedding) * FP32
    return {
        "weights": own * FP32,
        "gradients": own * FP32,
        "optimizer": optimizer,
        "activations": tokens * kept,
        "gathered layer": gathered if layout.shard * layout.context > 1 else 0.0,
        "passing": 2 * own * FP32,
        "checkpoint copy": own * FP32 + optimizer if on_cpu else 0.0,
        "libraries": CPU_LIBRARIES if on_cpu else 0.0,
    }


def check_memory(config: TrainConfig, available: float, where: str, on_cpu: bool = False) -> None:
    """Raise MemoryError, with the numbers, if a rank needs more than `available` bytes."""
    parts = memory_per_rank(config, on_cpu)
    needed = sum(parts.values())
    if needed > available:
        detail = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size)
        raise MemoryError(
            f"{config.name}: a rank needs about {needed / 1e9:.1f} GB ({detail}) and {where} has "
            f"{available / 1e9:.1f} GB: raise layout.shard, layout.expert, layout.tensor or layout.pipeline, or set "
            "activation_checkpointing=true"
        )


def estimate(config: TrainConfig, peak_flops: float, on_cpu: bool = False) -> dict[str, Any]:
    """Return steps, tokens, bytes and seconds of a run, for ranks of `peak_flops` each."""
    plan = Plan(config.stages)
    flops = sum(
        segment.num_steps
        * segment.step_tokens
        * training_flops_per_token(config.model, segment.stage.sequence_length, mtp=segment.stage.mtp_weight > 0)
        for segment in plan.segments
    )
    ranks = config.layout.world_size()
    return {
        "steps": plan.num_steps,
        "tokens": plan.tokens,
        "flops": flops,
        "ranks": ranks,
        "bytes_per_rank": memory_per_rank(config, on_cpu),
        "seconds": flops / (peak_flops * ranks * ASSUMED_PEAK_SHARE),
    }
