"""Reads what a GLM-4.5 model writes: reasoning, content and tool calls, from text or token ids, in any chunks.

One state machine (`glm45.text.machine`) serves all: `parse` is a stream of one chunk. It accepts GLM-4.5's calls,
with newlines, and GLM-4.7's, without. Nothing is lost: what fits nowhere (stray tags, text between arguments, a name
cut short) becomes content, as written, and a problem of the status. Only white space that the format itself puts
between parts is dropped: newlines beside tags, and blank text beside a call.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from glm45.text.deltas import Delta, join_deltas
from glm45.text.machine import AnswerMachine
from glm45.text.special_tokens import (
    ARG_KEY,
    ARG_KEY_END,
    ARG_VALUE,
    ARG_VALUE_END,
    ASSISTANT,
    EOS_TOKENS,
    SYSTEM,
    THINK,
    THINK_END,
    TOOL_CALL,
    TOOL_CALL_END,
    TOOL_RESPONSE,
    TOOL_RESPONSE_END,
)
from glm45.text.status import FormatStatus
from glm45.text.tokenizer import Tokenizer

GRAMMAR_TAGS = (THINK, THINK_END, TOOL_CALL, TOOL_CALL_END, ARG_KEY, ARG_KEY_END, ARG_VALUE, ARG_VALUE_END)
PROMPT_TAGS = (SYSTEM, ASSISTANT, TOOL_RESPONSE, TOOL_RESPONSE_END)
"""Tags that only prompts hold: stray wherever a model writes them."""
TAGS = frozenset((*GRAMMAR_TAGS, *PROMPT_TAGS, *EOS_TOKENS))
VALUE_ENDS = frozenset((ARG_VALUE_END, *EOS_TOKENS))
TAG_PATTERN = re.compile(
    r"</?(?:arg_(?:key|value)|t(?:ool_(?:call|response)|hink))>|<\|(?:user|observation|assistant|system|endoftext)\|>"
)
ARGUMENT_PATTERN = re.compile(r"<arg_key>([^<]*)</arg_key>([ \t\r\n]*)<arg_value>([^<]*)</arg_value>")
assert all(TAG_PATTERN.fullmatch(tag) for tag in TAGS)
TAG_STARTS = frozenset(tag[:length] for tag in TAGS for length in range(1, len(tag)))
LONGEST_START = max(map(len, TAG_STARTS))


class Parsed(NamedTuple):
    """An OpenAI assistant message and the status on its format."""

    message: dict[str, Any]
    status: FormatStatus


def parse(
    text: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    reasoning_open: bool = False,
    call_id_prefix: str = "call_",
) -> Parsed:
    """Return the assistant message that `text` spells and what is wrong with it; never raises for any text.

    `tools` (OpenAI's form or flat) give the types of arguments and the known names. `reasoning_open` says that the
    prompt ended in `<think>`. A call that was cut short keeps the arguments written so far, as JSON that does not
    close; `status.complete_calls` names the calls that are whole.
    """
    parser = StreamParser(tools, reasoning_open, call_id_prefix)
    deltas = parser.feed(text)
    return Parsed(join_deltas(deltas + parser.finish()), parser.status)


def parse_ids(
    ids: Sequence[int],
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]] | None = None,
    reasoning_open: bool = False,
    call_id_prefix: str = "call_",
) -> Parsed:
    """Return `parse` of token ids, where only special tokens are tags: text that spells a tag stays text."""
    parser = StreamParser(tools, reasoning_open, call_id_prefix, tokenizer)
    deltas = parser.feed_ids(ids)
    return Parsed(join_deltas(deltas + parser.finish()), parser.status)


class StreamParser:
    """The parser of a stream: feed it text, or ids with a tokenizer, in any pieces, then finish.

    `feed` returns OpenAI deltas: a call's name once and whole, its arguments as fragments of one JSON text. Joined
    (`join_deltas`), they are the same for every way of cutting the stream. `status` is complete after `finish`.
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning_open: bool = False,
        call_id_prefix: str = "call_",
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self._machine = AnswerMachine(tools, reasoning_open, call_id_prefix)
        self._position = 0  # characters fed so far
        self._held = ""  # the end of the text so far, where it may be the start of a tag
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream_decoder() if tokenizer else None

    def feed(self, text: str) -> list[Delta]:
        """Take a piece of text and return what it completes. What may be the start of a tag waits for the next."""
        machine, held = self._machine, self._held
        if not held and text and "<" not in text:
            offset = self._position
            self._position = offset + len(text)
            return machine.plain(text, offset)
        offset = self._position - len(held)  # of `text` in the stream
        self._position += len(text)
        text, self._held = held + text, ""
        at, size = 0, len(text)
        while at < size:
            if machine.in_value:
                start, tag = text.find(ARG_VALUE_END, at), ARG_VALUE_END
            else:
                match = TAG_PATTERN.search(text, at)
                start, tag = (match.start(), match[0]) if match else (-1, "")
            if start < 0:
                start = self._start_of_tag(text, at)
                if start > at:
                    machine.text(text[at:start], offset + at)
                self._held = text[start:]
                break
            if start > at:
                machine.text(text[at:start], offset + at)
            at = start + len(tag)
            if tag == ARG_KEY and machine.between_arguments and (argument := ARGUMENT_PATTERN.match(text, start)):
                key, gap, value = argument.groups()
                machine.argument(key, gap, value, offset + start)
                at = argument.end()
            elif tag in EOS_TOKENS:
                machine.end_turn(tag, offset + start)
            else:
                machine.tag(tag, offset + start)
        return machine.out.drain()

    def feed_ids(self, ids: Sequence[int]) -> list[Delta]:
        """Take token ids and return what they complete; the bytes of a character cut in two wait for the next."""
        assert self._tokenizer, "only StreamParser(tokenizer=...) reads ids"
        assert self._decoder
        machine, special = self._machine, self._tokenizer.special_tokens
        plain: list[int] = []
        for index in ids:
            tag = special.get(index)
            if tag is None or tag not in (VALUE_ENDS if machine.in_value else TAGS):
                plain.append(index)
                continue
            self._take_text(self._decoder.feed(plain) + self._decoder.finish())
            self._take_tag(tag, self._position)
            self._position += len(tag)
            plain = []
        self._take_text(self._decoder.feed(plain))
        return machine.out.drain()

    def finish(self) -> list[Delta]:
        """End the stream: return what was held back, and report what is still open."""
        self._position -= len(self._held)
        self._take_text(self._held + (self._decoder.finish() if self._decoder else ""))
        self._held = ""
        self._machine.finish(self._position)
        return self._machine.out.drain()

    def _take_text(self, text: str) -> None:
        if text:
            self._machine.text(text, self._position)
            self._position += len(text)

    def _take_tag(self, tag: str, position: int) -> None:
        if tag in EOS_TOKENS:
            self._machine.end_turn(tag, position)
        else:
            self._machine.tag(tag, position)

    @property
    def status(self) -> FormatStatus:
        """What was wrong with the format, so far."""
        return self._machine.status

    def _start_of_tag(self, text: str, at: int) -> int:
        """Return where the end of `text` may be the start of a tag, or its length."""
        start = text.rfind("<", max(at, len(text) - LONGEST_START))
        if start >= 0:
            tail = text[start:]
            if ARG_VALUE_END.startswith(tail) if self._machine.in_value else tail in TAG_STARTS:
                return start
        return len(text)
