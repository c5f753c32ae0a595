"""A whole training step (forward, backward, clip, optimiser) against transformers + torch.optim, and what it costs.

Same shapes, weights and tokens as `model_step.py`, same process, alternating round by round; figures are medians of
ratios within a round. Ours is Muon with AdamW. The peer is measured with the same algorithm, `torch.optim.Muon` (which
refuses expert stacks, so it gets every matrix as a view) with AdamW, and with fused AdamW alone, which is cheaper.
Run with `make bench`, or

    python benchmarks/training_step.py [--shapes small,medium,large] [--parts step,scaling,stall] [--rounds 5]
        [--precisions fp32,bf16]
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from model_step import ALLOCATOR, LENGTH, SHAPES, TOKENS, Contest, configuration, gemm_rate, median_ratio, spawn, timed

CLIP = 1.0
CONTENDERS = ("peer muon fp32", "peer adamw fp32", "peer adamw autocast", "ours fp32", "ours bf16")
PRECISIONS = {"peer muon fp32": "peer fp32", "peer adamw fp32": "peer fp32", "peer adamw autocast": "peer autocast"}
"""Names of the peer's precisions in `model_step.py`."""
SELDOM = ("peer muon fp32",)
"""Measured once: torch's Muon iterates in bf16, and takes minutes a step where the processor lacks it."""


class Race(Contest):
    """Both models with their optimisers, and one whole step of each."""

    def __init__(self, shape: str):
        import torch

        from glm45.training.layout import Layout
        from glm45.training.optimizers import OptimizerConfig, build_optimizers
        from glm45.training.parallel import World

        super().__init__(shape)
        self.ours.train()
        self.peer_adamw = torch.optim.AdamW(self.peer.parameters(), lr=1e-5, fused=True)
        self.views = matrix_views(self.peer)
        rest = [p for p in self.peer.parameters() if id(p) not in {id(owner) for owner, _, _ in self.views}]
        self.peer_rest = torch.optim.AdamW(rest, lr=1e-5, fused=True)
        self.peer_muon = torch.optim.Muon([view for _, _, view in self.views], lr=1e-5, adjust_lr_fn="match_rms_adamw")
        self.optimizers = build_optimizers(self.ours, OptimizerConfig())
        self.world = World(Layout(replicate=1), torch.device("cpu"))
        self.optimizer_share = 0.0

    def step(self, contender: str) -> None:
        import torch

        if contender.startswith("ours"):
            self.our_step(contender.split()[1])
            return
        self.peer_step(contender.endswith("autocast"))  # of `model_step`: zero, forward, backward
        torch.nn.utils.clip_grad_norm_(self.peer.parameters(), CLIP)
        if "muon" not in contender:
            self.peer_adamw.step()
            return
        for owner, index, view in self.views:
            view.grad = owner.grad[index]
        self.peer_muon.step()
        self.peer_rest.step()

    def our_step(self, precision: str) -> None:
        import torch

        self.ours.set_compute_dtype({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
        self.optimizer_share = whole_step(self.ours, self.optimizers, self.world, self.tokens_BT)


def matrix_views(peer: Any) -> list[tuple[Any, Any, Any]]:
    """Return (parameter, index, view) of every matrix that Muon trains, experts and gate and up one by one."""
    import torch

    found = []
    for name, parameter in peer.named_parameters():
        if parameter.ndim < 2 or "embed_tokens" in name:
            continue
        indices: list[Any] = [...]
        if parameter.ndim == 3:
            half = parameter.shape[1] // 2
            halves = [slice(0, half), slice(half, None)] if "gate_up" in name else [slice(None)]
            indices = [(expert, part) for expert in range(len(parameter)) for part in halves]
        found += [(parameter, index, torch.nn.Parameter(parameter.data[index])) for index in indices]
    return found


def whole_step(model: Any, optimizers: Any, world: Any, tokens_BT: Any) -> float:
    """Take one step of the training loop on one micro-batch; return its optimisers' share of its processor time."""
    import torch

    from glm45.data.loader import Batch
    from glm45.training.gradients import clip_gradients, forward_backward, gradient_squares
    from glm45.training.losses import MicroBatch
    from glm45.training.optimizers import OptimizerConfig, set_learning_rate

    begun = time.process_time()
    positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    everything = torch.ones_like(tokens_BT, dtype=torch.bool)
    batch = MicroBatch.of(Batch(tokens_BT, torch.zeros_like(tokens_BT), positions_BT, everything), world.device)
    loss = forward_backward(model, batch, world, len(tokens_BT), 0.3, 1e-4, False)
    norm = sum(gradient_squares(model, world).values()) ** 0.5
    clip_gradients(model, norm, CLIP)
    set_learning_rate(optimizers, 1e-5, OptimizerConfig())
    optimizing = timed(lambda: [optimizer.step() for optimizer in optimizers])
    model.update_router_bias(loss.loads_LE.to(world.device), 1e-3)
    model.zero_grad(set_to_none=True)
    return optimizing / (time.process_time() - begun)


def race(shape: str, contenders: list[str], rounds: int, results: Any) -> None:
    """Alternate all contenders; the first round warms up."""
    import torch

    torch.set_num_threads(1)
    contest = Race(shape)
    experts = contest.choose_experts()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    optimizer_shares: list[float] = []
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    peaks: dict[str, list[float]] = {peak_of(name): [] for name in contenders}
    for turn in range(rounds + 1):
        for name in contenders:
            if name in SELDOM and turn:
                continue
            if name in PRECISIONS:
                contest.peer.set_experts_implementation(experts[PRECISIONS[name]])
            times[name].append(timed(lambda name=name: contest.step(name)))
            if name == "ours fp32":
                optimizer_shares.append(contest.optimizer_share)
        for dtype, rates in peaks.items():
            rates.append(gemm_rate(dtypes[dtype]))
    times = {name: spent if name in SELDOM else spent[1:] for name, spent in times.items()}
    results.put({"times": times, "shares": optimizer_shares[1:], "peaks": peaks})


def peak_of(contender: str) -> str:
    """Return the precision of the products that a contender is measured against."""
    return "fp32" if contender.endswith("fp32") else "bf16"


def print_race(shape: str, report: dict[str, Any]) -> None:
    from glm45.model.census import training_flops_per_token

    flops = training_flops_per_token(configuration(shape), LENGTH, mtp=False) * TOKENS
    times, peaks = report["times"], {dtype: max(rates) for dtype, rates in report["peaks"].items()}
    rates = ", ".join(f"{rate / 1e9:.0f} GF/s {dtype}" for dtype, rate in peaks.items())
    print(f"\n{shape}: whole step of {TOKENS} tokens, product peak {rates}; "
          f"our optimisers take {statistics.median(report['shares']):.1%}")  # fmt: skip
    print(f"  {'':20} {'ms':>7} {'tokens/s':>9} {'of peak':>8} {'× peer muon':>12} {'× peer adamw':>13}")
    for name in times:
        median = statistics.median(times[name])
        peak = peaks[peak_of(name)]
        against_adamw = statistics.median(times["peer adamw fp32"]) / median
        if name not in SELDOM:
            against_adamw = median_ratio(times["peer adamw fp32"], times[name])
        print(f"  {name:20} {1e3 * median:7.0f} {TOKENS / median:9,.0f} {flops / median / peak:8.2f} "
              f"{statistics.median(times['peer muon fp32']) / median:12.2f} "
              f"{against_adamw:13.2f}")  # fmt: skip


def scale(rank: int, processes: int, port: int, threads: int, rounds: int, results: Any) -> None:
    """Train the demo's model data-parallel and report seconds a step and of its optimisers."""
    import torch

    from glm45.model.config import preset
    from glm45.model.transformer import Glm45
    from glm45.training.layout import Layout
    from glm45.training.optimizers import OptimizerConfig, build_optimizers
    from glm45.training.parallel import World, parallelize

    torch.set_num_threads(threads)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    world = World.start(Layout())
    model = Glm45(preset("demo")).train()
    parallelize(model, world)
    optimizers = build_optimizers(model, OptimizerConfig(), world.replicas)
    tokens_BT = torch.randint(0, model.config.vocab_size, (16, 256), generator=torch.Generator().manual_seed(rank))
    times, shares = [], []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        shares.append(whole_step(model, optimizers, world, tokens_BT))
        times.append(time.perf_counter() - begun)
    world.close()
    if rank == 0:
        results.put((statistics.median(times[1:]), statistics.median(shares[1:])))


def measure_scaling(rounds: int) -> None:
    """Compare one process of one thread, one of two and two of one, on the same number of tokens a process."""
    import multiprocessing

    context, rates = multiprocessing.get_context("spawn"), {}
    for label, processes, threads in (("1 x 1", 1, 1), ("1 x 2", 1, 2), ("2 x 1", 2, 1)):
        results = context.SimpleQueue()
        children = [
            context.Process(target=scale, args=(rank, processes, 29581, threads, rounds, results))
            for rank in range(processes)
        ]
        os.environ["OMP_NUM_THREADS"] = str(threads)
        for child in children:
            child.start()
        while results.empty():
            assert not any(child.exitcode for child in children), "a process ended with an error, see above"
            time.sleep(0.1)
        seconds, share = results.get()
        for child in children:
            child.join()
        rates[label] = processes * 16 * 256 / seconds
        print(f"  {label} (processes x threads): {rates[label]:8,.0f} tokens/s, "
              f"{rates[label] / rates['1 x 1']:.2f} times, optimisers {share:.1%} of a step")  # fmt: skip


def measure_stall(rounds: int) -> None:
    """Compare how long training waits for a checkpoint with a step, at demo size."""
    import torch

    from glm45.model.config import preset
    from glm45.model.transformer import Glm45
    from glm45.training.checkpoint import Checkpoints, Retention, training_tensors
    from glm45.training.layout import Layout
    from glm45.training.optimizers import OptimizerConfig, build_optimizers
    from glm45.training.parallel import World

    torch.set_num_threads(1)
    model, world = Glm45(preset("demo")).train(), World(Layout(replicate=1), torch.device("cpu"))
    optimizers = build_optimizers(model, OptimizerConfig())
    tokens_BT = torch.randint(0, model.config.vocab_size, (16, 256))
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), Retention())
        alone, beside, stalls = [], [], []
        for step in range(rounds + 1):
            alone.append(timed(lambda: whole_step(model, optimizers, world, tokens_BT)))
            tensors = training_tensors(model, optimizers)
            stalls.append(timed(lambda step=step, tensors=tensors: checkpoints.save(step, tensors, {})))
            beside.append(timed(lambda: whole_step(model, optimizers, world, tokens_BT)))
            checkpoints.wait()
        checkpoints.close()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e6
    print(f"  checkpoint of {size:.0f} MB: training waits {1e3 * statistics.median(stalls[1:]):.1f} ms, "
          f"{median_ratio(stalls[1:], alone[1:]):.1%} of a step of {1e3 * statistics.median(alone[1:]):.0f} ms; the "
          f"step during the writing takes {median_ratio(beside[1:], alone[1:]):.2f} times as long")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="small,medium,large", help="which of: " + ", ".join(SHAPES))
    parser.add_argument("--parts", default="step,scaling,stall")
    parser.add_argument("--precisions", default="fp32,bf16", help="bf16 is slow where the processor lacks it")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds after one that warms up")
    options = parser.parse_args()
    os.environ.update(ALLOCATOR)
    parts = options.parts.split(",")
    if "step" in parts:
        contenders = [name for name in CONTENDERS if "bf16" in options.precisions or name.endswith("fp32")]
        for shape in options.shapes.split(","):
            print_race(shape, spawn(race, shape, contenders, options.rounds)[0])
    if "scaling" in parts:
        print("\ndemo, data parallel:")
        measure_scaling(options.rounds)
    if "stall" in parts:
        print("\ndemo, asynchronous checkpoint:")
        measure_stall(options.rounds)


if __name__ == "__main__":
    main()
