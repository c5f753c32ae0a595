"""A small tokenizer, and generators of conversations and model outputs, for every test of this room."""

import json
from pathlib import Path

import pytest
from hypothesis import strategies as st

from glm45.text.tokenizer import Tokenizer

WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "filters": {"type": "object"},
                "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            },
            "required": ["city"],
        },
    },
}
CLOCK_TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="session")
def tools():
    return [WEATHER_TOOL, CLOCK_TOOL]


@pytest.fixture(scope="session")
def tokenizer():
    sources = sorted(Path(json.__file__).parent.glob("*.py"))
    return Tokenizer.train((path.read_text() for path in sources), 700)


@pytest.fixture(scope="session")
def any_conversation():
    """Strategy: conversations with system, tools, reasoning, parallel calls, cut anywhere."""
    return conversations()


@pytest.fixture(scope="session")
def any_answer():
    """Strategy: one assistant message in the form that parsing gives back."""
    return answers()


# Text without tags: quotes, newlines, spaces, several scripts and angle brackets.
plain_text = st.text(st.sampled_from("ab1 \n\"'\\{}<>/&é上🎉,:-"), max_size=12)
visible_text = plain_text.filter(lambda text: text.strip() != "")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | plain_text,
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)


@st.composite
def tool_calls(draw):
    """Calls of the two tools, arguments of the types that their schemas ask for."""
    calls = []
    for index in range(draw(st.integers(1, 3))):
        arguments = {}
        name = draw(st.sampled_from(["get_weather", "now"]))
        if name == "get_weather":
            arguments["city"] = draw(plain_text)
            if draw(st.booleans()):
                arguments["days"] = draw(st.integers(-5, 5))
            if draw(st.booleans()):
                arguments["filters"] = {"k": draw(json_values)}
            if draw(st.booleans()):
                arguments["note"] = draw(st.none() | plain_text.filter(lambda text: text != "null"))
        calls.append({"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


@st.composite
def assistant_messages(draw, calls=True):
    message = {"role": "assistant", "content": draw(plain_text)}
    if draw(st.booleans()):
        message["reasoning_content"] = draw(plain_text)
    if calls and draw(st.booleans()):
        message["tool_calls"] = draw(tool_calls())
    return message


@st.composite
def conversations(draw):
    """A system message perhaps, then rounds of a user, an assistant, and tool results with an answer to them."""
    messages = [{"role": "system", "content": draw(plain_text)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(plain_text)})
        reply = draw(assistant_messages())
        messages.append(reply)
        for call in reply.get("tool_calls", ()):
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": draw(plain_text)})
        if "tool_calls" in reply:
            messages.append(draw(assistant_messages(calls=False)))
    return messages[: draw(st.integers(1, len(messages)))]


@st.composite
def answers(draw):
    """An assistant message as the parser gives it: content and reasoning without white space around, or absent."""
    message = {"role": "assistant", "content": draw(plain_text).strip() or None}
    if reasoning := draw(plain_text).strip():
        message["reasoning_content"] = reasoning
    if draw(st.booleans()):
        message["tool_calls"] = draw(tool_calls())
    return message
