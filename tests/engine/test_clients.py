"""One contract for every engine client, passed by the engine itself and by our server over HTTP.

The tests over `SERVERS` hold for any model: point them at a real server as docs/engine.md says (GLM45_SGLANG_URL, or
GLM45_VLLM_URL with GLM45_VLLM_MODEL; GLM45_CHECKPOINT is a folder that the server may load weights from).
"""

import asyncio
import copy
import dataclasses
import json
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
REMOTE = {"remote sglang": "GLM45_SGLANG_URL", "remote vllm": "GLM45_VLLM_URL"}
SERVERS = [
    *KINDS,
    *(
        pytest.param(kind, marks=pytest.mark.skipif(not os.environ.get(name), reason=f"set {name}"))
        for kind, name in REMOTE.items()
    ),
]
GREEDY = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}


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

    def client_of(kind):
        from glm45.serving.app import build_app
        from glm45.serving.service import Service

        if kind == "in-process":
            return InProcessClient(engine)
        if kind in REMOTE:
            transport, url = None, os.environ[REMOTE[kind]]
        else:
            service = Service(engine, tokenizer, "tiny", is_admin=True)
            transport, url = httpx.ASGITransport(build_app(service), raise_app_exceptions=False), "http://127.0.0.1"
        if kind.endswith("sglang"):
            return SglangClient(url, transport=transport)
        name = os.environ["GLM45_VLLM_MODEL"] if kind in REMOTE else "tiny"
        return VllmClient(url, name, transport=transport)

    return client_of


@pytest.fixture
def checkpoint(small_model, tmp_path):
    """Return a function that gives a folder which a kind of server may load weights from."""

    def checkpoint(kind):
        if kind not in REMOTE:
            hub.save(small_model, tmp_path / "checkpoint")
        elif not os.environ.get("GLM45_CHECKPOINT"):
            pytest.skip("set GLM45_CHECKPOINT")
        return os.environ["GLM45_CHECKPOINT"] if kind in REMOTE else tmp_path / "checkpoint"

    return checkpoint


def run(client, *calls):
    async def run():
        try:
            return [await call(client) for call in calls]
        finally:
            await client.close()

    return asyncio.run(run())


def generate(**params):
    return lambda client: client.generate(PROMPT, SamplingParams(**params))


@pytest.mark.parametrize("kind", SERVERS)
def test_greedy_is_repeatable_and_samples_come_in_order(client_of, kind):
    first, again, several, healthy = run(
        client_of(kind),
        generate(**GREEDY),
        generate(**GREEDY),
        generate(n=3, max_tokens=5, temperature=0.7, top_p=0.9, top_k=50, min_p=0.01, ignore_eos=True, seed=1),
        lambda client: client.is_healthy(),
    )
    assert healthy
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    assert (len(first[0].token_ids), first[0].finish_reason) == (8, "length")
    assert [completion.index for completion in several] == [0, 1, 2]
    for completion in first + several:
        assert len(completion.logprobs) == len(completion.token_ids) == len(completion.weight_versions)
        assert all(logprob <= 1e-4 for logprob in completion.logprobs)


@pytest.mark.parametrize("kind", SERVERS)
def test_top_logprobs_are_by_token(client_of, kind):
    [[top]] = run(client_of(kind), generate(**GREEDY, top_logprobs=3))
    assert len(top.top_logprobs) == 8
    for token, logprob, likely in zip(top.token_ids, top.logprobs, top.top_logprobs, strict=True):
        assert len(likely) == 3
        assert max(likely.values()) == pytest.approx(likely[token]) == pytest.approx(logprob, abs=1e-3)


@pytest.mark.parametrize("kind", SERVERS)
def test_stop_tokens_and_stop_strings_end_a_sample(client_of, kind):
    [[plain]] = run(client_of(kind), generate(**GREEDY))
    stop, words = plain.token_ids[2], Constraint(grammar='root ::= "red green blue"')
    [by_token], [by_text] = run(
        client_of(kind),
        generate(**GREEDY, stop_token_ids=(stop,)),
        generate(max_tokens=40, stop=("green", "never"), constraint=words),
    )
    assert (by_token.finish_reason, by_token.stop_reason) == ("stop", stop)
    assert by_token.token_ids == plain.token_ids[: plain.token_ids.index(stop) + 1]
    assert (by_text.finish_reason, by_text.stop_reason, by_text.text) == ("stop", "green", "red ")


@pytest.mark.parametrize("kind", SERVERS)
def test_bias_and_minimum_length_hold(client_of, kind):
    [[plain]] = run(client_of(kind), generate(**GREEDY))
    first = plain.token_ids[0]
    wanted = next(token for token in (70, 71) if token != first)
    [banned], [pushed], [long] = run(
        client_of(kind),
        generate(**GREEDY, logit_bias={first: -100}),
        generate(**GREEDY, logit_bias={wanted: 100}),
        generate(max_tokens=8, temperature=0.0, min_tokens=3, stop_token_ids=(first,)),
    )
    assert first not in banned.token_ids
    assert set(pushed.token_ids) == {wanted}
    assert len(long.token_ids) >= 3
    assert first not in long.token_ids[:2]


@pytest.mark.parametrize("kind", SERVERS)
def test_constraints_hold_from_the_first_token_on(client_of, kind):
    schema = Constraint(json_schema={"enum": ["red", "green"]}, reasoning=False)
    grammar = Constraint(grammar='root ::= "yes" | "no"')
    params = {"max_tokens": 40, "seed": 1, "n": 3, "detokenize": True}
    red, yes = run(client_of(kind), *(generate(**params, constraint=each) for each in (schema, grammar)))
    assert all(completion.text.startswith(('"red"', '"green"')) for completion in red)
    assert all(completion.text.startswith(("yes", "no")) for completion in yes)


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


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_logprobs(client_of, small_model, forward_logprobs, kind):
    [[completion]] = run(client_of(kind), generate(max_tokens=1, prompt_logprobs=True))
    assert completion.prompt_logprobs[0] is None
    reference = forward_logprobs(small_model, PROMPT[:1], PROMPT[1:])
    torch.testing.assert_close(torch.tensor(completion.prompt_logprobs[1:]), reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", SERVERS)
def test_prompt_logprobs_are_those_of_greedy_samples(client_of, kind):
    """What was sampled has the same log-probabilities when it stands in the prompt."""
    [[plain]] = run(client_of(kind), generate(**GREEDY))

    async def scored(client):
        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=True)
        return await client.generate([*PROMPT, *plain.token_ids], params)

    [[completion]] = run(client_of(kind), scored)
    assert len(completion.prompt_logprobs) == len(PROMPT) + 8
    assert completion.prompt_logprobs[len(PROMPT) :] == pytest.approx(plain.logprobs, abs=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_new_weights_are_served(client_of, small_model, forward_logprobs, tmp_path, kind):
    changed = copy.deepcopy(small_model)
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.5)
    hub.save(changed, tmp_path / "checkpoint")
    _, [after] = run(
        client_of(kind), lambda client: client.update_weights(tmp_path / "checkpoint"), generate(max_tokens=4, seed=1)
    )
    reference = forward_logprobs(changed, PROMPT, after.token_ids)
    torch.testing.assert_close(torch.tensor(after.logprobs), reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", SERVERS)
def test_tokens_carry_the_version_of_their_weights(client_of, checkpoint, kind):
    version, [after] = run(
        client_of(kind), lambda client: client.update_weights(checkpoint(kind), version=5), generate(**GREEDY)
    )
    assert version == 5
    assert after.weight_versions == [5] * 8


@pytest.mark.parametrize("kind", ["in-process", "sglang"])
def test_a_version_out_of_range_is_a_value_error(client_of, checkpoint, kind):
    async def refused(client):
        with pytest.raises(ValueError, match="out of range"):
            await client.update_weights(checkpoint(kind), version=2**70)

    run(client_of(kind), refused)


@pytest.mark.parametrize("kind", SERVERS)
def test_pause_holds_and_resume_lets_go(client_of, kind):
    async def held(client):
        await client.pause()
        task = asyncio.ensure_future(client.generate(PROMPT, SamplingParams(max_tokens=2, ignore_eos=True)))
        await asyncio.sleep(0.1)
        assert not task.done()
        await client.resume()
        return await task

    [[completion]] = run(client_of(kind), held)
    assert completion.finish_reason == "length"


@pytest.mark.parametrize("kind", SERVERS)
def test_new_weights_in_a_pause_meet_requests_under_way(client_of, checkpoint, kind):
    """Pause, update, resume: what a trainer does while samples are being written."""

    async def updated(client):
        task = asyncio.ensure_future(client.generate(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True)))
        await asyncio.sleep(0.05)
        await client.pause()
        async with asyncio.timeout(60):
            await client.update_weights(checkpoint(kind))
        await client.resume()
        return await task

    [[completion]] = run(client_of(kind), updated)
    assert (len(completion.token_ids), completion.finish_reason) == (400, "length")


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
        with pytest.raises(ValueError, match="set reasoning=False"):
            await client.generate(PROMPT, SamplingParams(constraint=Constraint(json_schema={})))

    for kind in ("sglang", "vllm"):
        run(client_of(kind), refused)


def test_the_sglang_client_sends_a_schema_as_text():
    """As SGLang reads it; there is none in the test environment."""
    asked = []

    def answer(request):
        asked.append(json.loads(request.content))
        return httpx.Response(200, json=[])

    client = SglangClient("http://x", transport=httpx.MockTransport(answer))
    run(client, generate(constraint=Constraint(json_schema={"enum": [1]}, reasoning=False)))
    assert asked[0]["sampling_params"]["json_schema"] == '{"enum": [1]}'


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
