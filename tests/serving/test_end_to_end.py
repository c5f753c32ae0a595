"""The real engine behind the server: what clients get is what the model says, alone or in a crowd."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import openai
import pytest
import torch

from glm45.engine.engine import Engine, EngineConfig
from glm45.model import hub
from glm45.serving.limits import Limits
from glm45.serving.service import Service

pytestmark = pytest.mark.slow
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
MESSAGES = [{"role": "user", "content": "What is the weather in Paris?"}]
OFF = {"enable_thinking": False}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def real(tiny_model, tokenizer, start_server):
    """A server of a tiny random model on the real engine; at the end no block is in use."""
    with Engine(tiny_model, tokenizer, EngineConfig(cache_tokens=32_768)) as engine:
        with start_server(Service(engine, tokenizer, "tiny", limits=Limits(shutdown_seconds=2.0))) as server:
            yield server
        assert engine.stats()["blocks_in_use"] == engine.stats()["running"] == engine.stats()["waiting"] == 0


@pytest.fixture
def oai(real):
    with openai.OpenAI(base_url=real.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def ask(oai, **more):
    return oai.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, "max_tokens": 24, **more})


def test_a_seed_gives_the_same_answer_alone_and_in_a_full_batch(real, oai):
    """Forty other conversations around it change nothing, streamed or not."""
    wanted = {"seed": 11, "logprobs": True, "extra_body": OFF}
    alone = ask(oai, **wanted)

    async def crowd():
        async with openai.AsyncOpenAI(base_url=real.url + "/v1", api_key="none", max_retries=0, timeout=120) as client:
            create = client.chat.completions.create
            others = [
                create(model="tiny", messages=[{"role": "user", "content": f"{i} " * i}], max_tokens=40, n=1 + i % 2)
                for i in range(1, 41)
            ]
            same = create(model="tiny", messages=MESSAGES, max_tokens=24, **wanted)
            return (await asyncio.gather(*others[:20], same, *others[20:]))[20]

    crowded = asyncio.run(crowd())
    assert crowded.choices[0].message == alone.choices[0].message
    pairs = zip(crowded.choices[0].logprobs.content, alone.choices[0].logprobs.content, strict=True)
    assert all(abs(a.logprob - b.logprob) < 1e-5 for a, b in pairs)
    streamed = ask(oai, stream=True, **wanted)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == alone.choices[0].message.content


def test_logprobs_are_those_of_the_training_forward(oai, tiny_model, tokenizer):
    """What clients read equals log softmax of the model's own logits."""
    body = {"return_token_ids": True}
    answer = oai.completions.create(
        model="tiny", prompt=[5, 6, 7], max_tokens=12, logprobs=0, temperature=0.7, seed=3, extra_body=body
    )
    choice = answer.choices[0]
    ids = choice.token_ids
    with torch.no_grad():
        logits = tiny_model(torch.tensor([[5, 6, 7, *ids]])).logits_BTV[0].float() / 0.7
    expected = torch.log_softmax(logits, -1)[range(2, 2 + len(ids)), ids]
    torch.testing.assert_close(torch.tensor(choice.logprobs.token_logprobs), expected, atol=1e-5, rtol=0)


def test_the_prefix_cache_is_told(oai):
    """Asked again, most of the prompt comes from the cache and usage says so; the answer is the same."""
    messages = [{"role": "user", "content": "The quick brown fox jumps over the lazy dog. " * 8}]
    first = ask(oai, messages=messages, seed=1)
    again = ask(oai, messages=messages, seed=1)
    assert again.usage.prompt_tokens_details.cached_tokens >= again.usage.prompt_tokens - 17
    assert again.choices[0].message == first.choices[0].message


def test_required_calls_follow_their_schema(oai):
    """Even a random model must call: a known name, all arguments, of their types."""
    num_complete = 0
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        for seed in range(3):
            answer = ask(
                oai,
                tools=[TOOL],
                tool_choice=choice,
                seed=seed,
                max_tokens=600,
                extra_body=OFF,
                parallel_tool_calls=False,
                temperature=0.3,
            )
            reason = answer.choices[0].finish_reason
            if reason == "length":
                continue  # a random model need not come to an end
            assert reason == "tool_calls"
            arguments = json.loads(answer.choices[0].message.tool_calls[0].function.arguments)
            assert isinstance(arguments["city"], str)
            assert isinstance(arguments["days"], int)
            num_complete += 1
    assert num_complete >= 2


def test_an_answer_follows_its_schema(oai):
    """response_format gives JSON of the schema, streamed too."""
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "colour": {"enum": ["red", "green"]}},
        "required": ["ok", "colour"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for seed in range(3):
        chunks = ask(oai, response_format=form, seed=seed, max_tokens=200, extra_body=OFF, stream=True)
        value = json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
        assert set(value) == {"ok", "colour"}
        assert value["colour"] in ("red", "green")


def test_a_schema_that_cannot_be_enforced_is_refused(oai):
    """A wrong schema is the client's mistake."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    with pytest.raises(openai.BadRequestError, match="cannot be enforced"):
        ask(oai, response_format=form)


JUNK = [5, -1.5, "x", "\ud800", [], {}, [1], [{}], {"a": 1}, {"type": "integer"}, ["string", "null"], True]
KEYWORDS = ["type", "properties", "required", "items", "enum", "const", "anyOf", "allOf", "$ref", "$defs", "pattern"]
KEYWORDS += ["format", "minimum", "maxLength", "minItems", "maxItems", "additionalProperties", "prefixItems"]


def test_no_schema_however_malformed_makes_a_server_error(real):
    """Every keyword with every kind of value, as a tool's parameters, within them, and as the form of the answer."""

    async def everything():
        async with httpx.AsyncClient(base_url=real.url, timeout=120) as http:

            async def post(more):
                body = {"messages": MESSAGES, "max_tokens": 3, **OFF, **more}
                return more, await http.post("/v1/chat/completions", content=json.dumps(body), headers=JSON)

            for keyword in KEYWORDS:
                asked = []
                for value in JUNK:
                    schema = {keyword: value}
                    for parameters in (schema, {"properties": {"a": schema}}):
                        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
                        asked.append({"tools": [tool], "tool_choice": "required"})
                    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
                    asked.append({"response_format": form})
                for more, response in await asyncio.gather(*map(post, asked)):
                    assert response.status_code in (200, 400), (more, response.text)
            for grammar in (
                "",
                "root",
                "root ::=",
                'root ::= root "a"',
                'root ::= "a" | b',
                "root ::= [",
                "x ::= (" * 999,
            ):
                response = await http.post("/generate", json={"text": "a", "sampling_params": {"ebnf": grammar}})
                assert response.status_code in (200, 400), (grammar, response.text)

    asyncio.run(everything())


def test_clients_that_leave_give_their_blocks_back(real):
    """A hundred clients leave at any moment: no block and no sequence stays."""

    async def leave(http, number):
        request = {"messages": MESSAGES, "max_tokens": 400, "stream": number % 2 == 0, "n": 1 + number % 3}
        try:
            async with asyncio.timeout(0.02 * (number % 20)):
                await http.post("/v1/chat/completions", json={**request, "ignore_eos": True})
        except (TimeoutError, httpx.HTTPError):
            pass

    async def everyone():
        async with httpx.AsyncClient(base_url=real.url, timeout=60) as http:
            await asyncio.gather(*(leave(http, number) for number in range(100)))

    asyncio.run(everyone())
    stats = real.service.engine.stats
    deadline = time.monotonic() + 120
    while stats()["blocks_in_use"] or stats()["running"] or stats()["waiting"]:
        assert time.monotonic() < deadline, stats()
        time.sleep(0.05)


@pytest.fixture
def process(tiny_model, tokenizer, tmp_path):
    """Return a function that starts `glm45 serve` on a checkpoint and gives the process and its address."""
    hub.save(tiny_model, tmp_path / "checkpoint")
    tokenizer.save(tmp_path / "checkpoint")
    started = []

    def start(port=0):
        command = [sys.executable, "-m", "glm45.cli", "serve", str(tmp_path / "checkpoint"), "--port", str(port)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        started.append(process)
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, line + process.stdout.read()
        return process, int(found[1])

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


async def load(port, num_clients, num_tokens, during):
    """Stream to many clients, do something once each hears, and return what each got: whether [DONE] came."""
    num_hearing, everyone_hears = 0, asyncio.Event()

    async def one(http):
        nonlocal num_hearing
        request = {"messages": MESSAGES, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        lines = []
        try:
            async with http.stream("POST", "/v1/chat/completions", json=request) as response:
                async for line in response.aiter_lines():
                    num_hearing += not lines
                    if num_hearing == num_clients:
                        everyone_hears.set()
                    lines.append(line)
        except httpx.HTTPError:
            return "broken"
        return "done" if "data: [DONE]" in lines else "cut"

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        tasks = [asyncio.create_task(one(http)) for _ in range(num_clients)]
        await everyone_hears.wait()
        during()
        return await asyncio.gather(*tasks)


def test_terminated_under_load_it_finishes_and_killed_it_can_start_again(process):
    """SIGTERM: every stream ends whole and the status is 0. SIGKILL: clients notice, and the port serves again."""
    server, port = process()
    results = asyncio.run(load(port, 16, 300, lambda: server.send_signal(signal.SIGTERM)))
    assert set(results) == {"done"}
    assert server.wait(120) == 0
    server, port = process(port)
    results = asyncio.run(load(port, 16, 1500, server.kill))
    assert "done" not in results
    server.wait(120)
    server, port = process(port)
    assert asyncio.run(load(port, 4, 20, lambda: None)) == ["done"] * 4
