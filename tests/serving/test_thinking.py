"""The thinking switch in every spelling, and prompts that are those of the chat template."""

import pytest

from glm45.text.chat import render

HI = [{"role": "user", "content": "hi"}]
OFF = [
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"chat_template_kwargs": {"thinking": False}},
    {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
    {"thinking": {"type": "disabled"}},
    {"enable_thinking": False},
    {"reasoning": {"enabled": False}},
    {"reasoning": {"effort": "none"}},
    {"reasoning_effort": "none"},
    {"messages": [{"role": "user", "content": "hi /nothink"}]},
    {"messages": [{"role": "user", "content": "hi/nothink\n"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi /no_think"}]}]},
    {"messages": [{"role": "user", "content": "hi", "enable_thinking": False}]},
    {"messages": [{"role": "user", "content": "hi /nothink"}], "enable_thinking": True},
]
ON = [
    {},
    {"chat_template_kwargs": {"enable_thinking": True}},
    {"thinking": {"type": "enabled"}},
    {"reasoning_effort": "high"},
    {"messages": [{"role": "user", "content": "hi /think"}], "enable_thinking": False},
]


@pytest.mark.parametrize("body", OFF, ids=str)
def test_off(client, engine, tokenizer, body):
    """The prompt is the template's with enable_thinking=False."""
    assert client.post("/v1/chat/completions", json={"messages": HI, **body}).status_code == 200
    expected = render(HI, enable_thinking=False, add_generation_prompt=True)
    assert tokenizer.decode(engine.asked[-1].prompt) == expected


@pytest.mark.parametrize("body", ON, ids=str)
def test_on(client, engine, tokenizer, body):
    """The prompt leaves the choice to the model, as the template does."""
    assert client.post("/v1/chat/completions", json={"messages": HI, **body}).status_code == 200
    assert tokenizer.decode(engine.asked[-1].prompt) == render(HI, add_generation_prompt=True)


def test_contradictions_are_refused(client, engine):
    """Two spellings that disagree are an error that names both."""
    body = {"messages": HI, "enable_thinking": True, "thinking": {"type": "disabled"}}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "enable_thinking says True, thinking says False" in response.json()["error"]["message"]
    assert not engine.asked


def test_reasoning_of_earlier_turns_is_dropped_unless_kept(client, engine, tokenizer):
    """As the template does; clear_thinking=False keeps it."""
    said = {"role": "assistant", "content": "A", "reasoning_content": "because"}
    messages = [{"role": "user", "content": "a"}, said, {"role": "user", "content": "b"}]
    client.post("/v1/chat/completions", json={"messages": messages})
    assert "because" not in tokenizer.decode(engine.asked[-1].prompt)
    client.post(
        "/v1/chat/completions", json={"messages": messages, "thinking": {"type": "enabled", "clear_thinking": False}}
    )
    assert "<think>because</think>" in tokenizer.decode(engine.asked[-1].prompt)


def test_tokenize_is_what_chat_renders(client, engine):
    """/tokenize of messages gives the ids that a chat completion is asked with; of text, plain ids that decode back."""
    body = {"messages": HI, "enable_thinking": False}
    ids = client.post("/tokenize", json=body).json()["tokens"]
    client.post("/v1/chat/completions", json=body)
    assert engine.asked[-1].prompt == ids
    plain = client.post("/tokenize", json={"prompt": "The answer <|user|>"}).json()
    assert plain["count"] == len(plain["tokens"])
    assert client.post("/detokenize", json={"tokens": plain["tokens"]}).json()["prompt"] == "The answer <|user|>"
