"""Endpoints for the evaluation's tests: a scripted one, and the project's own server of a tiny random model."""

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the weather in Paris and in Beijing today?",
    "Q: Is it ( True and False ) or not? A: True, False, Yes, No. The answer is 42. Who is the oldest?",
    "Alice has the red ball, Bob has the green ball. Alice and Bob swap. Which ball has Alice? A: green",
] * 4


@pytest.fixture
def endpoint():
    """A server that answers with `script(path, body)`: a status, headers and a JSON-ready object or a string."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            state.asked.append((self.path, body))
            status, headers, answer = state.script(self.path, body)
            payload = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(payload))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(payload)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = SimpleNamespace(script=None, asked=[], url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def chat(content, **more):
    """A chat completion in OpenAI's form."""
    return {
        "choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop", **more}],
        "usage": {"completion_tokens": 3},
    }


@pytest.fixture(name="chat")
def chat_form():
    return chat


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A checkpoint folder of a tiny random model with a tokenizer that fits it."""
    from dataclasses import replace

    import torch

    from glm45.model import hub
    from glm45.model.config import preset
    from glm45.model.transformer import Glm45
    from glm45.text.tokenizer import Tokenizer

    with pytest.warns(UserWarning, match="no more pairs"):
        tokenizer = Tokenizer.train(CORPUS, 700)
    shape = {"vocab_size": tokenizer.padded_vocab_size, "eos_token_id": tokenizer.eos_token_ids}
    model = Glm45(replace(preset("pico"), **shape, max_position_embeddings=2048), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.dim() == 1 else 3.0)
    folder = tmp_path_factory.mktemp("checkpoint")
    hub.save(model, folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def served(checkpoint):
    """The address of the project's server of that checkpoint."""
    import uvicorn

    from glm45.engine.engine import Engine
    from glm45.model import hub
    from glm45.serving.app import build_app
    from glm45.serving.service import Service
    from glm45.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(checkpoint)
    engine = Engine(hub.load(checkpoint).eval(), tokenizer)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(build_app(Service(engine, tokenizer, "tiny")), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(60)
    with contextlib.suppress(RuntimeError):
        engine.close()
