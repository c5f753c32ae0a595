"""Rendering and parsing: megabytes a second, growth with length, and ratios against jinja2 and `renderers`.

One core; ratios are of times measured alternately in one process. Run with `make bench`, or

    python benchmarks/text.py [--rounds 7] [--json FILE]
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # figures are for one core

from glm45.text.chat import render, render_tokens
from glm45.text.parsing import StreamParser, parse, parse_ids
from glm45.text.tokenizer import Tokenizer, chat_template

TARGETS = {"plain": 20.0, "calls": 5.0, "renderer": 2.0}  # MB/s, MB/s, times jinja2's time
MEGABYTE = 1_000_000

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "filters": {"type": "object"}},
            },
        },
    }
]
PROSE = 'The quick brown fox, if a < b and "c" > d, jumps over 13 lazy dogs.\n'
CALL = (
    '<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Bonn "am Rhein"</arg_value>\n<arg_key>days</arg_key>\n'
    "<arg_value>3</arg_value>\n</tool_call>\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {
        "parser": benchmark_parser(options.rounds),
        "growth": benchmark_growth(options.rounds),
        "renderer": benchmark_renderer(options.rounds),
        "ids": benchmark_ids(options.rounds),
        "tokenizer": benchmark_training(),
    }
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def alternate(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the processor seconds of every contender in every round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    return {name: values[1:] for name, values in seconds.items()}


def filled(text: str, size: int) -> str:
    return (text * (size // len(text) + 1))[:size]


def in_call(argument: str) -> str:
    return f"<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>{argument}</arg_value>\n</tool_call>"


def stream(text: str, size: int) -> None:
    parser = StreamParser(TOOLS)
    for start in range(0, len(text), size):
        parser.feed(text[start : start + size])
    parser.finish()


def benchmark_parser(rounds: int) -> dict[str, float]:
    """Megabytes a second of text in one chunk, and in the chunks that a server sees."""
    prose, calls = filled(PROSE, MEGABYTE), CALL * (MEGABYTE // len(CALL))
    argument = in_call(prose)
    seconds = alternate(
        {
            "plain": lambda: parse(prose, TOOLS),
            "calls": lambda: parse(calls, TOOLS),
            "one long argument": lambda: parse(argument, TOOLS),
            "plain, chunks of 16": lambda: stream(prose, 16),
            "calls, chunks of 16": lambda: stream(calls, 16),
            "one long argument, chunks of 16": lambda: stream(argument, 16),
            "one long argument, chunks of 3": lambda: stream(argument, 3),
        },
        rounds,
    )
    speeds = {name: 1 / statistics.median(values) for name, values in seconds.items()}
    for name, speed in speeds.items():
        target = f" (target {TARGETS[name]:.0f})" if name in TARGETS else ""
        print(f"parse {name}: {speed:.1f} MB/s{target}")
    return speeds


def benchmark_growth(rounds: int) -> dict[str, float]:
    """Time per character of an argument of 1 MB over that of one of 10 kB: 1.0 is linear."""
    results = {}
    for chunk in (3, 16, MEGABYTE * 2):
        short, long = in_call(filled(PROSE, MEGABYTE // 100)), in_call(filled(PROSE, MEGABYTE))

        def many_short(chunk: int = chunk, short: str = short) -> None:
            for _ in range(100):
                stream(short, chunk)

        contenders = {"short": many_short, "long": lambda chunk=chunk, long=long: stream(long, chunk)}
        seconds = alternate(contenders, rounds)
        pairs = zip(seconds["long"], seconds["short"], strict=True)
        growth = statistics.median(long_time / short_time for long_time, short_time in pairs)
        name = f"chunks of {chunk}" if chunk < MEGABYTE else "one chunk"
        print(f"growth, {name}: {growth:.2f} times the time per character at 100 times the length")
        results[name] = growth
    return results


def conversation(turns: int) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": PROSE * 8}]
    for turn in range(turns):
        call = {"name": "get_weather", "arguments": {"city": PROSE, "days": turn, "filters": {"near": [1, 2, 3]}}}
        calls = [{"id": f"call_{turn}", "type": "function", "function": call}]
        messages += [
            {"role": "user", "content": PROSE * 3},
            {"role": "assistant", "content": "", "reasoning_content": PROSE * 4, "tool_calls": calls},
            {"role": "tool", "tool_call_id": f"call_{turn}", "content": PROSE * 4},
            {"role": "assistant", "content": PROSE * 4, "reasoning_content": PROSE},
        ]
    return messages


def benchmark_renderer(rounds: int) -> dict[str, float]:
    """Our time as a share of jinja2's on the exported template, in the environment that transformers gives it."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = _compile_jinja_template(chat_template())
    results = {}
    for turns, repeats in ((1, 200), (100, 5)):
        messages = conversation(turns)
        text = render(messages, tools=TOOLS)
        assert text == template.render(messages=messages, tools=TOOLS)

        def repeated(renderer: Callable[..., str], messages: list = messages, repeats: int = repeats) -> None:
            for _ in range(repeats):
                renderer(messages=messages, tools=TOOLS)

        seconds = alternate(
            {"ours": lambda r=repeated: r(render), "jinja2": lambda r=repeated: r(template.render)}, rounds
        )
        share = statistics.median(ours / peer for ours, peer in zip(seconds["ours"], seconds["jinja2"], strict=True))
        speed = len(text) * repeats / statistics.median(seconds["ours"]) / 1e6
        name = f"{turns} turns"
        print(f"render {name}: {speed:.0f} MB/s, {share:.2f} of jinja2's time (target {TARGETS['renderer']:.0f})")
        results[name] = share
    return results


def benchmark_ids(rounds: int) -> dict[str, float]:
    """Rendering to ids and parsing ids against `renderers`, with the same tokenizer through transformers."""
    from renderers.glm45 import GLM45Renderer
    from transformers import AutoTokenizer

    tokenizer = small_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        peer = GLM45Renderer(AutoTokenizer.from_pretrained(folder))
    messages = conversation(20)
    ids = render_tokens(messages, tokenizer, tools=TOOLS).ids
    assert ids == peer.render_ids(messages, tools=TOOLS)
    answer = render_tokens([messages[1], {**messages[2], "content": PROSE * 50}], tokenizer, end_turn=True)
    sampled = [index for index, produced in zip(answer.ids, answer.loss_mask, strict=True) if produced]
    contenders = {
        "render": (
            lambda: render_tokens(messages, tokenizer, tools=TOOLS),
            lambda: peer.render_ids(messages, tools=TOOLS),
        ),
        "parse": (
            lambda: parse_ids(sampled, tokenizer, TOOLS),
            lambda: peer.parse_response(sampled, tools=TOOLS),
        ),
    }
    results = {}
    for name, (ours, theirs) in contenders.items():
        seconds = alternate({"ours": ours, "renderers": theirs}, rounds)
        pairs = zip(seconds["ours"], seconds["renderers"], strict=True)
        results[name] = statistics.median(peer_time / our_time for our_time, peer_time in pairs)
        print(f"{name} ids: {results[name]:.1f} times the speed of renderers")
    return results


def sources() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("*.py"))]


def small_tokenizer() -> Tokenizer:
    return Tokenizer.train(sources(), 4096)


def benchmark_training() -> dict[str, float]:
    texts = sources()
    size = sum(len(text.encode()) for text in texts)
    started = time.perf_counter()
    Tokenizer.train(iter(texts), 8192)
    speed = size / (time.perf_counter() - started) / 1e6
    print(f"train a tokenizer of 8,192 on {size / 1e6:.1f} MB: {speed:.1f} MB/s")
    return {"MB/s": speed}


if __name__ == "__main__":
    main()
