"""A scripted engine for protocol tests, a tiny real one for end-to-end tests, and servers of both."""

import asyncio
import contextlib
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch
import uvicorn

from glm45.engine.detokenizer import Detokenizer
from glm45.engine.request import Delta
from glm45.serving.app import build_app
from glm45.serving.command import DrainingServer
from glm45.serving.limits import Keys, Limits
from glm45.serving.service import Service
from glm45.text.special_tokens import SPECIAL_TOKENS
from glm45.text.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the weather in Paris and in Beijing today?",
    'get_weather city {"type": "object", "properties": {"city": {"type": "string"}}} Hello, world! 你好,世界。',
    "def add(a, b):\n    return a + b\n\nThe answer is 42. Let me think about it step by step.",
] * 4


@pytest.fixture(scope="session")
def tokenizer():
    with pytest.warns(UserWarning, match="no more pairs"):
        return Tokenizer.train(CORPUS, 700)


@pytest.fixture(scope="session")
def ids_of(tokenizer):
    """Return a function that spells text with special tokens as ids."""
    import re

    pattern = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")

    def spell(text):
        ids = []
        for part in pattern.split(text):
            ids += [tokenizer.special_id(part)] if part in SPECIAL_TOKENS else tokenizer.encode(part) if part else []
        return ids

    return spell


class ScriptedEngine:
    """Emits given tokens, one a delta; keeps what it was asked and counts what it was left with."""

    def __init__(self, tokenizer, ids_of):
        self.tokenizer, self.ids_of = tokenizer, ids_of
        self.max_length = 4096
        self.reset()

    def reset(self):
        self.weight_version = 0
        self.longest_sample = self.max_length
        self.stats_now = {"drafted_tokens": 0, "accepted_tokens": 0}
        self.text = "<think>Let me think.</think>\nThe answer is 42.<|user|>"
        """What it says: text, or a function of the prompt's ids and the sample's index."""
        self.delay = 0.0
        self.held = False
        """While true, no token comes."""
        self.fail_after = None
        """Tokens after which it raises."""
        self.asked = []
        self.num_open = 0
        self.aborted = []
        self.paused = False

    def stats(self):
        return {**self.stats_now, "running": self.num_open, "waiting": 0}

    def _check(self, prompt, params):
        if len(prompt) >= self.max_length:
            raise ValueError(f"the prompt has {len(prompt)} tokens")
        for token in [*prompt, *params.logit_bias, *params.stop_token_ids]:
            if not 0 <= token < self.tokenizer.padded_vocab_size:
                raise ValueError(f"token {token} is outside the vocabulary")

    async def stream(self, prompt, params, *, request_id=None, owner=""):
        self._check(prompt, params)
        self.asked.append(SimpleNamespace(prompt=prompt, params=params, request_id=request_id, owner=owner))
        self.num_open += 1
        finished = False
        try:
            for index in range(params.n):
                async for delta in self._sample(prompt, params, index):
                    yield delta
            finished = True
        finally:
            self.num_open -= 1
            if not finished:
                self.aborted.append(request_id)

    async def _sample(self, prompt, params, index):
        text = self.text(prompt, index) if callable(self.text) else self.text
        script = self.ids_of(text)[: params.max_tokens]
        eos = self.tokenizer.eos_token_ids
        detokenizer = Detokenizer(self.tokenizer, params.stop) if params.wants_text else None
        for i, token in enumerate(script):
            await asyncio.sleep(self.delay)
            while self.held:
                await asyncio.sleep(0.005)
            if self.fail_after is not None and i >= self.fail_after:
                raise RuntimeError("scripted failure")
            stopped = detokenizer is not None and detokenizer.append(token)
            reason = stop_reason = None
            if token in eos or token in params.stop_token_ids:
                reason, stop_reason = "stop", token
            elif stopped:
                reason, stop_reason = "stop", detokenizer.stopped_by
            elif i + 1 == len(script):
                reason = "length"
            if reason and detokenizer:
                detokenizer.finish()
            yield Delta(
                index=index,
                token_ids=[token],
                logprobs=[-0.5],
                weight_versions=[self.weight_version],
                text=detokenizer.take(final=reason is not None) if detokenizer else None,
                top_logprobs=[{token: -0.5, 65: float("-inf")}] if params.top_logprobs else [],
                finish_reason=reason,
                stop_reason=stop_reason,
                prompt_logprobs=[None] + [-1.0] * (len(prompt) - 1) if params.prompt_logprobs and i == 0 else None,
                num_cached_tokens=16,
            )
            if reason:
                return

    def compile(self, constraint):
        if constraint.grammar == "bad":
            raise ValueError("the constraint cannot be enforced")

    def abort(self, request_id):
        self.aborted.append(request_id)

    def pause(self):
        self.paused = True

    def resume(self):
        self.paused = False

    def update_weights(self, weights=None, *, version=None, in_flight="finish"):
        if weights is not None and "missing" in str(weights):
            raise FileNotFoundError(f"{weights} holds no checkpoint")
        self.weight_version = self.weight_version + 1 if version is None else version
        return self.weight_version

    def close(self):
        pass


@pytest.fixture(scope="session")
def shared_engine(tokenizer, ids_of):
    return ScriptedEngine(tokenizer, ids_of)


@pytest.fixture
def engine(shared_engine):
    shared_engine.reset()
    return shared_engine


@pytest.fixture(scope="session")
def start_server():
    """Return a context manager that serves a service on a free port, in a thread."""

    @contextlib.contextmanager
    def start(service, hosts=()):
        listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        config = uvicorn.Config(build_app(service, hosts), log_level="warning", timeout_graceful_shutdown=15)
        server = DrainingServer(config, service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        deadline = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline, "the server did not start in time"
            time.sleep(0.01)
        try:
            yield SimpleNamespace(url=url, server=server, thread=thread, service=service)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server did not stop"

    return start


@pytest.fixture
def serve(engine, tokenizer, start_server):
    """Return a function that serves the scripted engine and gives its address."""
    with contextlib.ExitStack() as stack:

        def start(keys=(), hosts=(), engine=engine, **changes):
            limits = Limits(**{"shutdown_seconds": 2.0, **changes.pop("limits", {})})
            service = Service(engine, tokenizer, "tiny", limits=limits, keys=Keys(keys), **changes)
            return stack.enter_context(start_server(service, hosts))

        yield start


@pytest.fixture(scope="session")
def shared_server(shared_engine, tokenizer, start_server):
    """One server of the scripted engine, with default settings, for every test that needs no other."""
    with start_server(Service(shared_engine, tokenizer, "tiny", limits=Limits(shutdown_seconds=2.0))) as server:
        yield server


@pytest.fixture
def client(shared_server, engine):
    with httpx.Client(base_url=shared_server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def shared_openai_client(shared_server):
    with openai.OpenAI(base_url=shared_server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def oai(shared_openai_client, engine):
    """OpenAI's client of the shared server, with the engine's script reset."""
    return shared_openai_client


@pytest.fixture(scope="session")
def tiny_model(tokenizer):
    """A random model that fits the tokenizer."""
    from dataclasses import replace

    from glm45.model.config import preset
    from glm45.model.transformer import Glm45

    shape = {"vocab_size": tokenizer.padded_vocab_size, "eos_token_id": tokenizer.eos_token_ids}
    model = Glm45(replace(preset("pico"), **shape, max_position_embeddings=2048), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.dim() == 1 else 3.0)
    return model
