"""The messages API, as Anthropic's own client sees it; the engine is scripted."""

import anthropic
import pytest

TOOL = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = (
    "<think>I need it.</think>\nLet me look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
    "<arg_value>Paris</arg_value>\n</tool_call><|observation|>"
)
THINK = {"type": "adaptive"}


@pytest.fixture(scope="session")
def shared_anthropic_client(shared_server):
    with anthropic.Anthropic(base_url=shared_server.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def client(shared_anthropic_client, engine):
    return shared_anthropic_client


def ask(client, content="hi", **more):
    values = {"model": "tiny", "max_tokens": 4000, "messages": [{"role": "user", "content": content}], **more}
    return client.messages.create(**values)


def test_thinking_and_text_are_blocks(client):
    """Reasoning is a thinking block, the answer a text block; usage splits cached from new prompt tokens."""
    message = ask(client, thinking=THINK)
    assert [(block.type) for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == "Let me think."
    assert message.content[1].text == "The answer is 42."
    assert message.stop_reason == "end_turn"
    assert message.usage.cache_read_input_tokens == 16


def test_thinking_is_off_unless_asked(client, engine, tokenizer):
    """Without `thinking` the prompt closes reasoning, as Anthropic's clients expect."""
    engine.text = "\nHello!<|user|>"
    assert ask(client).content[0].text == "Hello!"
    assert tokenizer.decode(engine.asked[-1].prompt).endswith("/nothink<|assistant|>\n<think></think>")


def test_stream_adds_up_to_the_whole_message(client, engine):
    """The client's own accumulator rebuilds the unstreamed message: thinking, text and a tool call."""
    engine.text = CALL
    whole = ask(client, tools=[TOOL], thinking=THINK)
    request = {"model": "tiny", "max_tokens": 4000, "messages": [{"role": "user", "content": "hi"}]}
    with client.messages.stream(**request, tools=[TOOL], thinking=THINK) as stream:
        streamed = stream.get_final_message()
    assert [block.type for block in streamed.content] == ["thinking", "text", "tool_use"]
    assert streamed.content[2].input == whole.content[2].input == {"city": "Paris"}
    assert [b.model_dump(exclude={"id"}) for b in streamed.content[:2]] == [
        b.model_dump(exclude={"id"}) for b in whole.content[:2]
    ]
    assert streamed.stop_reason == whole.stop_reason == "tool_use"
    assert streamed.usage.output_tokens == whole.usage.output_tokens


def test_tool_result_renders_as_an_observation(client, engine, tokenizer):
    """A tool result block, with text beside it, becomes GLM's observation and the user's words."""
    engine.text = CALL
    first = ask(client, "weather?", tools=[TOOL], thinking=THINK)
    used = first.content[-1]
    engine.text = "<think></think>\nSunny.<|user|>"
    history = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": first.content},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": used.id, "content": [{"type": "text", "text": "sun"}]},
            ],
        },
    ]
    answer = ask(client, messages=history, tools=[TOOL], thinking=THINK)
    assert answer.content[0].text == "Sunny."
    prompt = tokenizer.decode(engine.asked[-1].prompt)
    assert "<|observation|>\n<tool_response>\nsun\n</tool_response><|assistant|>" in prompt


def test_prefill_goes_on_with_the_assistant_turn(client, engine, tokenizer):
    """A last assistant message is continued, not answered."""
    history = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two"}]
    engine.text = ", three<|user|>"
    assert ask(client, messages=history).content[0].text == ", three"
    assert tokenizer.decode(engine.asked[-1].prompt).endswith("One, two")


def test_stop_sequence_and_token_limit_are_told_apart(client, engine):
    """A stop sequence names itself; running out of tokens is max_tokens, also at the end of the context."""
    engine.text = "\nOne two three<|user|>"
    message = ask(client, stop_sequences=["two"])
    assert (message.stop_reason, message.stop_sequence, message.content[0].text) == ("stop_sequence", "two", "One ")
    assert ask(client, max_tokens=2).stop_reason == "max_tokens"
    ask(client, max_tokens=9_000)
    assert engine.asked[-1].params.max_tokens == engine.max_length - len(engine.asked[-1].prompt)


def test_errors_have_anthropics_shape(client, engine):
    """Wrong requests and failures inside a stream raise what Anthropic's client raises for them."""
    with pytest.raises(anthropic.BadRequestError, match="image") as caught:
        ask(client, [{"type": "image", "source": {"type": "url", "url": "http://x"}}])
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError):
        ask(client, model="other")
    engine.fail_after, engine.delay = 3, 0.01
    with pytest.raises(anthropic.APIStatusError, match="failed"):
        for _ in ask(client, stream=True):
            pass


def test_count_tokens_is_the_prompt_length(client, engine):
    """The count is what a request with the same messages is charged."""
    counted = client.messages.count_tokens(model="tiny", messages=[{"role": "user", "content": "hello there"}])
    ask(client, "hello there")
    assert counted.input_tokens == len(engine.asked[-1].prompt)
