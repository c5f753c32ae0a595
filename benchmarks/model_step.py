"""One training step, forward and backward, against transformers' Glm4MoeForCausalLM.

Same weights, same tokens, same process, alternating round by round, in CPU time; the figures are ratios within one
round, so that a noisy machine disturbs both sides alike. Run with `make bench`, or

    python benchmarks/model_step.py [--shapes small,medium,large] [--processes 1,2] [--rounds 5] [--json FILE]
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = {
    "small": {"hidden_size": 128, "n_routed_experts": 8, "moe_intermediate_size": 64, "num_hidden_layers": 3},
    "medium": {"hidden_size": 256, "n_routed_experts": 16, "moe_intermediate_size": 128, "num_hidden_layers": 4},
    "large": {"hidden_size": 512, "n_routed_experts": 32, "moe_intermediate_size": 256, "num_hidden_layers": 4},
}
EXPERTS_PER_TOKEN = {"small": 2, "medium": 2, "large": 4}
HEAD_DIM = {"small": 32, "medium": 64, "large": 64}
LENGTH = 128
TOKENS = 2048
GEMM_SIZE = 1024
CONTENDERS = ("peer fp32", "peer autocast", "ours fp32", "ours bf16")

# glibc returns large blocks to the system at every free; both sides gain from keeping them.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33), "OMP_NUM_THREADS": "1"}


def configuration(shape: str) -> Any:
    """Return the model configuration of a shape: one dense layer, QK-norm, biases, two key/value heads."""
    from glm45.config import from_dict
    from glm45.model.config import ModelConfig

    sizes, head_dim = SHAPES[shape], HEAD_DIM[shape]
    hidden = sizes["hidden_size"]
    values = {
        **sizes,
        "vocab_size": 4096,
        "intermediate_size": 2 * hidden,
        "first_k_dense_replace": 1,
        "num_attention_heads": hidden // head_dim,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "num_experts_per_tok": EXPERTS_PER_TOKEN[shape],
        "routed_scaling_factor": 1.0,
        "use_qk_norm": True,
        "attention_bias": True,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 4096,
        "num_nextn_predict_layers": 0,
        "initializer_range": 0.02,
    }
    return from_dict(ModelConfig, values)


class Contest:
    """Both models with the same weights, the tokens, and one training step of each contender."""

    def __init__(self, shape: str):
        import torch
        from transformers import Glm4MoeForCausalLM

        from glm45.model import hub
        from glm45.model.transformer import Glm45

        self.config = configuration(shape)
        self.ours = Glm45(self.config, seed=0)
        with tempfile.TemporaryDirectory() as folder:
            hub.save(self.ours, folder)
            self.peer = Glm4MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        shape_BT = (TOKENS // LENGTH, LENGTH)
        self.tokens_BT = torch.randint(0, self.config.vocab_size, shape_BT, generator=generator)

    def step(self, contender: str) -> None:
        side, precision = contender.split()
        if side == "peer":
            self.peer_step(precision == "autocast")
        else:
            self.our_step(precision)

    def peer_step(self, autocast: bool) -> None:
        import torch

        self.peer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            self.peer(self.tokens_BT, labels=self.tokens_BT, use_cache=False).loss.backward()

    def our_step(self, precision: str) -> None:
        import torch

        from glm45.kernels.logprobs import linear_cross_entropy

        self.ours.zero_grad(set_to_none=True)
        self.ours.set_compute_dtype({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
        hidden_BTD = self.ours(self.tokens_BT, output="hidden").hidden_BTD
        targets_BT = self.tokens_BT.roll(-1, dims=1)
        weights_BT = torch.full(targets_BT.shape, 1 / (targets_BT.numel() - len(targets_BT)))
        weights_BT[:, -1] = 0
        linear_cross_entropy(
            hidden_BTD.flatten(0, 1), self.ours.lm_head.weight, targets_BT.flatten(), weights_BT.flatten()
        ).backward()

    def choose_experts(self) -> dict[str, str]:
        """Time the peer's experts implementations and return the fastest, for each precision."""
        chosen = {}
        for name in ("peer fp32", "peer autocast"):
            times = {}
            for implementation in ("eager", "grouped_mm"):  # batched_mm is an order of magnitude behind both
                self.peer.set_experts_implementation(implementation)
                times[implementation] = min(timed(lambda name=name: self.step(name)) for _ in range(2))
            chosen[name] = min(times, key=times.__getitem__)
        return chosen

    def gradients(self) -> dict[str, dict[str, Any]]:
        """Return every contender's gradients by the hub's names."""
        from glm45.model import hub

        found = {}
        entries = [entry for entry in hub.entries(self.config) if "e_score" not in entry.key]
        for name in CONTENDERS:
            self.step(name)
            if name.startswith("peer"):
                parameters = dict(self.peer.named_parameters())
                found[name] = {entry.key: peer_gradient(parameters, entry.key).clone() for entry in entries}
            else:
                parameters = dict(self.ours.named_parameters())
                found[name] = {e.key: parameters[e.name].grad[e.index].reshape(e.shape).clone() for e in entries}
        return found


def peer_gradient(parameters: dict[str, Any], key: str) -> Any:
    """Return the gradient of a tensor named as in the hub's layout, where every expert has its own."""
    if ".mlp.experts." not in key:
        return parameters[key].grad
    prefix, rest = key.split(".experts.")
    expert, projection, _ = rest.split(".")
    if projection == "down_proj":
        return parameters[f"{prefix}.experts.down_proj"].grad[int(expert)]
    return parameters[f"{prefix}.experts.gate_up_proj"].grad[int(expert)].chunk(2)[projection == "up_proj"]


def timed(step: Callable[[], None]) -> float:
    """Return the CPU seconds of a step: wall time on a quiet machine, and little disturbed on a busy one."""
    start = time.process_time()
    step()
    return time.process_time() - start


def gemm_rate(dtype: Any) -> float:
    """Return the rate of one square matrix product, in operations a second: the best of three."""
    import torch

    a, b = torch.randn(2, GEMM_SIZE, GEMM_SIZE).to(dtype)
    out = torch.empty_like(a)
    return 2 * GEMM_SIZE**3 / min(timed(lambda: torch.mm(a, b, out=out)) for _ in range(3))


def compete(shape: str, rounds: int, gate: Any, results: Any) -> None:
    """Alternate all contenders; every process runs the same contender at the same time. The first round warms up."""
    import torch

    torch.set_num_threads(1)
    contest = Contest(shape)
    experts = contest.choose_experts()
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    peaks: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for _ in range(rounds + 1):
        for name in CONTENDERS:
            if name in experts:
                contest.peer.set_experts_implementation(experts[name])
            gate.wait()
            times[name].append(timed(lambda name=name: contest.step(name)))
        gate.wait()
        peaks["fp32"].append(gemm_rate(torch.float32))
        peaks["bf16"].append(gemm_rate(torch.bfloat16))
    results.put({"experts": experts, "times": {name: t[1:] for name, t in times.items()}, "peaks": peaks})


def memory(shape: str, contender: str, results: Any) -> None:
    """Report what one contender's steps add to the process at most, in MB, beyond weights and imports."""
    import torch

    torch.set_num_threads(1)
    contest = Contest(shape)
    if contender.startswith("peer"):
        contest.peer.set_experts_implementation("grouped_mm")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now
    before = process_memory("VmRSS")
    for _ in range(2):
        contest.step(contender)
    results.put(process_memory("VmHWM") - before)


def process_memory(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def agreement(shape: str, results: Any) -> None:
    """Report distances of gradients from the peer's in fp32."""
    import torch

    torch.set_num_threads(1)
    contest = Contest(shape)
    gradients = contest.gradients()
    exact = gradients.pop("peer fp32")
    report = {}
    for name, found in gradients.items():
        largest = max(float((found[k] - g).abs().max() / g.abs().max().clamp(min=1e-12)) for k, g in exact.items())
        error = sum(float((found[k] - g).square().sum()) for k, g in exact.items())
        norm = sum(float(g.square().sum()) for g in exact.values())
        report[name] = {"largest": largest, "norm": (error / norm) ** 0.5}
    results.put(report)


def spawn(target: Callable[..., None], *arguments: Any, processes: int = 1) -> list[Any]:
    """Run a function in fresh processes, whose allocator is tuned, and return what each reports.

    Its last arguments are a barrier of all processes (with `compete`) and the queue for its report.
    """
    context = multiprocessing.get_context("spawn")
    results, gate = context.SimpleQueue(), context.Barrier(processes)
    shared = (gate, results) if target is compete else (results,)
    children = [context.Process(target=target, args=(*arguments, *shared)) for _ in range(processes)]
    for child in children:
        child.start()
    reports = [results.get() for _ in children]
    for child in children:
        child.join()
    return reports


def summarise(shape: str, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Return rates, ratios and shares of the measured product peak, summed over processes.

    A step lasts as long as its slowest process. Ratios are medians of ratios within a round.
    """
    from glm45.model.census import training_flops_per_token

    processes = len(reports)
    flops = training_flops_per_token(configuration(shape), LENGTH, mtp=False) * TOKENS
    times = {
        name: [max(each) for each in zip(*(r["times"][name] for r in reports), strict=True)] for name in CONTENDERS
    }
    peaks = {dtype: statistics.median(p for r in reports for p in r["peaks"][dtype]) for dtype in ("fp32", "bf16")}
    rows = {}
    for name in CONTENDERS:
        median = statistics.median(times[name])
        rows[name] = {
            "ms": 1e3 * median,
            "tokens/s": processes * TOKENS / median,
            "share of peak": flops / median / peaks["fp32" if name.endswith("fp32") else "bf16"],
            "over peer fp32": median_ratio(times["peer fp32"], times[name]),
            "over peer autocast": median_ratio(times["peer autocast"], times[name]),
        }
    peaks_gf = {dtype: rate / 1e9 for dtype, rate in peaks.items()}
    experts = reports[0]["experts"]
    return {"shape": shape, "processes": processes, "experts": experts, "peak GF/s": peaks_gf, "rows": rows}


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def print_summary(summary: dict[str, Any]) -> None:
    peak = ", ".join(f"{rate:.0f} {dtype}" for dtype, rate in summary["peak GF/s"].items())
    print(f"\n{summary['shape']}: {summary['processes']} process(es), one thread each; product peak {peak} GF/s")
    print(f"  peer's experts: {summary['experts']}")
    print(f"  {'':14} {'ms':>7} {'tokens/s':>9} {'of peak':>8} {'× peer fp32':>12} {'× autocast':>11}")
    for name, row in summary["rows"].items():
        ms, rate, share, over_fp32, over_autocast = row.values()
        print(f"  {name:14} {ms:7.0f} {rate:9,.0f} {share:8.2f} {over_fp32:12.2f} {over_autocast:11.2f}")


def run(shapes: list[str], processes: list[int], rounds: int) -> dict[str, Any]:
    """Measure every shape: speed with each number of processes, peak memory, distance of gradients."""
    os.environ.update(ALLOCATOR)
    report: dict[str, Any] = {"speed": [], "memory MB": {}, "gradients": {}}
    for shape in shapes:
        for count in processes:
            report["speed"].append(summarise(shape, spawn(compete, shape, rounds, processes=count)))
            print_summary(report["speed"][-1])
        megabytes = {name: spawn(memory, shape, name)[0] for name in CONTENDERS}
        report["memory MB"][shape] = megabytes
        print("  peak memory of a step beyond the weights, MB:", {name: round(mb) for name, mb in megabytes.items()})
        report["gradients"][shape] = spawn(agreement, shape)[0]
        print("  gradients' distance from the peer's fp32 (largest element of each tensor; norm of all):")
        for name, distance in report["gradients"][shape].items():
            print(f"    {name:14} {distance['largest']:.1e}  {distance['norm']:.1e}")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="small,medium,large", help="which of: " + ", ".join(SHAPES))
    parser.add_argument("--processes", default="1,2", help="numbers of processes to measure with")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds after one that warms up")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    unknown = set(options.shapes.split(",")) - set(SHAPES)
    if unknown:
        parser.error(f"unknown shapes {sorted(unknown)}: choose from {', '.join(SHAPES)}")
    report = run(options.shapes.split(","), [int(n) for n in options.processes.split(",")], options.rounds)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
