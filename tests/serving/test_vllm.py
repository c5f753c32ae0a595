"""vLLM's control endpoints and completions with token ids; the engine is scripted."""

import httpx


def test_control_needs_admin(client):
    """By default nothing can be changed."""
    reload = {"method": "reload_weights", "kwargs": {"weights_path": "x"}}
    for path, body in (("/pause", None), ("/resume", None), ("/collective_rpc", reload), ("/reset_prefix_cache", None)):
        assert client.post(path, json=body).status_code == 403


def test_pause_reload_and_resume(serve, engine):
    """With admin, weights are loaded while the engine is paused, and failures are told."""
    with httpx.Client(base_url=serve(is_admin=True).url) as client:
        assert client.post("/pause", params={"mode": "keep"}).status_code == 200
        assert engine.paused
        reload = {"method": "reload_weights", "kwargs": {"weights_path": "folder"}}
        assert client.post("/collective_rpc", json=reload).status_code == 200
        assert engine.weight_version == 1
        client.post("/resume")
        assert not engine.paused
        reload["kwargs"]["weights_path"] = "missing"
        assert client.post("/collective_rpc", json=reload).status_code == 400
        assert client.post("/collective_rpc", json={"method": "os.system", "kwargs": {}}).status_code == 400


def test_completions_carry_token_ids_and_prompt_logprobs(client, engine, ids_of):
    """Ids beside the text, tokens named by id where asked, prompt scores as vLLM lists them."""
    engine.text = " a dog"
    body = {"prompt": [5, 6], "max_tokens": 9, "logprobs": 1, "return_token_ids": True, "prompt_logprobs": 0}
    choice = client.post("/v1/completions", json={**body, "return_tokens_as_token_ids": True}).json()["choices"][0]
    ids = ids_of(" a dog")
    assert choice["token_ids"] == ids
    assert choice["prompt_token_ids"] == [5, 6]
    assert choice["prompt_logprobs"] == [None, {"6": {"logprob": -1.0}}]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in ids]
    assert choice["logprobs"]["top_logprobs"][0][f"token_id:{ids[0]}"] == -0.5
