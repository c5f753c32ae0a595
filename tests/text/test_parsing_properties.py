"""What holds for every text: parsing inverts rendering, cutting changes nothing, nothing raises, nothing is lost."""

import itertools
import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45.text import parsing
from glm45.text.chat import render, render_tokens
from glm45.text.machine import AnswerMachine
from glm45.text.parsing import TAG_PATTERN, StreamParser, join_deltas, parse, parse_ids

USER = {"role": "user", "content": "q"}

ALPHABET = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    *(
        "<|user|>",
        "<|observation|>",
        "<|endoftext|>",
        "<|assistant|>",
        "<tool_response>",
        "<",
        "</",
        "<|",
        ">",
        "<tool_",
    ),
    *(
        "\n",
        " ",
        "\\n",
        "get_weather",
        "now",
        "city",
        "days",
        "note",
        "null",
        "3",
        '"',
        "\\",
        "{",
        "x y",
        "é🎉",
        "True",
    ),
]
"""What a model could write at its worst: all tags, parts of tags, names, keys, values, white space."""


def random_text(rng):
    return "".join(rng.choices(ALPHABET, k=rng.randrange(1, 24)))


def stream(text, cuts, tools, reasoning_open=False):
    """The deltas and the status of a text that comes in pieces, cut at the given places."""
    parser = StreamParser(tools, reasoning_open)
    places = [0, *sorted(cuts), len(text)]
    deltas = []
    for start, end in itertools.pairwise(places):
        deltas += parser.feed(text[start:end])
    return deltas + parser.finish(), parser.status


def written(message):
    """Everything that a message holds, as one text."""
    parts = [message["content"] or "", message.get("reasoning_content", "")]
    for call in message.get("tool_calls", ()):
        parts += [call["function"]["name"], call["function"]["arguments"]]
    return "".join(parts)


def check_nothing_is_lost(text):
    """Every character outside tags, white space aside, is in the message (escaping and stray tags only add some)."""
    said = Counter("".join(TAG_PATTERN.sub("", text).split()))
    missing = said - Counter(written(parse(text).message))
    missing["n"] -= text.count("\\n")  # a literal newline after a name is part of the format
    missing["\\"] -= text.count("\\n")
    assert not +missing, (text, missing)


def check_stream(rng, text, tools):
    reasoning_open = rng.random() < 0.2
    message, status = parse(text, tools, reasoning_open)
    cuts = rng.choices(range(len(text) + 1), k=rng.randrange(0, 9)) if rng.random() < 0.7 else range(len(text))
    deltas, streamed_status = stream(text, cuts, tools, reasoning_open)
    assert join_deltas(deltas) == message, text
    assert streamed_status == status, text
    calls = message.get("tool_calls", [])
    opened = [call for delta in deltas for call in delta.get("tool_calls", ()) if "id" in call]
    assert [call["index"] for call in opened] == list(range(len(calls))), text
    for index, call in enumerate(calls):
        if index in status.complete_calls:
            json.loads(call["function"]["arguments"])
    truncated = {problem.call for problem in status.problems if problem.kind in ("truncated_call", "unclosed_call")}
    for index in truncated - {None}:
        with pytest.raises(json.JSONDecodeError):
            json.loads(calls[index]["function"]["arguments"])


def fuzz(count, seed, tools):
    rng = random.Random(seed)
    for _ in range(count):
        text = random_text(rng)
        check_stream(rng, text, tools if rng.random() < 0.5 else None)
        check_nothing_is_lost(text)


def test_random_tags_never_raise_lose_or_depend_on_chunks(tools):
    fuzz(2_000, 1, tools)


@pytest.mark.slow
def test_a_hundred_thousand_random_strings(tools):
    fuzz(100_000, 2, tools)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_way_of_cutting_gives_the_one_chunk_parse(data, tools):
    text = "".join(data.draw(st.lists(st.sampled_from(ALPHABET), max_size=30)))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    deltas, status = stream(text, cuts, tools)
    assert (join_deltas(deltas), status) == parse(text, tools)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), dialect=st.sampled_from(["glm-4.5", "glm-4.7"]))
def test_parsing_inverts_rendering(data, dialect, any_answer, tools):
    """What the renderer writes for a message parses to that message, without a problem, however it is cut."""
    message = data.draw(any_answer)
    thinking = "reasoning_content" in message or (dialect == "glm-4.5" and data.draw(st.booleans()))
    options = {"tools": tools, "dialect": dialect, "enable_thinking": thinking}
    prompt = render([USER], add_generation_prompt=True, **options)
    text = render([USER, message], **options).removeprefix(prompt)
    reasoning_open = prompt.endswith("<think>")
    parsed = parse(text, tools, reasoning_open)
    wanted = [
        (call["id"], call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])
    ]
    calls = parsed.message.get("tool_calls", [])
    got = [(call["id"], call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
    assert got == wanted
    assert parsed.message["content"] == message["content"]
    assert parsed.message.get("reasoning_content") == message.get("reasoning_content")
    assert parsed.status.exact
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    deltas, status = stream(text, cuts, tools, reasoning_open)
    assert (join_deltas(deltas), status) == parsed
    again = {**parsed.message, "tool_calls": calls}
    assert render([USER, again], **options) == prompt + text


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_ids_parse_as_their_text(data, any_answer, tokenizer, tools):
    """Sampled ids, fed one by one, give what their text gives, as long as the text spells no tag."""
    message = data.draw(any_answer)
    rendered = render_tokens([USER, message], tokenizer, tools=tools, end_turn=True)
    ids = [index for index, produced in zip(rendered.ids, rendered.loss_mask, strict=True) if produced]
    parsed = parse_ids(ids, tokenizer, tools)
    assert parsed == parse(tokenizer.decode(ids), tools)
    assert parsed.status.exact
    assert parsed.status.end == ("<|observation|>" if "tool_calls" in message else "<|user|>")
    parser = StreamParser(tools, tokenizer=tokenizer)
    deltas = [delta for index in ids for delta in parser.feed_ids([index])] + parser.finish()
    assert (join_deltas(deltas), parser.status) == parsed


@settings(max_examples=100, deadline=None)
@given(data=st.data(), said=st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=8).map("".join))
def test_ids_keep_tags_that_are_only_spelt(data, said, tokenizer, tools):
    """An argument may spell any tag: from ids it comes back exactly, where text would be ambiguous."""
    call = {"id": "call_0", "type": "function", "function": {"name": "get_weather", "arguments": {"city": said}}}
    message = {"role": "assistant", "content": f"x{said}x", "reasoning_content": f"x{said}x", "tool_calls": [call]}
    rendered = render_tokens([USER, message], tokenizer, tools=tools, end_turn=True)
    ids = [index for index, produced in zip(rendered.ids, rendered.loss_mask, strict=True) if produced]
    parsed = parse_ids(ids, tokenizer, tools)
    assert parsed.status.exact
    assert parsed.message["content"] == parsed.message["reasoning_content"] == f"x{said}x"
    assert json.loads(parsed.message["tool_calls"][0]["function"]["arguments"]) == {"city": said}


@pytest.mark.parametrize(
    "piece", ["\n", " ", "<", "a", "<tool_call>", "<tool_call>f\n", "<arg_key>", "<think>", "<|user|>", "\nab"]
)
def test_work_is_linear_in_length(piece, monkeypatch):
    """A hostile repetition, piece by piece: no character is looked at, or handed on, more than a few times."""
    seen = Counter()

    def counting(function, name, length):
        def counted(self, *arguments):
            seen[name] += length(*arguments)
            return function(self, *arguments)

        return counted

    class CountingPattern:
        def search(self, text, at):
            seen["scanned"] += len(text) - at
            return TAG_PATTERN.search(text, at)

    monkeypatch.setattr(parsing, "TAG_PATTERN", CountingPattern())
    for state in ("_prose_text", "_name_text", "_refused_text", "_between_text", "_key_text", "_value_text"):
        handler = getattr(AnswerMachine, state)
        monkeypatch.setattr(AnswerMachine, state, counting(handler, "handed on", lambda text, position: len(text)))
    for opening in ("", "<tool_call>", "<tool_call>f\n<arg_key>", "<tool_call>f\n<arg_key>k</arg_key><arg_value>"):
        seen.clear()
        parser = StreamParser()
        parser.feed(opening)
        for _ in range(1_000):
            parser.feed(piece)
        parser.finish()
        assert seen["scanned"] <= 1_000 * 18 + len(piece) * 1_000 + len(opening) ** 2
        assert seen["handed on"] <= 3 * (1_000 * len(piece) + len(opening))
