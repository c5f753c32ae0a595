"""What the benchmarks count is what they say they count; programs for a GPU run here on a small shape."""

import asyncio
import importlib
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def program(monkeypatch):
    """Return a function that imports a benchmark."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_the_servers_rate_counts_what_came_in_time(program):
    """Tokens of an answer that goes on after the end of the measurement are left out."""
    serving = program("serving")

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for ids in (b"[1]", b"[2,3]", b"[]", b"late", b"[4,5,6]"):
            if ids == b"late":
                await asyncio.sleep(1.0)
            else:
                writer.write(b'data: {"choices":[{"delta":{},"token_ids":' + ids + b"}]}\n\n")
                await writer.drain()
        writer.write(b"data: [DONE]\n\n")
        writer.close()

    async def run():
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            measured = serving.Measured(until=time.perf_counter() + 0.5)
            await serving.one_answer(*server.sockets[0].getsockname(), 0, measured)
            return measured

    measured = asyncio.run(run())
    assert (measured.num_tokens, measured.num_answers, measured.errors) == (3, 1, [])


@pytest.mark.slow
def test_the_gpu_decoding_benchmark_runs(program, monkeypatch, capsys):
    pytest.importorskip("transformers", reason="the peer is not installed")
    small = ["--preset", "pico", "--device", "cpu", "--batches", "1,3", "--tokens", "4", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["gpu_decode", *small, "--copy-bytes", "1000000"])
    program("gpu_decode").main()
    out = capsys.readouterr().out
    assert "batch 3: " in out
    assert "of the copy bandwidth" in out


def test_a_peer_of_the_decoding_benchmark_comes_from_the_environment(program, monkeypatch):
    monkeypatch.setenv("GLM45_PEER", "vllm=http://x:1 llama=http://y:2")
    options = program("decode").build_parser().parse_args(["--endpoint", "other=http://z:3"])
    assert options.endpoint == ["vllm=http://x:1", "llama=http://y:2", "other=http://z:3"]
