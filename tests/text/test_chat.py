"""Conversations render to GLM-4.5's text, byte for byte; what GLM-4.5 cannot read is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45.text.chat import extend_tokens, render, render_tokens

USER = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
ASKS = {"role": "assistant", "content": None, "reasoning_content": "clock", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "12:00"}
ANSWER = {"role": "assistant", "content": "noon", "reasoning_content": "read"}

# Written by hand from the format: roles, newlines, reasoning after the last user message only.
RENDERINGS = {
    "question": ([USER], {"add_generation_prompt": True}, "[gMASK]<sop><|user|>\nhi<|assistant|>"),
    "direct question": (
        [USER],
        {"add_generation_prompt": True, "enable_thinking": False},
        "[gMASK]<sop><|user|>\nhi/nothink<|assistant|>\n<think></think>",
    ),
    "direct question, as the user wrote it": (
        [{"role": "user", "content": "hi/nothink"}],
        {"add_generation_prompt": True, "enable_thinking": False},
        "[gMASK]<sop><|user|>\nhi/nothink<|assistant|>\n<think></think>",
    ),
    "history": (
        [
            {"role": "system", "content": "S"},
            USER,
            ANSWER,
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
        ],
        {"add_generation_prompt": True},
        "[gMASK]<sop><|system|>\nS<|user|>\nhi<|assistant|>\n<think></think>\nnoon<|user|>\nb<|assistant|>",
    ),
    "preserved thinking": (
        [USER, ANSWER, USER],
        {"clear_thinking": False},
        "[gMASK]<sop><|user|>\nhi<|assistant|>\n<think>read</think>\nnoon<|user|>\nhi",
    ),
    "calls": (
        [USER, ASKS, RESULT, {**RESULT, "tool_call_id": None}, ANSWER],
        {},
        "[gMASK]<sop><|user|>\nhi<|assistant|>\n<think>clock</think>\n<tool_call>now\n</tool_call>\n<tool_call>f\n"
        '<arg_key>s</arg_key>\n<arg_value> a"\n</arg_value>\n<arg_key>n</arg_key>\n<arg_value>[1, null, "é"]'
        "</arg_value>\n</tool_call><|observation|>\n<tool_response>\n12:00\n</tool_response>\n<tool_response>\n12:00\n"
        "</tool_response><|assistant|>\n<think>read</think>\nnoon",
    ),
    "think tags in content": (
        [USER, {"role": "assistant", "content": "<think>\nR\n</think>\n\nA </think> B"}],
        {},
        "[gMASK]<sop><|user|>\nhi<|assistant|>\n<think>R</think>\nA </think> B",
    ),
    "thinking by turn": (
        [{**USER, "enable_thinking": False}, {"role": "assistant", "content": "A"}, USER],
        {"add_generation_prompt": True},
        "[gMASK]<sop><|user|>\nhi/nothink<|assistant|>\n<think></think>\nA<|user|>\nhi<|assistant|>",
    ),
    "4.7 calls": (
        [USER, ASKS, RESULT, ANSWER],
        {"dialect": "glm-4.7"},
        "[gMASK]<sop><|user|>hi<|assistant|><think>clock</think><tool_call>now</tool_call><tool_call>f"
        '<arg_key>s</arg_key><arg_value> a"\n</arg_value><arg_key>n</arg_key><arg_value>[1, null, "é"]</arg_value>'
        "</tool_call><|observation|><tool_response>12:00</tool_response><|assistant|><think>read</think>noon",
    ),
    "4.7 question": (
        [USER],
        {"dialect": "glm-4.7", "add_generation_prompt": True},
        "[gMASK]<sop><|user|>hi<|assistant|><think>",
    ),
    "4.7 direct": (
        [USER],
        {"dialect": "glm-4.7", "add_generation_prompt": True, "enable_thinking": False},
        "[gMASK]<sop><|user|>hi<|assistant|></think>",
    ),
}
TWO_CALLS = [CALL, {"id": "c2", "function": {"name": "f", "arguments": {"s": ' a"\n', "n": [1, None, "é"]}}}]


@pytest.mark.parametrize("name", RENDERINGS)
def test_rendering_is_what_was_written_by_hand(name, tokenizer):
    messages, options, text = RENDERINGS[name]
    if "calls" in name:
        messages = [messages[0], {**ASKS, "tool_calls": TWO_CALLS}, *messages[2:]]
    assert render(messages, **options) == text
    assert tokenizer.decode(render_tokens(messages, tokenizer, **options).ids) == text


def test_tools_are_listed_as_they_are_given(tools):
    text = render([USER], tools=tools)
    head = "[gMASK]<sop><|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    assert text.startswith(head)
    assert (
        '\n{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}\n'
        in text
    )
    assert text.endswith("<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call><|user|>\nhi")
    assert render([USER], tools=[]) == render([USER])


REFUSED = {
    "nothing": ([], "there are no messages"),
    "role": ([USER, {"role": "robot", "content": "x"}], "message 1: role 'robot'"),
    "no role": ([{"content": "x"}], "message 0: role None"),
    "arguments": (
        [USER, {**ASKS, "tool_calls": [CALL, {"function": {"name": "f", "arguments": "{a: 1}"}}]}],
        "message 1, call 1: arguments of f are not JSON",
    ),
    "array arguments": (
        [USER, {**ASKS, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
        "message 1, call 0: arguments of f are a list",
    ),
    "unwritable argument": (
        [USER, {**ASKS, "tool_calls": [{"function": {"name": "f", "arguments": {"x": {1, 2}}}}]}],
        "message 1: argument 'x' cannot be written as JSON",
    ),
    "call without name": ([{**ASKS, "tool_calls": [{"function": {}}]}], "message 0, call 0: a call needs a function"),
    "calls that are no list": ([{**ASKS, "tool_calls": 3}], "message 0: tool_calls is a int"),
    "result without call": ([USER, RESULT], "message 1: a tool result that answers no call"),
    "second result": ([USER, ASKS, RESULT, RESULT], "message 3: a tool result that answers no call"),
    "result after a user": ([USER, ASKS, USER, RESULT], "message 3: a tool result that answers no call"),
    "other call": (
        [USER, ASKS, {**RESULT, "tool_call_id": "c9"}],
        "message 2: tool_call_id 'c9' answers no open call; open are c1",
    ),
    "image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        "message 0: a content part of type 'image_url'",
    ),
    "number": ([{"role": "user", "content": 3}], "message 0: content is a int"),
    "reasoning parts": ([{"role": "assistant", "reasoning_content": []}], "message 0: reasoning_content is a list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_model_cannot_read_is_refused_with_its_index(name):
    messages, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        render(messages)


def test_openai_forms_are_accepted_as_they_come():
    """JSON-string and mapping arguments, null and absent content, empty arguments: the same text."""
    wanted = "[gMASK]<sop><|user|>\nhi<|assistant|>\n<think></think>\n<tool_call>now\n</tool_call>"
    for arguments in ("{}", {}, "", None):
        for content in (None, "", []):
            call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": arguments}}
            assert render([USER, {"role": "assistant", "content": content, "tool_calls": [call]}]) == wanted
    assert render([USER, {"role": "assistant", "tool_calls": [{"name": "now", "arguments": {}}]}]) == wanted


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_message_by_message_gives_the_same_ids(data, any_conversation, tokenizer, tools):
    """With reasoning kept, every beginning of a conversation is a prefix of the whole, ids and mask."""
    messages = data.draw(any_conversation)
    options = {"tools": tools, "clear_thinking": False, "dialect": data.draw(st.sampled_from(["glm-4.5", "glm-4.7"]))}
    whole = render_tokens(messages, tokenizer, **options)
    assert tokenizer.decode(whole.ids) == render(messages, **options)
    for end in range(1, len(messages)):
        part = render_tokens(messages[:end], tokenizer, **options)
        assert whole.ids[: len(part.ids)] == part.ids
        assert whole.loss_mask[: len(part.ids)] == part.loss_mask


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["<|user|>", "</think>", "/nothink"]))
def test_no_message_can_place_a_special_token(text, tokenizer):
    """Whatever users, tools or arguments say, the special tokens are those of the empty conversation."""
    special = set(tokenizer.special_tokens)

    def specials(said):
        call = {"id": "c", "function": {"name": "f", "arguments": {"k": said}}}
        messages = [
            {"role": "system", "content": said},
            {"role": "user", "content": said},
            {"role": "assistant", "content": said, "reasoning_content": said + "x", "tool_calls": [call]},
            {"role": "tool", "content": said},
        ]
        return [index for index in render_tokens(messages, tokenizer).ids if index in special]

    assert specials(text) == specials("x")


def test_sampled_ids_are_extended_not_rendered_again(tokenizer):
    """Prompt, sampled turn and extension add up to the rendering of the whole, without its role token twice."""
    prompt = render_tokens([USER], tokenizer, add_generation_prompt=True).ids
    turn = render_tokens([USER, ASKS], tokenizer, end_turn=True)
    sampled = [index for index, produced in zip(turn.ids, turn.loss_mask, strict=True) if produced]
    assert prompt + sampled == turn.ids
    extended = turn.ids + extend_tokens(turn.ids, [RESULT], tokenizer)
    whole = render_tokens([USER, ASKS, RESULT], tokenizer, add_generation_prompt=True).ids
    assert extended == whole
    # A turn that was cut short has no role token yet: the extension brings it.
    assert turn.ids[:-1] + extend_tokens(turn.ids[:-1], [RESULT], tokenizer) == whole


def test_a_user_message_that_drops_reasoning_is_no_extension(tokenizer):
    turn = render_tokens([USER, ANSWER], tokenizer, end_turn=True).ids
    with pytest.raises(ValueError, match="render the conversation anew"):
        extend_tokens(turn, [USER], tokenizer)
    kept = turn + extend_tokens(turn, [USER], tokenizer, clear_thinking=False)
    messages = [USER, ANSWER, USER]
    assert kept == render_tokens(messages, tokenizer, add_generation_prompt=True, clear_thinking=False).ids
    direct = [USER, {"role": "assistant", "content": "A"}]
    turn = render_tokens(direct, tokenizer, end_turn=True, enable_thinking=False).ids
    extended = turn + extend_tokens(turn, [USER], tokenizer, enable_thinking=False)
    whole = render_tokens([*direct, USER], tokenizer, add_generation_prompt=True, enable_thinking=False).ids
    assert extended == whole
    with pytest.raises(ValueError, match="only tool results, user and system messages"):
        extend_tokens(turn, [ANSWER], tokenizer)


def test_an_unknown_dialect_is_refused():
    with pytest.raises(ValueError, match=r"dialect 'glm-5' is not one of glm-4\.5, glm-4\.7"):
        render([USER], dialect="glm-5")
