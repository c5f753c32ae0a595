"""One training step of the `mini` preset in bf16 on a GPU, against transformers under autocast on the same weights.

Forward and backward of both, and our whole step: MTP and balance losses, clipping, Muon and AdamW, the router's bias.
Prints tokens a second, their ratio, and the share of a measured bf16 product peak. Does nothing without a GPU.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

WHOLE = "ours bf16, whole step"


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of a step, to the end of its work on the device."""
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_rate(device: torch.device, size: int) -> float:
    """Return the rate of one square bf16 product, in operations a second: the best of ten."""
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(10))


class Contest:
    """Both models with the same weights, and one training step of each."""

    def __init__(self, name: str, device: torch.device, rows: int, length: int):
        from transformers import Glm4MoeForCausalLM

        from glm45.model import hub
        from glm45.model.config import preset
        from glm45.model.transformer import Glm45
        from glm45.training.layout import Layout
        from glm45.training.optimizers import OptimizerConfig, build_optimizers
        from glm45.training.parallel import World

        self.config = preset(name)
        self.ours = Glm45(self.config, compute_dtype=torch.bfloat16, device=device)
        with tempfile.TemporaryDirectory() as folder:
            hub.save(self.ours, folder)
            self.peer = Glm4MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        self.tokens_BT = torch.randint(0, self.config.vocab_size, (rows, length), device=device)
        self.world = World(Layout(replicate=1), device)
        self.optimizers = build_optimizers(self.ours, OptimizerConfig())

    def peer_step(self, experts: str) -> None:
        self.peer.set_experts_implementation(experts)
        self.peer.zero_grad(set_to_none=True)
        with torch.autocast(self.tokens_BT.device.type, torch.bfloat16):
            self.peer(self.tokens_BT, labels=self.tokens_BT, use_cache=False).loss.backward()

    def our_step(self) -> None:
        from glm45.kernels.logprobs import linear_cross_entropy

        self.ours.zero_grad(set_to_none=True)
        hidden_ND = self.ours(self.tokens_BT, output="hidden").hidden_BTD.flatten(0, 1)
        targets_BT = self.tokens_BT.roll(-1, dims=1)
        weights_BT = torch.full_like(targets_BT, 1 / (targets_BT.numel() - len(targets_BT)), dtype=torch.float32)
        weights_BT[:, -1] = 0
        head = self.ours.lm_head.weight
        linear_cross_entropy(hidden_ND, head, targets_BT.flatten(), weights_BT.flatten()).backward()

    def whole_step(self) -> None:
        from training_step import whole_step

        self.ours.train()
        whole_step(self.ours, self.optimizers, self.world, self.tokens_BT)
        self.ours.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--gemm", type=int, default=8192, help="size of the product that gives the peak")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no GPU on this machine: nothing was measured")
        return
    from glm45.model.census import training_flops_per_token

    contest = Contest(options.preset, device, options.rows, options.length)
    steps: dict[str, Callable[[], None]] = {"ours bf16": contest.our_step, WHOLE: contest.whole_step}
    for experts in ("eager", "grouped_mm"):
        steps[f"peer autocast, {experts}"] = lambda experts=experts: contest.peer_step(experts)
    times = {name: [seconds(step, device) for _ in range(3)][1:] for name, step in steps.items()}
    for _ in range(5):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    peak, tokens = peak_rate(device, options.gemm), contest.tokens_BT.numel()
    flops = {
        name: tokens * training_flops_per_token(contest.config, options.length, mtp=name == WHOLE) for name in steps
    }
    best_peer = min(statistics.median(measured) for name, measured in times.items() if name.startswith("peer"))
    print(f"{options.preset}, {tokens} tokens on {device}; bf16 product peak {peak / 1e12:.1f} TF/s")
    for name, measured in times.items():
        median = statistics.median(measured)
        share = flops[name] / median / peak
        print(
            f"  {name:26} {tokens / median:10,.0f} tokens/s  {share:.2f} of peak  {best_peer / median:.2f} × best peer"
        )
    if device.type == "cuda":
        print(f"  peak memory of both models and a step {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
