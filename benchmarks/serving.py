"""Sixty-four concurrent chat streams against `glm45 serve`: errors, memory, latencies, and what HTTP costs.

    python benchmarks/serving.py --seconds 300        # five minutes, as in docs/serving.md
    python benchmarks/serving.py --url http://...     # another OpenAI-compatible server instead

The model is that of `benchmarks/decode.py` with random weights. The peer is the engine itself, asked in one process
without a server: the ratio is the share of its throughput that is left over HTTP.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from glm45.engine.engine import Engine
from glm45.engine.request import SamplingParams
from glm45.model import hub
from glm45.model.config import preset
from glm45.model.transformer import Glm45
from glm45.text.tokenizer import Tokenizer

PROMPT = "Explain what a mixture of experts is and how its router balances load between experts. "
OUTPUT_TOKENS = (64, 256)
"""Shortest and longest answer, drawn evenly."""


@dataclasses.dataclass
class Measured:
    """What the clients saw."""

    until: float
    """End of the measurement, by `time.perf_counter`: answers go on after it, and their tokens do not count."""
    first_token: list[float] = dataclasses.field(default_factory=list)
    inter_token: list[float] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    num_answers: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)


def save_model(folder: Path) -> tuple[Glm45, Tokenizer]:
    """Write a random model and a small tokenizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
        tokenizer = Tokenizer.train([file.read_text(encoding="utf-8") for file in library], 4096)
    shape = dataclasses.replace(
        preset("demo"),
        vocab_size=tokenizer.padded_vocab_size,
        hidden_size=256,
        num_hidden_layers=8,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_ids,
    )
    model = Glm45(shape, seed=0)
    hub.save(model, folder)
    tokenizer.save(folder)
    return model, tokenizer


def engine_alone(model: Glm45, tokenizer: Tokenizer, streams: int, num_tokens: int) -> float:
    """Return tokens a second of the engine without a server, same prompts, all at once."""
    prompts = [tokenizer.encode(PROMPT + str(i))[:32] for i in range(streams)]
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    with Engine(model, tokenizer) as engine:
        engine.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
        began = time.perf_counter()
        engine.generate(prompts, params)
        return streams * num_tokens / (time.perf_counter() - began)


async def one_answer(host: str, port: int, number: int, measured: Measured) -> None:
    """Ask once and time the events; the plainest client there is, so that it costs little of the machine."""
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": f"{PROMPT}{number}"}],
            "max_tokens": random.randint(*OUTPUT_TOKENS),
            "ignore_eos": True,
            "return_token_ids": True,  # an event for every token: a random model also opens calls, which show nothing
            "stream": True,
            "chat_template_kwargs": {"enable_thinking": False},
        }
    ).encode()
    reader, writer = await asyncio.open_connection(host, port)
    began = last = time.perf_counter()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    is_first, done = True, False
    while line := await reader.readline():
        if line.startswith(b'data: {"error"') or (b"HTTP/1.1 " in line and b" 200 " not in line):
            measured.errors.append(line.decode().strip())
        elif b'"token_ids":[' in line:
            now = time.perf_counter()
            if now < measured.until:
                ids = line.partition(b'"token_ids":[')[2].partition(b"]")[0]
                measured.num_tokens += ids.count(b",") + bool(ids)
            (measured.first_token if is_first else measured.inter_token).append(now - last)
            is_first, last = False, now
        done = done or line.startswith(b"data: [DONE]")
    writer.close()
    if not done:
        measured.errors.append(f"the stream ended after {time.perf_counter() - began:.1f} s without [DONE]")
    measured.num_answers += 1


async def soak(host: str, port: int, streams: int, seconds: float, pid: int | None) -> tuple[Measured, list[float]]:
    """Keep `streams` answers going for so long; also return the server's memory in MB at ten moments."""
    measured, memory = Measured(until=time.perf_counter() + seconds), []

    async def client(number: int) -> None:
        while time.perf_counter() < measured.until:
            try:
                await one_answer(host, port, number, measured)
            except OSError as error:
                measured.errors.append(str(error))
            number += streams

    clients = [asyncio.create_task(client(number)) for number in range(streams)]
    for _ in range(10):
        await asyncio.sleep(seconds / 10)
        if pid is not None:
            memory.append(resident_megabytes(pid))
    await asyncio.gather(*clients)
    return measured, memory


def resident_megabytes(pid: int) -> float:
    """Return the resident memory of a process."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def start_server(folder: Path) -> tuple[subprocess.Popen[str], int]:
    """Start `glm45 serve` on a free port and return it with the port."""
    command = [sys.executable, "-m", "glm45.cli", "serve", str(folder), "--port", "0", "engine.cache_tokens=32768"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert server.stdout
    line = server.stdout.readline()
    found = re.search(r":(\d+)$", line.strip())
    assert found, line
    return server, int(found[1])


def report(measured: Measured, memory: list[float], seconds: float, alone: float | None) -> None:
    """Print what was measured."""
    rate = measured.num_tokens / seconds
    print(f"{measured.num_answers} answers, {measured.num_tokens} tokens in {seconds:g} s, {rate:.0f} tokens/s")
    print(f"errors: {len(measured.errors)} {measured.errors[:3]}")
    for name, values in (("first token", measured.first_token), ("inter-token", measured.inter_token)):
        percentiles = np.percentile(np.array(values) * 1000, [50, 90, 99, 100])
        labels = zip(("p50", "p90", "p99", "max"), percentiles, strict=True)
        print(f"{name:12} ms ", "  ".join(f"{label} {value:.1f}" for label, value in labels))
    if memory:
        print("server memory, MB:", " ".join(f"{value:.0f}" for value in memory))
    if alone:
        print(f"engine without a server: {alone:.0f} tokens/s; over HTTP {rate / alone:.2f} of it")


def main() -> int:
    """Return 1 if any stream failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--url", help="an OpenAI-compatible server that is already running")
    options = parser.parse_args()
    if options.url:
        host, port = re.sub(r"^http://|/$", "", options.url).split(":")
        measured, memory = asyncio.run(soak(host, int(port), options.streams, options.seconds, None))
        report(measured, memory, options.seconds, None)
        return int(bool(measured.errors))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model, tokenizer = save_model(folder)
        server, port = start_server(folder)
        try:
            asyncio.run(soak("127.0.0.1", port, options.streams, 2, None))
            before = engine_alone(model, tokenizer, options.streams, 64)
            measured, memory = asyncio.run(soak("127.0.0.1", port, options.streams, options.seconds, server.pid))
            alone = (before + engine_alone(model, tokenizer, options.streams, 64)) / 2
        finally:
            server.terminate()
            server.wait()
    report(measured, memory, options.seconds, alone)
    return int(bool(measured.errors))


if __name__ == "__main__":
    sys.exit(main())
