"""The engine samples from exactly the model that is trained, whatever else it is doing."""

import asyncio
import copy
import gc
import itertools
import threading
import tracemalloc
from functools import partial

import pytest
import torch

from glm45.engine.engine import Engine, EngineConfig
from glm45.engine.request import SamplingParams
from glm45.kernels import decode
from glm45.model.config import preset
from glm45.model.transformer import Glm45

NATIVE = pytest.param("native", marks=pytest.mark.skipif(not decode.is_available(False), reason="no native kernels"))
BACKENDS = ["model", NATIVE]
TIGHT = {"cache_tokens": 160, "max_num_batched_tokens": 20, "max_num_seqs": 5}
"""Ten blocks and small chunks: requests are chunked, preempted and computed again."""


class Letters:
    """A tokenizer of one character a token."""

    eos_token_ids = ()

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids)


def tokens_of(results):
    return [[completion.token_ids for completion in completions] for completions in results]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("config", "temperature"),
    [
        ({}, 1.0),
        (TIGHT, 0.7),
        ({"prefix_cache": False, "max_num_batched_tokens": 256}, 0.0),
        ({"num_drafts": 3}, 1.0),
        ({**TIGHT, "num_drafts": 2}, 0.7),
    ],
)
def test_logprobs_are_those_of_the_training_forward(
    build, model, prompts, forward_logprobs, backend, config, temperature
):
    engine = build(backend=backend, **config)
    results = engine.generate(prompts, SamplingParams(n=3, max_tokens=24, seed=5, temperature=temperature))
    for prompt, completions in zip(prompts, results, strict=True):
        for completion in completions:
            expected = forward_logprobs(model, prompt, completion.token_ids, temperature)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)
    if "cache_tokens" in config:
        assert engine.stats()["preemptions"] > 0


CUT = {"top_p": 0.9, "top_k": 50, "min_p": 0.01}
SHAPED = {"repetition_penalty": 1.3, "logit_bias": {5: 2.0, 7: float("-inf")}, "min_tokens": 5, "top_logprobs": 2}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_drafts", "more"), [(0, {}), (2, {}), (0, CUT), (2, CUT), (0, SHAPED), (2, SHAPED)])
def test_a_request_alone_and_in_a_full_batch_give_the_same(build, prompts, backend, num_drafts, more):
    """On the native backend log-probabilities, too, bit for bit; the crowd asks for other things."""
    params = SamplingParams(n=2, max_tokens=20, seed=9, **more)
    crowd = [SamplingParams(n=2, max_tokens=20, seed=i, **({}, CUT, SHAPED)[i % 3]) for i in range(len(prompts))]
    lonely = build(backend=backend, num_drafts=num_drafts, prefix_cache=False)
    alone = [lonely.generate([prompt], params)[0] for prompt in prompts]
    crowded = build(backend=backend, num_drafts=num_drafts, **TIGHT)
    together = crowded.generate([*prompts, *prompts], [params] * len(prompts) + crowd)[: len(prompts)]
    assert tokens_of(together) == tokens_of(alone)
    assert len({tuple(tokens) for tokens in tokens_of(alone)[0]}) == 2  # samples of one prompt differ
    if backend == "native":
        assert [[c.logprobs for c in few] for few in together] == [[c.logprobs for c in few] for few in alone]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_does_not_grow_with_the_number_of_requests(build, prompts, backend):
    engine = build(tokenizer=Letters(), backend=backend, num_drafts=1, cache_tokens=1024)
    params = SamplingParams(n=2, max_tokens=4, detokenize=True, top_logprobs=2)

    def ask(count):
        for start in range(0, count, 30):
            some = [[(start + i) % 320, *prompts[(start + i) % len(prompts)]] for i in range(30)]
            engine.generate(some, params)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        levels = [ask(300) for _ in range(3)]  # after the first, every block of the cache has been used
        growth = min(later - earlier for earlier, later in itertools.pairwise(levels))  # torch, too, keeps things once
        assert growth < 30_000, "more than 100 bytes a request"
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_drafts_change_nothing(build, prompts, backend):
    params = SamplingParams(max_tokens=30, temperature=0)
    plain = tokens_of(build(backend=backend).generate(prompts, params))
    drafting = build(backend=backend, num_drafts=3)
    assert tokens_of(drafting.generate(prompts, params)) == plain
    assert drafting.stats()["drafted_tokens"] > 0


def test_prompt_and_top_logprobs(build, model, prompts, forward_logprobs):
    engine = build(max_num_batched_tokens=8, max_num_seqs=8)
    params = SamplingParams(max_tokens=4, prompt_logprobs=True, top_logprobs=3, temperature=0)
    for _ in range(2):  # the second time the prompt is in the prefix cache, which must not be used
        [[completion]] = engine.generate([prompts[3]], params)
        expected = forward_logprobs(model, prompts[3][:1], prompts[3][1:])
        assert completion.prompt_logprobs[0] is None
        torch.testing.assert_close(torch.tensor(completion.prompt_logprobs[1:]), expected, atol=1e-5, rtol=0)
    for token, logprob, top in zip(completion.token_ids, completion.logprobs, completion.top_logprobs, strict=True):
        assert next(iter(top)) == token
        assert top[token] == pytest.approx(logprob)
        assert list(top.values()) == sorted(top.values(), reverse=True)


def test_a_scored_prompt_that_is_preempted_is_scored_to_its_end(build, model, prompts, forward_logprobs, monkeypatch):
    """Meanwhile the cache holds more of it than was scored, of another request."""
    engine = build(max_num_batched_tokens=16, max_num_seqs=8)
    engine.generate([prompts[3]], SamplingParams(max_tokens=1))
    step, scheduler = engine._core.step, engine._core.scheduler

    def preempting(admit):
        step(admit)
        if scheduler.running and not scheduler.num_preemptions:
            scheduler.preempt(scheduler.running[0])

    monkeypatch.setattr(engine._core, "step", preempting)
    [[completion]] = engine.generate([prompts[3]], SamplingParams(max_tokens=1, prompt_logprobs=True))
    assert scheduler.num_preemptions == 1
    expected = forward_logprobs(model, prompts[3][:1], prompts[3][1:])
    torch.testing.assert_close(torch.tensor(completion.prompt_logprobs[1:]), expected, atol=1e-5, rtol=0)


def test_prompt_tokens_are_counted_once_for_all_samples(build, prompts):
    engine = build(max_num_seqs=2)
    engine.generate([prompts[3]], SamplingParams(n=5, max_tokens=4))
    assert engine.stats()["prompt_tokens"] == len(prompts[3])


def test_the_longest_sample_is_what_context_and_cache_hold(build):
    for engine in (build(cache_tokens=160), build(cache_tokens=160, num_drafts=2), build(max_length=40)):
        room = engine.longest_sample - 3
        [[completion]] = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=room, ignore_eos=True))
        assert len(completion.token_ids) == room
    with pytest.raises(ValueError, match="raise cache_tokens"):
        build(cache_tokens=160).generate([[1, 2, 3]], SamplingParams(max_tokens=157))


def test_a_known_prefix_is_not_computed_again(build, prompts):
    engine = build()
    params = SamplingParams(max_tokens=4, temperature=0)
    [[first]] = engine.generate([prompts[3]], params)
    [[second]] = engine.generate([prompts[3]], params)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 48)
    assert second.token_ids == first.token_ids


def test_stop_ids_strings_and_lengths(build, prompts):
    engine = build(tokenizer=Letters())
    [[plain]] = engine.generate([prompts[1]], SamplingParams(max_tokens=12, seed=3, detokenize=True))
    third = plain.token_ids[2]
    [[stopped]] = engine.generate([prompts[1]], SamplingParams(max_tokens=12, seed=3, stop_token_ids=(third,)))
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", third)
    assert stopped.token_ids == plain.token_ids[: plain.token_ids.index(third) + 1]
    needle = plain.text[4:6]
    [[cut]] = engine.generate([prompts[1]], SamplingParams(max_tokens=12, seed=3, stop=(needle,)))
    assert (cut.finish_reason, cut.stop_reason) == ("stop", needle)
    assert cut.text == plain.text[: plain.text.index(needle)]
    assert cut.token_ids == plain.token_ids[: plain.text.index(needle) + 2]
    assert plain.finish_reason == "length"
    assert len(plain.token_ids) == 12


def test_the_context_ends_a_sample(build):
    [[completion]] = build(max_length=16).generate([[1] * 10], SamplingParams(max_tokens=100))
    assert (completion.finish_reason, len(completion.token_ids)) == ("length", 6)


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_a_stream_is_the_completion_in_pieces(build, prompts, num_drafts):
    engine = build(tokenizer=Letters(), num_drafts=num_drafts)
    params = SamplingParams(n=2, max_tokens=15, seed=4, detokenize=True)
    [completions] = engine.generate([prompts[1]], params)

    async def collect():
        pieces = {0: [], 1: []}
        async for delta in engine.stream(prompts[1], params):
            pieces[delta.index].append(delta)
        return pieces

    for index, pieces in asyncio.run(collect()).items():
        completion = completions[index]
        assert [x for delta in pieces for x in delta.token_ids] == completion.token_ids
        assert [x for delta in pieces for x in delta.logprobs] == pytest.approx(completion.logprobs, abs=1e-5)
        assert "".join(delta.text for delta in pieces) == completion.text
        assert [delta.finish_reason for delta in pieces if delta.finish_reason] == ["length"]


def test_leaving_a_stream_frees_everything(build, prompts):
    engine = build()

    async def leave():
        async for _ in engine.stream(prompts[1], SamplingParams(n=3, max_tokens=400)):
            break
        task = asyncio.ensure_future(engine.generate_async(prompts[2], SamplingParams(max_tokens=400)))
        while engine.stats()["running"] != 1:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    engine.pause()  # returns after the step under way
    assert engine.stats()["running"] == engine.stats()["blocks_in_use"] == 0
    assert engine.stats()["aborted_requests"] == 2


def other_weights(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    return other


@pytest.mark.parametrize("backend", BACKENDS)
def test_new_weights_are_live_and_drop_the_prefix_cache(build, model, prompts, forward_logprobs, backend):
    live = copy.deepcopy(model)
    engine = build(backend=backend, of=live)
    params = SamplingParams(max_tokens=8, seed=1)
    engine.generate([prompts[3]], params)
    other = other_weights(model)
    assert engine.update_weights(other.state_dict()) == engine.weight_version == 1
    [[completion]] = engine.generate([prompts[3]], params)
    assert completion.num_cached_tokens == 0
    assert completion.weight_versions == [1] * 8
    expected = forward_logprobs(other, prompts[3], completion.token_ids)
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)
    with torch.no_grad():  # an optimiser step: in place
        live.lm_head.weight.mul_(2)
    assert engine.update_weights(version=10) == 10
    [[completion]] = engine.generate([prompts[3]], params)
    expected = forward_logprobs(live, prompts[3], completion.token_ids)
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("policy", ["finish", "abort", "recompute", "continue"])
def test_requests_in_flight_meet_new_weights_as_asked(build, model, prompts, forward_logprobs, policy, monkeypatch):
    live = copy.deepcopy(model)
    old, new = copy.deepcopy(model), other_weights(model)
    engine = build(of=live)
    step, allowed = engine._core.step, threading.Semaphore(5)
    monkeypatch.setattr(engine._core, "step", lambda admit: allowed.acquire() and step(admit))

    async def run():
        pieces = []
        updated = None
        async for delta in engine.stream(prompts[1], SamplingParams(max_tokens=120, seed=2)):
            pieces.append(delta)
            if len(pieces) == 5:
                update = partial(engine.update_weights, new.state_dict(), in_flight=policy)
                updated = asyncio.get_running_loop().run_in_executor(None, update)
                # The engine is held before its sixth step; the update is queued, or was taken in just before that.
                while not (engine._commands or engine._at_boundary or updated.done()):
                    await asyncio.sleep(0.001)
                allowed.release(1000)
        await updated
        return pieces

    pieces = asyncio.run(run())
    tokens = [x for delta in pieces for x in delta.token_ids]
    versions = [x for delta in pieces for x in delta.weight_versions]
    logprobs = torch.tensor([x for delta in pieces for x in delta.logprobs])
    assert versions == sorted(versions)
    assert engine.weight_version == 1
    if policy == "finish":
        assert set(versions) == {0}
        assert len(tokens) == 120
    elif policy == "abort":
        assert pieces[-1].finish_reason == "abort"
        assert set(versions) == {0}
    else:
        assert set(versions) == {0, 1}
        assert len(tokens) == 120
    switch = versions.count(0)
    before = forward_logprobs(old, prompts[1], tokens)[:switch]
    torch.testing.assert_close(logprobs[:switch], before, atol=1e-5, rtol=0)
    if policy == "recompute":  # not so for `continue`, whose keys and values are partly the old weights'
        after = forward_logprobs(new, prompts[1], tokens)[switch:]
        torch.testing.assert_close(logprobs[switch:], after, atol=1e-5, rtol=0)


def test_new_weights_in_a_pause_do_not_wait_for_what_is_paused(build, model, prompts, forward_logprobs):
    """Requests under way go on with the new weights, recomputed; whether the pause or the update came first."""
    engine, new = build(of=copy.deepcopy(model)), other_weights(model)

    async def run():
        pieces = []
        async for delta in engine.stream(prompts[1], SamplingParams(max_tokens=120, seed=2)):
            pieces.append(delta)
            if len(pieces) == 5:
                engine.pause()
                assert await asyncio.wait_for(asyncio.to_thread(engine.update_weights, new.state_dict()), 60) == 1
                engine.resume()
            if len(pieces) == 25:
                waiting = asyncio.ensure_future(asyncio.to_thread(engine.update_weights))
                while not (engine._at_boundary or waiting.done()):
                    await asyncio.sleep(0)
                engine.pause()
                assert await asyncio.wait_for(waiting, 60) == 2
                engine.resume()
        return pieces

    pieces = asyncio.run(run())
    tokens = [x for delta in pieces for x in delta.token_ids]
    versions = [x for delta in pieces for x in delta.weight_versions]
    logprobs = torch.tensor([x for delta in pieces for x in delta.logprobs])
    assert len(tokens) == 120
    assert versions == sorted(versions)
    assert {0, 1} < set(versions)
    switch = versions.count(0)
    after = forward_logprobs(new, prompts[1], tokens)[switch:]
    torch.testing.assert_close(logprobs[switch:], after, atol=1e-5, rtol=0)


@pytest.mark.parametrize("version", [-1, 2**63])
def test_a_version_out_of_range_is_refused_before_anything_changes(build, version):
    engine = build()
    with pytest.raises(ValueError, match="out of range"):
        engine.update_weights(version=version)
    assert engine.weight_version == 0


def test_a_failed_update_keeps_the_old_weights(build, model, prompts):
    engine = build(of=copy.deepcopy(model))
    with pytest.raises(RuntimeError, match="Missing key"):
        engine.update_weights({})
    assert engine.weight_version == 0


def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(build, prompts, monkeypatch):
    engine = build()
    forward = engine._core.runner.backend.forward
    monkeypatch.setattr(engine._core.runner.backend, "forward", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate(prompts, SamplingParams(max_tokens=4))
    monkeypatch.setattr(engine._core.runner.backend, "forward", forward)
    assert len(engine.generate(prompts, SamplingParams(max_tokens=4))) == len(prompts)


def test_a_request_without_any_token_left_fails_alone(build, prompts):
    engine = build()
    banned = SamplingParams(max_tokens=9, logit_bias={token: float("-inf") for token in range(320)})

    async def run():
        calls = [engine.generate_async(prompts[0], params) for params in (banned, SamplingParams(max_tokens=9))]
        return await asyncio.gather(*calls, return_exceptions=True)

    failed, finished = asyncio.run(run())
    assert "ban every token" in str(failed)
    assert finished[0].finish_reason == "length"


def test_weights_that_diverged_are_told(build, model, prompts):
    diverged = copy.deepcopy(model)
    with torch.no_grad():
        diverged.lm_head.weight.fill_(float("nan"))
    for backend in ("model", "auto"):
        with pytest.raises(ArithmeticError, match="not finite"):
            build(of=diverged, backend=backend).generate(prompts, SamplingParams(max_tokens=2))


def test_pause_holds_requests_and_close_aborts_them(model, prompts):
    engine = Engine(model, None, EngineConfig(backend="model"))
    engine.pause()

    async def run():
        task = asyncio.ensure_future(engine.generate_async(prompts[0], SamplingParams(max_tokens=4)))
        await asyncio.sleep(0.05)
        assert not task.done()
        engine.close()
        return await task

    [completion] = asyncio.run(run())
    assert completion.finish_reason == "abort"
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate(prompts, SamplingParams())


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "empty"),
        ([320], {}, "token 320, outside the vocabulary of 320"),
        ([1] * 512, {}, "context of 512"),
        ([1], {"max_tokens": 200}, "raise cache_tokens"),
        ([1], {"stop": ("x",), "max_tokens": 9}, "needs a tokenizer"),
        ("text", {"max_tokens": 9}, "needs a tokenizer"),
        ([1], {"logit_bias": {999: 1.0}, "max_tokens": 9}, "logit_bias holds token 999"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_at_once(build, prompt, params, message):
    with pytest.raises(ValueError, match=message):
        build(cache_tokens=160).generate([prompt], SamplingParams(**params))


def test_drafts_need_an_mtp_layer():
    values = {**preset("pico").to_hub(), "num_nextn_predict_layers": 0}
    model = Glm45(type(preset("pico")).from_hub(values))
    with pytest.raises(ValueError, match="no MTP layer"):
        Engine(model, None, EngineConfig(num_drafts=1))
