"""One contract for every engine client, passed by the engine itself and by our server over HTTP.

Point it at a real server with GLM45_SGLANG_URL=http://host:port, or GLM45_VLLM_URL and GLM45_VLLM_MODEL, and set
GLM45_CHECKPOINT to a folder that the server may load weights from.
"""

import asyncio
import copy
import dataclasses
import os

import httpx
import pytest
import torch

from glm45.engine.clients import InProcessClient, SglangClient, VllmClient
from glm45.engine.engine import Engine, EngineConfig
from glm45.engine.request import Constraint, SamplingParams
from glm45.model import hub
from glm45.model.config import preset
from glm45.model.transformer import Glm45
from glm45.text.tokenizer import Tokenizer

PROMPT = [65, 66, 67, 68, 69, 70]
KINDS = ["in-process", "sglang", "vllm"]
REMOTE = {"sglang": "GLM45_SGLANG_URL", "vllm": "GLM45_VLLM_URL"}
remote_only = [
    pytest.param(kind, marks=pytest.mark.skipif(not os.environ.get(REMOTE[kind]), reason=f"set {REMOTE[kind]}"))
    for kind in REMOTE
]


@pytest.fixture(scope="module")
def tokenizer():
    with pytest.warns(UserWarning, match="no more pairs"):
        return Tokenizer.train(["one two three"] * 4, 600)


@pytest.fixture(scope="module")
def small_model(tokenizer):
    shape = {"vocab_size": tokenizer.padded_vocab_size, "eos_token_id": tokenizer.eos_token_ids}
    model = Glm45(dataclasses.replace(preset("pico"), **shape), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.dim() == 1 else 3.0)
    return model


@pytest.fixture
def engine(small_model, tokenizer):
    with Engine(copy.deepcopy(small_model), tokenizer, EngineConfig()) as engine:
        yield engine


@pytest.fixture
def client_of(engine, tokenizer):
    """Build a client of each kind; without an address, HTTP ends in our own server, in this process."""

    def client_of(kind, url=None):
        from glm45.serving.app import build_app
        from glm45.serving.service import Service

        if kind == "in-process":
            return InProcessClient(engine)
        transport = None
        if url is None:
            service = Service(engine, tokenizer, "tiny", is_admin=True)
            transport, url = httpx.ASGITransport(build_app(service), raise_app_exceptions=False), "http://127.0.0.1"
        if kind == "sglang":
            return SglangClient(url, transport=transport)
        return VllmClient(url, os.environ.get("GLM45_VLLM_MODEL", "tiny"), transport=transport)

    return client_of


def run(client, *calls):
    async def run():
        try:
            return [await call(client) for call in calls]
        finally:
            await client.close()

    return asyncio.run(run())


def generate(**params):
    return lambda client: client.generate(PROMPT, SamplingParams(**params))


def check_generation(client, num_top=3):
    """What every server must do, whatever its model."""
    greedy = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    first, again, several, top, healthy = run(
        client,
        generate(**greedy),
        generate(**greedy),
        generate(n=3, max_tokens=5, temperature=0.7, top_p=0.9, top_k=50, ignore_eos=True, seed=1),
        generate(**greedy, top_logprobs=num_top),
        lambda client: client.is_healthy(),
    )
    assert healthy
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    assert (len(first[0].token_ids), first[0].finish_reason) == (8, "length")
    assert [completion.index for completion in several] == [0, 1, 2]
    for completion in first + several + top:
        assert len(completion.logprobs) == len(completion.token_ids) == len(completion.weight_versions)
        assert all(logprob <= 1e-4 for logprob in completion.logprobs)
    for token, logprob, likely in zip(top[0].token_ids, top[0].logprobs, top[0].top_logprobs, strict=num_top > 0):
        assert max(likely.values()) == pytest.approx(likely[token]) == pytest.approx(logprob, abs=1e-3)
    stop = first[0].token_ids[2]
    [[stopped]] = run_again(client, generate(**(greedy | {"stop_token_ids": (stop,)})))
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert stopped.token_ids[-1] == stop


def run_again(client, *calls):
    """A closed client is not reopened: run with a fresh one of the same address."""
    return run(client.again(), *calls)


@pytest.mark.parametrize("kind", KINDS)
def test_generation(client_of, kind):
    client = client_of(kind)
    client.again = lambda: client_of(kind)
    check_generation(client, num_top=0 if kind == "vllm" else 3)  # our completions name tokens by text, not by id


@pytest.mark.parametrize("kind", remote_only)
def test_generation_of_a_real_server(client_of, kind):
    client = client_of(kind, os.environ[REMOTE[kind]])
    client.again = lambda: client_of(kind, os.environ[REMOTE[kind]])
    check_generation(client)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_and_logprobs_are_those_of_the_engine(client_of, small_model, forward_logprobs, kind, temperature):
    params = SamplingParams(n=2, max_tokens=12, seed=7, temperature=temperature)
    [expected] = run(client_of("in-process"), lambda client: client.generate(PROMPT, params))
    [completions] = run(client_of(kind), lambda client: client.generate(PROMPT, params))
    for completion, same in zip(completions, expected, strict=True):
        assert completion.token_ids == same.token_ids
        assert completion.finish_reason == same.finish_reason
        reference = forward_logprobs(small_model, PROMPT, completion.token_ids, temperature)
        torch.testing.assert_close(torch.tensor(completion.logprobs), reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["in-process", "sglang"])
def test_prompt_logprobs(client_of, small_model, forward_logprobs, kind):
    [[completion]] = run(client_of(kind), generate(max_tokens=1, prompt_logprobs=True))
    assert completion.prompt_logprobs[0] is None
    reference = forward_logprobs(small_model, PROMPT[:1], PROMPT[1:])
    torch.testing.assert_close(torch.tensor(completion.prompt_logprobs[1:]), reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["in-process", "sglang"])
def test_new_weights_are_served_and_marked(client_of, small_model, forward_logprobs, tmp_path, kind):
    changed = copy.deepcopy(small_model)
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.5)
    hub.save(changed, tmp_path / "checkpoint")
    before, version, [after] = run(
        client_of(kind),
        generate(max_tokens=4, seed=1),
        lambda client: client.update_weights(tmp_path / "checkpoint", version=5),
        generate(max_tokens=4, seed=1),
    )
    assert version == 5
    assert before[0].weight_versions == [0] * 4
    assert after.weight_versions == [5] * 4
    reference = forward_logprobs(changed, PROMPT, after.token_ids)
    torch.testing.assert_close(torch.tensor(after.logprobs), reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["in-process", "sglang"])
def test_pause_holds_and_resume_lets_go(client_of, kind):
    async def held(client):
        await client.pause()
        task = asyncio.ensure_future(client.generate(PROMPT, SamplingParams(max_tokens=2)))
        await asyncio.sleep(0.1)
        assert not task.done()
        await client.resume()
        return await task

    [[completion]] = run(client_of(kind), held)
    assert completion.finish_reason == "length"


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_served_is_a_value_error_with_the_reason(client_of, kind):
    async def refused(client):
        with pytest.raises(ValueError, match="99999"):
            await client.generate([99_999], SamplingParams(max_tokens=2))

    run(client_of(kind), refused)


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
def test_a_server_that_is_gone_is_not_healthy(kind):
    def refuse(request):
        raise httpx.ConnectError("nobody there")

    transport = httpx.MockTransport(refuse)
    client = SglangClient("http://x", transport=transport)
    if kind == "vllm":
        client = VllmClient("http://x", "m", transport=transport)
    assert run(client, lambda client: client.is_healthy()) == [False]


def test_over_http_weights_are_a_folder_and_grammars_text(client_of):
    async def refused(client):
        with pytest.raises(ValueError, match="save them first"):
            await client.update_weights({})
        with pytest.raises(ValueError, match="a JSON schema or a grammar"):
            await client.generate(PROMPT, SamplingParams(constraint=Constraint(json_object=True)))

    run(client_of("sglang"), refused)


def test_the_vllm_client_asks_what_vllm_documents(tmp_path):
    """There is no vLLM in the test environment: paths and bodies are pinned here."""
    asked = []

    def answer(request):
        asked.append((request.method, request.url.raw_path.decode(), request.content))
        return httpx.Response(200, json={})

    client = VllmClient("http://x", "m", transport=httpx.MockTransport(answer))
    run(client, lambda c: c.pause(), lambda c: c.update_weights(tmp_path), lambda c: c.resume())
    paths = [path for _, path, _ in asked]
    assert paths == ["/pause?mode=keep", "/collective_rpc", "/reset_prefix_cache", "/resume"]
    assert b'"reload_weights"' in asked[1][2]
    assert str(tmp_path).encode() in asked[1][2]
    assert client.weight_version == 1
