"""Decoding against transformers' generate, and against any server that speaks OpenAI's completions.

The model of every row: 16.0M random parameters (7.7M active), 8 layers, hidden 256, 16 experts top-4 and a shared one,
vocabulary 4,096; prompts of 32 tokens. Same weights, same process, alternating round by round: figures are medians of
generated tokens per second, and ratios of times measured within one round. Run with `make bench`, or

    python benchmarks/decode.py [--threads 1,2] [--batches 1,16,64,256] [--rounds 3] [--endpoint NAME=URL] [--json F]

An endpoint (vLLM, llama.cpp's server) must serve the checkpoint that `--export FOLDER` writes; the environment variable
GLM45_PEER names endpoints as well, for `make bench`.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = 32
GENERATED = {1: 128, 16: 96, 64: 64, 256: 64}
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
TARGETS = {1: 10.0, 16: 3.0, 64: 1.6, 256: 2.0}  # times transformers, two threads


def tiny(num_mtp_layers: int = 0, vocab_size: int = 4096) -> Any:
    from glm45.model.config import ModelConfig

    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        moe_intermediate_size=128,
        num_hidden_layers=8,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        rope_theta=10_000.0,
        max_position_embeddings=4096,
        num_nextn_predict_layers=num_mtp_layers,
    )


def prompts_of(count: int, seed: int) -> list[list[int]]:
    import torch

    return torch.randint(0, 4096, (count, PROMPT), generator=torch.Generator().manual_seed(seed)).tolist()


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


Seconds = dict[str, list[float]]


def alternate(contenders: dict[str, Callable[[int], Any]], rounds: int) -> tuple[Seconds, Seconds]:
    """Return wall and processor seconds of every contender in every round, after one round that does not count.

    On a machine that others use too, processor seconds are the steadier of the two.
    """
    wall: Seconds = {name: [] for name in contenders}
    processor: Seconds = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            start = time.process_time()
            took = timed(lambda run=run, number=number: run(number))
            if number:
                wall[name].append(took)
                processor[name].append(time.process_time() - start)
    return wall, processor


def median_ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


class Contest:
    """Both sides with the same weights."""

    def __init__(self, folder: str, endpoints: dict[str, str]):
        import torch
        from transformers import Glm4MoeForCausalLM

        from glm45.engine.engine import Engine
        from glm45.kernels import decode
        from glm45.model import hub
        from glm45.model.transformer import Glm45

        self.model = Glm45(tiny())
        hub.save(self.model, folder)
        self.startup = {"engine": timed(lambda: setattr(self, "engine", Engine(self.model)))}
        self.startup["first token"] = timed(lambda: self.ours(prompts_of(1, 0), [1]))
        self.half: Engine | None = None
        if decode.is_available(True):
            half = hub.load(folder)
            half.set_compute_dtype(torch.bfloat16)
            self.half = Engine(half)
        self.peer = Glm4MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.peer.set_experts_implementation("grouped_mm")
        self.peer.generation_config.eos_token_id = None
        self.endpoints = endpoints

    def ours(self, prompts: list[list[int]], lengths: list[int], engine: Any = None) -> list[list[int]]:
        from glm45.engine.request import SamplingParams

        params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in lengths]
        return [one.token_ids for [one] in (engine or self.engine).generate(prompts, params)]

    def transformers(self, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        import torch

        with torch.inference_mode():
            tokens = self.peer.generate(torch.tensor(prompts), max_new_tokens=max(lengths), do_sample=False)
        return tokens[:, PROMPT:].tolist()

    def endpoint(self, url: str, prompts: list[list[int]], lengths: list[int]) -> None:
        asyncio.run(self._ask(url, prompts, lengths))

    async def _ask(self, url: str, prompts: list[list[int]], lengths: list[int]) -> None:
        import httpx

        async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as client:
            bodies = [
                {"prompt": prompt, "max_tokens": n, "temperature": 0, "ignore_eos": True}
                for prompt, n in zip(prompts, lengths, strict=True)
            ]
            answers = await asyncio.gather(*(client.post(f"{url}/v1/completions", json=body) for body in bodies))
            for answer in answers:
                answer.raise_for_status()

    def measure(self, lengths: list[int], rounds: int) -> dict[str, Any]:
        """Time every contender on prompts that get so many tokens each."""
        contenders: dict[str, Callable[[int], Any]] = {
            "glm45 fp32": lambda seed: self.ours(prompts_of(len(lengths), seed), lengths),
            "transformers fp32": lambda seed: self.transformers(prompts_of(len(lengths), seed), lengths),
        }
        if self.half is not None:
            contenders["glm45 bf16"] = lambda seed: self.ours(prompts_of(len(lengths), seed), lengths, self.half)
        for name, url in self.endpoints.items():
            contenders[name] = lambda seed, url=url: self.endpoint(url, prompts_of(len(lengths), seed), lengths)
        wall, processor = alternate(contenders, rounds)
        peer, ours = "transformers fp32", "glm45 fp32"
        endpoints = {name: median_ratio(wall[name], wall[ours]) for name in self.endpoints}
        return {
            "tokens_per_second": {name: sum(lengths) / statistics.median(took) for name, took in wall.items()},
            "per_processor_second": {  # an endpoint's processor time is not this process's
                name: sum(lengths) / statistics.median(took)
                for name, took in processor.items()
                if name not in self.endpoints
            },
            "ratio": median_ratio(wall[peer], wall[ours]),
            "processor_ratio": median_ratio(processor[peer], processor[ours]),
            "endpoint_ratios": endpoints,
        }


def uneven_lengths(count: int) -> list[int]:
    """Lengths as rollouts have them: most are short, a few run to the limit (mean 50, median 35, longest 256)."""
    import torch

    drawn = torch.empty(count).log_normal_(3.6, 0.8, generator=torch.Generator().manual_seed(0))
    return drawn.clamp(8, 256).int().tolist()


def speculative(rounds: int) -> dict[str, Any]:
    """Decode text that the MTP layer predicts, at batch 1, with and without drafts."""
    from glm45.engine.engine import Engine, EngineConfig
    from glm45.engine.request import SamplingParams

    model, prompt = predictable_model()
    drafts = (1, 2, 3, 4, 5)
    engines = {k: Engine(model, None, EngineConfig(num_drafts=k, max_num_seqs=1)) for k in (0, *drafts)}
    params = SamplingParams(max_tokens=128, temperature=0)
    outputs: dict[int, Any] = {}

    def run(k: int) -> None:
        [[completion]] = engines[k].generate([prompt], params)
        outputs[k] = completion.token_ids

    wall, processor = alternate({str(k): lambda _, k=k: run(k) for k in engines}, rounds)
    assert all(tokens == outputs[0] for tokens in outputs.values()), "greedy drafts changed the output"
    speedup = {k: median_ratio(wall["0"], wall[str(k)]) for k in drafts}
    processor_speedup = {k: median_ratio(processor["0"], processor[str(k)]) for k in drafts}
    acceptance = {k: engines[k].stats()["acceptance"] for k in drafts}
    for engine in engines.values():
        engine.close()
    return {"speedup": speedup, "processor_speedup": processor_speedup, "acceptance": acceptance}


def predictable_model() -> tuple[Any, list[int]]:
    """Teach a tiny model, MTP layer included, a cycle of 64 tokens: text that it predicts."""
    import torch
    import torch.nn.functional as F

    from glm45.model.transformer import Glm45

    model = Glm45(tiny(num_mtp_layers=1))
    cycle = torch.randperm(4096, generator=torch.Generator().manual_seed(1))[:64]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(120):
        starts = torch.randint(0, 64, (8, 1), generator=torch.Generator().manual_seed(step))
        tokens = cycle[(starts + torch.arange(48)) % 64]
        output = model(tokens, mtp=True)
        loss = F.cross_entropy(output.logits_BTV[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss = loss + F.cross_entropy(output.mtp_logits_BTV[:, :-2].flatten(0, 1), tokens[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), cycle[:PROMPT].tolist()


def run_threads(options: argparse.Namespace) -> dict[str, Any]:
    """Everything for one number of threads, in this process."""
    import torch

    torch.set_num_threads(options.worker)
    endpoints = dict(item.split("=", 1) for item in options.endpoint)
    with tempfile.TemporaryDirectory() as folder:
        contest = Contest(options.export or folder, endpoints)
    probe = prompts_of(4, 9)
    same = contest.ours(probe, [16] * 4) == contest.transformers(probe, [16] * 4)
    results: dict[str, Any] = {"startup_seconds": contest.startup, "greedy_tokens_equal": same, "batches": {}}
    print(f"{options.worker} thread(s): start-up {contest.startup}, greedy tokens equal to transformers': {same}")
    cases = {str(batch): [GENERATED.get(batch, 64)] * batch for batch in options.batches}
    if options.rollouts:
        cases["rollouts of 64"] = uneven_lengths(64)
    for name, lengths in cases.items():
        results["batches"][name] = told = contest.measure(lengths, options.rounds)
        per_processor = {who: f" ({rate:,.0f})" for who, rate in told["per_processor_second"].items()}
        rates = "  ".join(
            f"{who} {rate:,.0f}{per_processor.get(who, '')}" for who, rate in told["tokens_per_second"].items()
        )
        target = f" (target {TARGETS[int(name)]})" if name.isdigit() and int(name) in TARGETS else ""
        print(f"  {name}: {rates} tokens/s (per processor second)", flush=True)
        endpoint_ratios = "".join(f", {ratio:.1f} times {who}" for who, ratio in told["endpoint_ratios"].items())
        print(
            f"    {told['ratio']:.1f} times transformers{target}, {told['processor_ratio']:.1f} by processor time"
            + endpoint_ratios
        )
    if options.speculative:
        results["speculative"] = told = speculative(options.rounds)
        print(f"  drafts at batch 1: {told}", flush=True)
    return results


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2])
    parser.add_argument(
        "--batches", type=lambda text: [int(part) for part in text.split(",") if part], default=[1, 16, 64, 256]
    )
    parser.add_argument("--rounds", type=int, default=3)
    given = os.environ.get("GLM45_PEER", "").split()
    parser.add_argument("--endpoint", action="append", default=given, metavar="NAME=URL")
    parser.add_argument("--export", help="write the checkpoint here, for an endpoint to serve")
    parser.add_argument("--rollouts", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--speculative", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    options = build_parser().parse_args()
    if options.worker:
        results = run_threads(options)
        if options.json:
            options.json.write_text(json.dumps(results))
        return
    everything = {}
    with tempfile.TemporaryDirectory() as folder:
        for threads in options.threads:
            path = Path(folder) / f"{threads}.json"
            environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(threads)}
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(threads), "--json", str(path)]
            subprocess.run(command, env=environment, check=True)
            everything[threads] = json.loads(path.read_text())
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
