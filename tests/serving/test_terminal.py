"""The conversation in a terminal: what is typed reaches the model, what it says is kept; the engine is scripted."""

import io
import json
import os
import signal
import threading

import pytest
from rich.console import Console

from glm45.serving.service import Service
from glm45.serving.terminal import Terminal

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def converse(engine, tokenizer):
    """Return a function that types lines and gives the terminal and what it showed."""

    def converse(*lines):
        typed = iter(lines)

        def read(prompt):
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        screen = io.StringIO()
        terminal = Terminal(Service(engine, tokenizer, "tiny"), Console(file=screen, width=200), read)
        terminal.run()
        assert engine.num_open == 0
        return terminal, screen.getvalue()

    return converse


def test_an_answer_is_shown_and_kept(converse):
    """Reasoning and content appear, and the next question carries them."""
    terminal, screen = converse("hi", "and then?")
    assert screen.count("Let me think.") == screen.count("The answer is 42.") == 2
    assert "tokens" in screen
    assert [message["role"] for message in terminal.said.messages] == ["user", "assistant"] * 2
    assert terminal.said.messages[1]["content"] == "The answer is 42."


def test_settings_reach_the_engine(converse, engine, tokenizer):
    """System prompt, thinking switch and sampling settings are those of the request."""
    converse("/system Be brief.", "/nothink", "/set temperature=0.5", "/set seed=3", "hi\\", "there")
    asked = engine.asked[-1]
    prompt = tokenizer.decode(asked.prompt)
    assert "<|system|>\nBe brief.<|user|>\nhi\nthere/nothink" in prompt
    assert prompt.endswith("<think></think>")
    assert (asked.params.temperature, asked.params.seed) == (0.5, 3)


def test_a_call_asks_for_its_result_and_goes_on(converse, engine, tokenizer, tmp_path):
    """The model calls a tool, the user types its result, the model answers."""
    (tmp_path / "tools.json").write_text(json.dumps([TOOL]))
    says = iter(["<think></think>\n<tool_call>add\n</tool_call><|observation|>", "<think></think>\nIt is 3.<|user|>"])
    engine.text = lambda prompt, index: next(says)
    terminal, screen = converse(f"/tools {tmp_path / 'tools.json'}", "1 + 2?", "three")
    assert "It is 3." in screen
    assert "<tool_response>\nthree\n</tool_response>" in tokenizer.decode(engine.asked[-1].prompt)
    assert [message["role"] for message in terminal.said.messages] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize("limit", [14, 20])
def test_a_call_that_is_cut_short_is_dropped(converse, engine, tmp_path, limit):
    """At the token limit, too: nobody could answer it, and the conversation goes on."""
    (tmp_path / "tools.json").write_text(json.dumps([TOOL]))
    engine.text = (
        "<think></think>\nWait.\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1 2 3 4 5 6 7 8 9</arg_value>"
    )
    terminal, screen = converse(f"/tools {tmp_path / 'tools.json'}", f"/set max_tokens={limit}", "1 + 2?", "hello?")
    assert "cut at the token limit" in screen
    assert [message["role"] for message in terminal.said.messages] == ["user", "assistant"] * 2
    assert not any("tool_calls" in message for message in terminal.said.messages)


def test_ctrl_c_stops_an_answer_of_which_nothing_has_come(converse, engine):
    """Not only at the next token."""
    engine.held = True
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    terminal, screen = converse("hi")
    timer.join()
    assert "stopped" in screen
    assert terminal.said.messages[-1] == {"role": "assistant", "content": ""}


def test_the_share_of_accepted_drafts_is_shown(converse, engine):
    engine.text = lambda prompt, index: engine.stats_now.update(drafted_tokens=8, accepted_tokens=6) or "ok<|user|>"
    assert "MTP 75% accepted" in converse("hi")[1]


def test_commands(converse, tmp_path):
    """Taking back, starting anew, saving; what is wrong is said and harms nothing."""
    file = tmp_path / "chat.json"
    terminal, screen = converse(
        "hi", "again", "/undo", f"/save {file}", "/retry", "/set temperature=-1", "/set nonsense", "/nothing", "/help"
    )
    assert len(terminal.said.messages) == 2
    assert json.loads(file.read_text())[0] == {"role": "user", "content": "hi"}
    assert "there is no /nothing" in screen
    assert "temperature" in screen
    assert terminal.said.settings == {}
    assert converse("hi", "/new")[0].said.messages == []


def test_failures_are_told_and_the_conversation_goes_on(converse, engine):
    """A question that cannot be served is taken back."""
    terminal, screen = converse("/set max_tokens=100000", "hi", "/set max_tokens=", "hi")
    assert "lower max_tokens" in screen
    assert len(terminal.said.messages) == 2
