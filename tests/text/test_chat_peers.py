"""Our renderings equal those of other people's code: `renderers` (ids) and transformers with our exported template."""

import json

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from glm45.text.arguments import is_json
from glm45.text.chat import render, render_tokens
from glm45.text.parsing import parse_ids

pytestmark = pytest.mark.slow

relaxed = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """Our tokenizer and template, as transformers loads them."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def peer_form(messages):
    """Conversations that the peers read alike: they print a null content as "None" and leave out newlines between
    the calls of a message with content (`renderers` 0.1.12), against GLM-4.5's own template."""
    for message in messages:
        if len(message.get("tool_calls", ())) > 1:
            message["content"] = ""
    return messages


@relaxed
@given(data=st.data())
def test_ids_equal_those_of_renderers(data, any_conversation, tokenizer, exported, tools):
    from renderers.configs import GLM45RendererConfig
    from renderers.glm45 import GLM45Renderer

    messages = peer_form(data.draw(any_conversation))
    thinking, prompt = data.draw(st.booleans()), data.draw(st.booleans())
    given_tools = tools if data.draw(st.booleans()) else None
    peer = GLM45Renderer(exported, GLM45RendererConfig(enable_thinking=thinking))
    theirs = peer.render(messages, tools=given_tools, add_generation_prompt=prompt)
    ours = render_tokens(messages, tokenizer, tools=given_tools, enable_thinking=thinking, add_generation_prompt=prompt)
    assert ours.ids == theirs.token_ids


@relaxed
@given(data=st.data())
def test_parsing_ids_equals_renderers(data, any_answer, tokenizer, exported, tools):
    """The same message from the same sampled ids, but for white space around its parts.

    The peer makes a number of a note "1", whose schema is string or null; we keep the string.
    """
    from renderers.glm45 import GLM45Renderer

    message = data.draw(any_answer)
    notes = [call["function"]["arguments"].get("note") for call in message.get("tool_calls", ())]
    assume(not any(isinstance(note, str) and is_json(note.strip()) for note in notes))
    rendered = render_tokens([{"role": "user", "content": "q"}, message], tokenizer, tools=tools, end_turn=True)
    sampled = [index for index, produced in zip(rendered.ids, rendered.loss_mask, strict=True) if produced]
    ours = parse_ids(sampled, tokenizer, tools).message
    theirs = GLM45Renderer(exported).parse_response(sampled, tools=tools)
    assert (ours["content"] or "") == theirs.content.strip()
    assert ours.get("reasoning_content", "") == (theirs.reasoning_content or "").strip()
    calls = [call["function"] for call in ours.get("tool_calls", [])]
    assert [call["name"] for call in calls] == [call.name for call in theirs.tool_calls]
    for call, their_call in zip(calls, theirs.tool_calls, strict=True):
        stripped = {key: _stripped(value) for key, value in json.loads(call["arguments"]).items()}
        assert stripped == {key: _stripped(value) for key, value in their_call.arguments.items()}


def _stripped(value):
    return value.strip() if isinstance(value, str) else value


@relaxed
@given(data=st.data())
def test_glm_47_text_equals_that_of_renderers_for_its_heir(data, any_conversation, tokenizer, exported, tools):
    """GLM-5 kept GLM-4.7's format, and `renderers` has it."""
    from renderers.configs import GLM5RendererConfig
    from renderers.glm5 import GLM5Renderer

    messages = peer_form(data.draw(any_conversation))
    thinking, clear, prompt = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.booleans())
    peer = GLM5Renderer(exported, GLM5RendererConfig(enable_thinking=thinking, clear_thinking=clear))
    theirs = peer.render(messages, tools=tools, add_generation_prompt=prompt)
    ours = render_tokens(
        messages,
        tokenizer,
        tools=tools,
        enable_thinking=thinking,
        clear_thinking=clear,
        add_generation_prompt=prompt,
        dialect="glm-4.7",
    )
    assert ours.ids == theirs.token_ids


@relaxed
@given(data=st.data())
def test_text_equals_transformers_with_our_template(data, any_conversation, exported, tools, tokenizer):
    messages = data.draw(any_conversation)
    for message in messages:
        if message["role"] == "user" and data.draw(st.booleans()):
            message["enable_thinking"] = data.draw(st.booleans())
    options = {
        "tools": tools if data.draw(st.booleans()) else None,
        "add_generation_prompt": data.draw(st.booleans()),
        "enable_thinking": data.draw(st.sampled_from([None, True, False])),
        "clear_thinking": data.draw(st.booleans()),
    }
    theirs = exported.apply_chat_template(messages, tokenize=False, **options)
    assert theirs == render(messages, **options)
    ids = exported.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    assert ids == render_tokens(messages, tokenizer, **options).ids


@relaxed
@given(data=st.data())
def test_the_exported_template_equals_trls_copy_of_glms(data, any_conversation, tools):
    """TRL carries GLM-4.5's own template to recognise the model: ours renders what it renders."""
    from pathlib import Path

    import trl
    from transformers.utils.chat_template_utils import render_jinja_template

    original = (Path(trl.__file__).parent / "chat_templates" / "glm4moe.jinja").read_text()
    messages = data.draw(any_conversation)
    prompt = data.draw(st.booleans())
    # Left out rather than None, which the original takes for False.
    thinking = data.draw(st.sampled_from([{}, {"enable_thinking": True}, {"enable_thinking": False}]))
    (theirs,), _ = render_jinja_template(
        [messages], tools, chat_template=original, add_generation_prompt=prompt, **thinking
    )
    assert render(messages, tools=tools, add_generation_prompt=prompt, **thinking) == theirs


def test_the_mask_equals_that_of_trls_training_template(exported, tools, tokenizer):
    """TRL's template marks what the assistant generates; ours marks the same in turns that are whole."""
    from pathlib import Path

    import trl

    template = (Path(trl.__file__).parent / "chat_templates" / "glm4moe_training.jinja").read_text()
    call = {"id": "a", "type": "function", "function": {"name": "now", "arguments": {}}}
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": "Look.", "reasoning_content": "clock", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "12:00"},
        {"role": "assistant", "content": "Noon.", "reasoning_content": "read"},
    ]
    theirs = exported.apply_chat_template(
        messages, tools=tools, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = render_tokens(messages, tokenizer, tools=tools, end_turn=True)
    assert ours.ids == theirs["input_ids"]
    assert [int(produced) for produced in ours.loss_mask] == theirs["assistant_masks"]


def test_the_exported_template_refuses_what_it_cannot_render(exported):
    from jinja2.exceptions import TemplateError

    for message in (
        {"role": "robot", "content": "x"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": json.dumps({"a": 1})}}],
        },
    ):
        with pytest.raises(TemplateError):
            exported.apply_chat_template([message], tokenize=False)
