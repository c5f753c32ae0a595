"""SGLang's endpoints: ids and log-probabilities for rollouts, weights and pauses; the engine is scripted."""

import json

import httpx
import pytest

from glm45.engine.request import Constraint


def post(client, path, **body):
    return client.post(path, json=body)


def test_generate_gives_ids_logprobs_and_versions(client, engine, ids_of):
    """Every sampled token comes with its log-probability and the version of the weights that made it."""
    engine.text = " a dog<|user|>"
    body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 20}, "return_logprob": True, "rid": "r1"}
    answer = post(client, "/generate", **body, logprob_start_len=0).json()
    ids = ids_of(engine.text)
    assert answer["output_ids"] == ids
    meta = answer["meta_info"]
    assert meta["output_token_logprobs"] == [[-0.5, token, None] for token in ids]
    assert meta["input_token_logprobs"] == [[None, 1, None], [-1.0, 2, None], [-1.0, 3, None]]
    assert meta["finish_reason"] == {"type": "stop", "matched": ids[-1]}
    assert meta["weight_versions"] == [0] * len(ids)
    assert meta["id"] == engine.asked[0].request_id == "r1"


def test_generate_streams_the_answer_so_far_and_lists_samples(client, engine):
    """As in SGLang, each event holds all so far; several samples come as a list."""
    engine.text = " a dog<|user|>"
    with client.stream("POST", "/generate", json={"text": "The", "stream": True}) as response:
        events = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    whole = post(client, "/generate", text="The").json()
    assert whole["text"] in events[-2]
    assert len(post(client, "/generate", text="The", sampling_params={"n": 3}).json()) == 3


def test_weights_cannot_be_changed_without_admin(client):
    """By default the engine is out of reach."""
    for path, body in (
        ("/update_weights_from_disk", {"model_path": "x"}),
        ("/pause_generation", {}),
        ("/continue_generation", {}),
        ("/abort_request", {"abort_all": True}),
        ("/flush_cache", {}),
    ):
        response = post(client, path, **body)
        assert response.status_code == 403, path
        assert response.json()["error"]["code"] == "not_admin"


def test_weights_pause_and_continue(serve, engine):
    """With admin, versions move, failures are told, and a pause reaches the engine."""
    with httpx.Client(base_url=serve(is_admin=True).url) as client:
        assert post(client, "/update_weights_from_disk", model_path="folder").json()["weight_version"] == 1
        named = post(client, "/update_weights_from_disk", model_path="folder", weight_version="7").json()
        assert named["success"]
        assert engine.weight_version == 7
        failed = post(client, "/update_weights_from_disk", model_path="missing")
        assert (failed.status_code, failed.json()["success"]) == (400, False)
        assert client.get("/get_model_info").json()["weight_version"] == "7"
        post(client, "/pause_generation", mode="in_place")
        assert engine.paused
        post(client, "/continue_generation")
        assert not engine.paused


def test_forgetting_while_new_weights_wait_says_when_to_come_back(serve, engine):
    """The engine takes one change at a time."""

    def busy(*arguments, **options):
        raise RuntimeError("another weight update is waiting for requests to finish")

    with httpx.Client(base_url=serve(is_admin=True).url) as client:
        engine.update_weights, kept = busy, engine.update_weights
        response = post(client, "/flush_cache")
        engine.update_weights = kept
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


def test_a_schema_is_json_text_or_an_object(client, engine):
    """SGLang's clients send text; either holds from the first token on, as in SGLang."""
    schema = {"enum": ["red"]}
    for given in (schema, json.dumps(schema)):
        assert post(client, "/generate", text="a", sampling_params={"json_schema": given}).status_code == 200
        assert engine.asked[-1].params.constraint == Constraint(json_schema=schema, reasoning=False)
    for wrong in ("{", "[]", "5", "[" * 100_000):
        assert post(client, "/generate", text="a", sampling_params={"json_schema": wrong}).status_code == 400


@pytest.mark.parametrize("body", [{}, {"text": "a", "input_ids": [1]}, {"input_ids": []}, {"input_ids": [99999]}])
def test_wrong_prompts_are_refused(client, body):
    """Neither, both, empty, or outside the vocabulary."""
    response = post(client, "/generate", **body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
