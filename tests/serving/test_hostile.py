"""Clients that leave, lie, hurry or shout: nothing leaks, nothing hangs, every failure is an error object."""

import asyncio
import contextlib
import gc
import json
import random
import socket
import time

import httpx
import pytest

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def until(condition, what, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.01)


def address_of(server):
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def error_of(response):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_engine(engine, shared_server, stream):
    """Closing the connection aborts the generation and gives the place back."""
    engine.text, engine.delay = "word " * 5000, 0.01
    body = json.dumps({**CHAT, "stream": stream}).encode()
    with socket.create_connection(address_of(shared_server)) as sock:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        sock.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        until(lambda: engine.num_open == 1, "the generation has begun")
    until(lambda: engine.num_open == 0 and engine.aborted, "the generation is aborted")
    until(lambda: shared_server.service.gate.num_samples == 0, "the place is free")


@pytest.mark.slow
def test_random_disconnects_leave_nothing_behind(client, engine, shared_server):
    """Two hundred clients that leave at random points: no generation, place or task stays."""
    engine.text, engine.delay = "<think>a b c</think>\n" + "word " * 100, 0.001

    async def one(http, number):
        chance = random.Random(number)
        stream = chance.random() < 0.7
        request = {**CHAT, "stream": stream, "n": chance.choice([1, 1, 3])}
        with contextlib.suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(chance.random() * 0.3):
                async with http.stream("POST", "/v1/chat/completions", json=request) as response:
                    async for _ in response.aiter_raw():
                        pass

    async def everyone():
        async with httpx.AsyncClient(
            base_url=shared_server.url, timeout=60, limits=httpx.Limits(max_connections=100)
        ) as http:
            await asyncio.gather(*(one(http, number) for number in range(200)))

    num_tasks = len(asyncio.all_tasks(shared_server.server.servers[0].get_loop()))
    asyncio.run(everyone())
    until(lambda: engine.num_open == 0, "every generation has ended")
    until(lambda: shared_server.service.gate.num_samples == 0, "every place is free")
    loop = shared_server.server.servers[0].get_loop()
    until(lambda: len(asyncio.all_tasks(loop)) <= num_tasks, "every task of the server has ended")
    engine.delay = 0.0
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"messages": ' * 5_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "hi"}], "seed": 1' + b"0" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "hi"}], "n": 1000000}',
        b'{"messages": [{"role": "assistant", "tool_calls": 5}]}',
        b'{"messages": [{"role": "tool", "content": "x"}]}',
        b'{"messages": [{"role": "user", "content": {"a": 1}}]}',
        b'{"messages": "hi"}',
        b'{"messages": [], "tools": [{"type": "function"}]}',
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "hi"}]}',
    ],
    ids=lambda body: repr(body[:40]),
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/generate", "/tokenize"])
def test_malformed_bodies_are_400(client, path, body):
    """Whatever the body, the answer is a client error with an error object."""
    response = client.post(path, content=body, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500, response.text
    assert response.json()["error"]["message"]


def test_a_failure_leaves_the_connection_open(client, engine):
    """After a 500 the same connection serves the next request: clients that keep it are not reset."""
    for _ in range(20):
        engine.fail_after = 0
        response = client.post("/v1/chat/completions", json=CHAT)
        assert response.status_code == 500
        assert error_of(response)["type"] == "server_error"
        engine.fail_after = None
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_a_form_cannot_post(client, engine):
    """Only JSON is taken, so that another site's page cannot make a browser ask."""
    response = client.post("/v1/chat/completions", content=json.dumps(CHAT), headers={"content-type": "text/plain"})
    assert 400 <= response.status_code < 500
    assert not engine.asked


def test_unknown_paths_and_methods_are_error_objects(client):
    """404 and 405 have the same shape as everything else."""
    assert error_of(client.get("/v1/nothing"))["code"] == "not_found"
    assert client.get("/v1/chat/completions").status_code == 405
    assert error_of(client.delete("/v1/models"))["message"]


def test_a_body_that_is_too_large_is_413(serve):
    """Declared or not, ten megabytes over the limit are refused with an error that the sender can read."""
    with httpx.Client(base_url=serve(limits={"body_bytes": 2**20}).url, timeout=60) as client:
        large = {**CHAT, "messages": [{"role": "user", "content": "x" * (10 * 2**20)}]}
        response = client.post("/v1/chat/completions", json=large)
        assert response.status_code == 413
        assert error_of(response)["code"] == "body_too_large"
        parts = (b"x" * 2**16 for _ in range(50))
        assert client.post("/v1/chat/completions", content=parts).status_code == 413
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_a_prompt_that_is_too_long_is_told_its_length(client, engine):
    """Three megabytes that fit the body are refused without being tokenized, a little too much by its count."""
    for number, words in ((250_000, "at least"), (3_000, "shorten")):
        prompt = {**CHAT, "messages": [{"role": "user", "content": "hello world " * number}]}
        response = client.post("/v1/chat/completions", json=prompt)
        assert response.status_code == 400
        assert error_of(response)["code"] == "context_length_exceeded"
        assert words in error_of(response)["message"]
    assert not engine.asked


def test_a_slow_body_is_408(serve):
    """A client that sends its body byte by byte is cut off."""
    with socket.create_connection(address_of(serve(limits={"body_seconds": 0.3}))) as sock:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n"
        sock.sendall(head + b"Content-Type: application/json\r\n\r\n{")
        sock.settimeout(60)
        assert b" 408 " in sock.recv(4096)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_says_when_to_come_back(serve, engine, stream):
    """Beyond the limit: 429 with Retry-After; places come free and requests pass again."""
    engine.held = True
    server = serve(limits={"samples": 4})

    async def run():
        """Twelve at once: those that run go on when the others have been refused."""
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            body = {**CHAT, "stream": stream}
            posts = [asyncio.ensure_future(http.post("/v1/chat/completions", json=body)) for _ in range(12)]
            async with asyncio.timeout(60):
                while sum(post.done() for post in posts) < 8:
                    await asyncio.sleep(0.01)
            engine.held = False
            return await asyncio.gather(*posts)

    responses = asyncio.run(run())
    statuses = sorted(response.status_code for response in responses)
    assert statuses == [200] * 4 + [429] * 8
    refused = next(response for response in responses if response.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert error_of(refused)["type"] == "rate_limit_error"
    refusal = {**CHAT, "stream": True, "stop_token_ids": [99_999]}  # by the engine, once the place is taken
    assert [httpx.post(server.url + "/v1/chat/completions", json=refusal).status_code for _ in range(5)] == [400] * 5
    assert httpx.post(server.url + "/v1/chat/completions", json={**CHAT, "max_tokens": 2}).status_code == 200
    until(lambda: server.service.gate.num_samples == 0, "every place is free")
    too_many = httpx.post(server.url + "/v1/chat/completions", json={**CHAT, "n": 5})
    assert too_many.status_code == 400


def test_time_limit_ends_answers_with_an_error(serve, engine):
    """Whole: 504. Streamed: what there is, then an error event."""
    engine.text, engine.delay = "word " * 5000, 0.02
    server = serve(limits={"request_seconds": 1.0})
    response = httpx.post(server.url + "/v1/chat/completions", json=CHAT, timeout=60)
    assert response.status_code == 504
    assert error_of(response)["code"] == "timeout"
    text = httpx.post(server.url + "/v1/chat/completions", json={**CHAT, "stream": True}, timeout=60).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert all("choices" in event for event in events[:-1])
    assert events[-1]["error"]["code"] == "timeout"
    assert "[DONE]" not in text
    until(lambda: engine.num_open == 0, "the generations are aborted")


@pytest.mark.slow
def test_a_quiet_stream_is_kept_open(serve, engine):
    """Without a token for a while a comment is sent, which clients skip."""
    engine.text, engine.delay = "one two", 0.3
    server = serve(limits={"keepalive_seconds": 0.1})
    text = httpx.post(server.url + "/v1/chat/completions", json={**CHAT, "stream": True}, timeout=60).text
    assert ": still here" in text
    assert text.rstrip().endswith("[DONE]")


def test_keys(serve, engine):
    """Without the right key 401, by either header with it; the page and health need none; owners differ by key."""
    server = serve(keys=("secret-a", "secret-b"))
    with httpx.Client(base_url=server.url) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": ""}, {"authorization": "secret-a"}):
            response = client.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert response.status_code == 401
            assert error_of(response)["code"] == "invalid_api_key"
        assert client.get("/metrics").status_code == 401
        assert client.get("/health").status_code == client.get("/").status_code == 200
        client.post("/v1/chat/completions", json=CHAT, headers={"authorization": "Bearer secret-a"})
        client.post("/v1/chat/completions", json=CHAT, headers={"x-api-key": "secret-b"})
        assert [asked.owner for asked in engine.asked] == ["key-0", "key-1"]


def test_foreign_hosts_are_refused_on_loopback(serve):
    """A page that rebinds its name to 127.0.0.1 reaches nothing."""
    with httpx.Client(base_url=serve(hosts=("127.0.0.1", "localhost")).url) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers={"host": "evil.example:80"}).status_code == 403


@pytest.mark.slow
def test_shutdown_finishes_streams_and_takes_nothing_new(serve, engine):
    """Told to stop, the server ends what runs, answers ready with 503, and is gone."""
    engine.text, engine.delay = "word " * 60 + "<|user|>", 0.01
    server = serve(limits={"shutdown_seconds": 60.0})
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get("/ready").json()["status"] == "ready"
        with client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.server.should_exit = True
            rest = list(lines)
    assert rest[-2] == "data: [DONE]"
    until(lambda: not server.thread.is_alive(), "the server has stopped")
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")


def test_shutdown_tells_streams_that_take_too_long(serve, engine):
    """After the grace period a stream ends with an error event, not with a broken connection."""
    engine.text, engine.delay = "word " * 5000, 0.01
    server = serve(limits={"shutdown_seconds": 0.3})
    with httpx.stream(
        "POST", server.url + "/v1/chat/completions", json={**CHAT, "stream": True}, timeout=60
    ) as response:
        lines = response.iter_lines()
        next(lines)
        server.server.should_exit = True
        rest = [line for line in lines if line]
    assert json.loads(rest[-1][6:])["error"]["code"] == "shutting_down"
    until(lambda: engine.num_open == 0, "the generation is aborted")


@pytest.mark.slow
def test_a_thousand_queued_requests_all_end(serve, engine):
    """A thousand at once: each is answered or refused with 429, and nothing stays."""
    engine.text, engine.delay = "one two three<|user|>", 0.001
    server = serve(limits={"samples": 700})

    async def run():
        limits = httpx.Limits(max_connections=1000)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
            posts = [http.post("/v1/chat/completions", json={**CHAT, "stream": i % 2 == 0}) for i in range(1000)]
            return await asyncio.gather(*posts)

    responses = asyncio.run(run())
    assert {response.status_code for response in responses} <= {200, 429}
    assert sum(response.status_code == 200 for response in responses) >= 300
    assert all("[DONE]" in response.text for response in responses[::2] if response.status_code == 200)
    until(lambda: server.service.gate.num_samples == 0 and engine.num_open == 0, "everything has ended")
    gc.collect()
