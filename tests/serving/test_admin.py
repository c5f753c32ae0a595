"""Endpoints besides the chat APIs; the engine is scripted."""

import re

import httpx


def test_metrics_count_responses_tokens_and_latencies(serve, engine, ids_of):
    """In Prometheus's text format: every sample is declared, and the figures are those of what was asked."""
    engine.text, engine.stats_now = "one two three<|user|>", {"drafted_tokens": 8, "accepted_tokens": 6}
    with httpx.Client(base_url=serve().url, timeout=60) as client:
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        for more in ({}, {"stream": True}, {"n": 2}, {"max_tokens": 10**6}):
            client.post("/v1/chat/completions", json={**chat, **more})
        client.get("/v1/nothing")
        lines = client.get("/metrics").text.splitlines()
    declared = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE")}
    samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    for name in samples:
        family = re.sub(r"(_bucket|_sum|_count)?(\{.*\})?$", "", name)
        assert family in declared, name
    assert samples['glm45_http_responses_total{route="/v1/chat/completions",status="200"}'] == "3"
    assert samples['glm45_http_responses_total{route="/v1/chat/completions",status="400"}'] == "1"
    assert samples['glm45_http_responses_total{route="other",status="404"}'] == "1"
    assert samples["glm45_engine_drafted_tokens_total"] == "8"
    assert samples["glm45_engine_accepted_tokens_total"] == "6"
    assert samples["glm45_samples_in_flight"] == "0"
    assert samples["glm45_first_token_seconds_count"] == samples["glm45_request_seconds_count"] == "3"
    assert samples["glm45_inter_token_seconds_count"] == str(4 * (len(ids_of(engine.text)) - 1))
    assert samples['glm45_request_seconds_bucket{le="+Inf"}'] == "3"
