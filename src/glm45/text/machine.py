"""The state machine behind the output parser: takes text and tags in order, gives OpenAI deltas and problems.

It knows nothing of chunks or tokens: `take_text` may be called with any pieces of a run of text, and nothing that it
emits or reports depends on where the pieces were cut.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glm45.text.arguments import convert, escape, tool_parameters, value_kind
from glm45.text.special_tokens import (
    ARG_KEY,
    ARG_KEY_END,
    ARG_VALUE,
    ARG_VALUE_END,
    EOS_TOKENS,
    THINK,
    THINK_END,
    TOOL_CALL,
    TOOL_CALL_END,
)
from glm45.text.status import FormatStatus, Problem, ProblemKind

Delta = dict[str, Any]
"""The `delta` of an OpenAI chunk: `content`, `reasoning_content` or `tool_calls`."""

WHITE_SPACE = " \t\r\n"
BAD_NAME = re.compile(r"[\s<>{}\"'`]")
LITERAL_NEWLINE = "\\n"
"""Some models write a backslash and an n after a call's name; accepted, as in SGLang."""


class AnswerMachine:
    """Reads one assistant turn.

    Every state is a pair of methods, one for text and one for tags, in `_text` and `_tag`: prose (content or
    reasoning), and within a call its name, what stands between arguments, a key, what follows a key, a value, and
    what is left of a call that was refused.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None, reasoning_open: bool, call_id_prefix: str) -> None:
        self._tools = tool_parameters(tools)
        self._call_id_prefix = call_id_prefix
        self.in_value = False
        """Whether only `</arg_value>` is a tag now."""

        self._position = 0  # characters taken so far
        self._end: str | None = None  # the token that ends the turn, once seen
        self._deltas: list[Delta] = []
        self._kind = ""  # of the fragments that wait to become one delta
        self._fragments: list[str] = []
        self._problems: list[Problem] = []

        self._prose = "reasoning_content" if reasoning_open else "content"
        self._wrote: set[str] = set()  # kinds of prose written so far
        self._fresh = not reasoning_open  # whether no tag was taken yet: reasoning may still open
        self._in_prose = False  # whether this stretch of prose has text and not only white space
        self._space: list[str] = []  # white space that is part of the prose only if text follows

        self._call = -1  # index in tool_calls
        self._call_start = 0
        self._closed_calls: list[int] = []
        self._parameters: Mapping[str, Any] = {}
        self._keys: set[str] = set()
        self._newline = ""  # what the dialect of this call puts between tags
        self._gap: list[str] = []  # white space since the last tag of the call
        self._expected_gap: str | None = ""  # what it should be; None: no longer asked
        self._in_stray = False  # whether stray text goes on that is already reported
        self._buffer: list[str] = []  # a name, key or value until it is whole
        self._key, self._key_start = "", 0
        self._value_kind = ""

        self._text: Callable[[str, int], None] = self._prose_text
        self._tag: Callable[[str], None] = self._reasoning_tag if reasoning_open else self._content_tag

    def take_text(self, text: str) -> None:
        """Take a piece of text that holds no tag."""
        if not text:
            return
        if self._end:
            self._go_on_after_end()
        self._text(text, self._position)
        self._position += len(text)

    def take_tag(self, tag: str) -> None:
        """Take a tag or a role token."""
        if self._end:
            self._go_on_after_end()
        if tag in EOS_TOKENS:
            self._end = tag
        else:
            self._tag(tag)
        self._position += len(tag)

    def finish(self) -> None:
        """Take the end of the text: give back what is held, and report what is open."""
        if self._text == self._prose_text:
            self._finish_prose()
        elif self._text == self._name_text:
            self._refuse_call("truncated_call", "the text ends in the name of a call")
        elif self._text != self._refused_text:
            self._finish_arguments()
            self._report("truncated_call", "the text ends inside a call", self._call_start, self._call)

    def drain(self) -> list[Delta]:
        """Return the deltas since the last time."""
        self._join_fragments()
        deltas, self._deltas = self._deltas, []
        return deltas

    @property
    def status(self) -> FormatStatus:
        """What was wrong so far, in the order of the text."""
        spoilt = {problem.call for problem in self._problems if problem.kind != "layout"}
        whole = tuple(call for call in self._closed_calls if call not in spoilt)
        return FormatStatus(tuple(sorted(self._problems, key=lambda problem: problem.position)), self._end, whole)

    def _emit(self, kind: str, text: str) -> None:
        if kind != self._kind:
            self._join_fragments()
            self._kind = kind
        self._fragments.append(text)

    def _join_fragments(self) -> None:
        if not self._fragments:
            return
        text = "".join(self._fragments)
        self._fragments.clear()
        if self._kind == "arguments":
            self._deltas.append({"tool_calls": [{"index": self._call, "function": {"arguments": text}}]})
        else:
            self._deltas.append({self._kind: text})

    def _report(self, kind: ProblemKind, detail: str, position: int, call: int | None = None) -> None:
        self._problems.append(Problem(kind, position, detail, call))

    def _go_on_after_end(self) -> None:
        """Take the end token for text, since more follows it."""
        end, self._end = self._end, None
        assert end is not None
        self._report("text_after_end", f"text follows {end}", self._position)
        self._text(end, self._position - len(end))

    # Prose: content and reasoning

    def _prose_text(self, text: str, position: int) -> None:
        body = text.rstrip(WHITE_SPACE)
        if not body:
            self._space.append(text)
            return
        if self._space or not self._in_prose:
            space = "".join(self._space) + body
            self._space.clear()
            # Newlines before the first text are the format's, not the answer's.
            self._emit(self._prose, space if self._prose in self._wrote else space.lstrip("\n"))
            self._wrote.add(self._prose)
            self._in_prose = True
        else:
            self._emit(self._prose, body)
        if len(body) < len(text):
            self._space.append(text[len(body) :])

    def _content_tag(self, tag: str) -> None:
        fresh = self._fresh and not self._in_prose
        if tag == TOOL_CALL:
            self._end_prose()
            self._start_call()
        elif tag == THINK and fresh:
            self._end_prose()
            self._prose, self._tag = "reasoning_content", self._reasoning_tag
        elif tag == THINK_END and fresh:
            self._end_prose()
            self._report("stray_tag", f"{THINK_END} closes reasoning that was not open", self._position)
        else:
            self._stray_tag(tag)
            self._prose_text(tag, self._position)

    def _reasoning_tag(self, tag: str) -> None:
        if tag == THINK_END:
            self._start_content()
        elif tag == TOOL_CALL:
            self._report("unclosed_reasoning", f"{TOOL_CALL} before {THINK_END}", self._position)
            self._start_content()
            self._start_call()
        else:
            self._stray_tag(tag)
            if tag != THINK or self._in_prose:  # a prompt may have opened the reasoning that the model opens again
                self._prose_text(tag, self._position)

    def _stray_tag(self, tag: str) -> None:
        self._report("stray_tag", f"{tag} has no place here", self._position)

    def _start_content(self) -> None:
        self._end_prose()
        self._prose, self._text, self._tag = "content", self._prose_text, self._content_tag

    def _end_prose(self) -> None:
        """End prose at a tag: of the white space before it, what stands on the line of the text is prose."""
        if self._in_prose and (space := "".join(self._space).partition("\n")[0]):
            self._emit(self._prose, space)
        self._space.clear()
        self._in_prose = False
        self._fresh = False

    def _finish_prose(self) -> None:
        space = "".join(self._space)
        if not self._in_prose:
            space = space.lstrip("\n") if self._fresh else ""
        if space:
            self._emit(self._prose, space)
        if self._prose == "reasoning_content":
            self._report("unclosed_reasoning", "the text ends inside reasoning", self._position)

    # Calls: the name

    def _start_call(self) -> None:
        self._call_start = self._position
        self._text, self._tag = self._name_text, self._name_tag
        self._buffer, self._gap = [], []

    def _name_text(self, text: str, position: int) -> None:
        if not self._buffer:
            name = text.lstrip(WHITE_SPACE)
            self._gap.append(text[: len(text) - len(name)])
            text, position = name, position + len(text) - len(name)
        if not text:
            return
        self._buffer.append(text)
        if "\n" not in text:
            return
        name, _, rest = "".join(self._buffer).partition("\n")
        self._open_call(name, "\n")
        if rest:
            self._text(rest, position + len(text) - len(rest))

    def _name_tag(self, tag: str) -> None:
        name = "".join(self._buffer)
        if tag == TOOL_CALL:
            self._refuse_call("unclosed_call", "another call begins in the name of a call")
            self._start_call()
        elif name and tag in (ARG_KEY, TOOL_CALL_END):
            self._open_call(name, "")
            self._tag(tag)
        else:
            self._refuse_call("bad_name", f"{tag} where the name of a call should be")
            self._tag(tag)

    def _open_call(self, text: str, newline: str) -> None:
        """Begin a call whose name is whole, or refuse it."""
        name = text.rstrip(WHITE_SPACE).removesuffix(LITERAL_NEWLINE)
        known = self._tools is not None and name in self._tools
        if not name or (BAD_NAME.search(name) and not known):
            self._buffer = [text + newline]
            self._refuse_call("bad_name", f"no function can be called {name[:80]!r}")
            return
        self._join_fragments()  # those of the call before
        self._call += 1
        if self._tools is not None and not known:
            self._report("unknown_tool", f"there is no tool {name!r}", self._call_start, self._call)
        self._parameters = (self._tools or {}).get(name, {})
        self._keys = set()
        self._newline = newline
        self._in_stray = False
        self._expected_gap = "" if name == text else None
        if name != text or "".join(self._gap):
            self._report("layout", "white space around the name", self._call_start, self._call)
            self._expected_gap = None
        self._gap = []
        self._text, self._tag = self._between_text, self._between_tag
        function = {"name": name, "arguments": ""}
        call_id = f"{self._call_id_prefix}{self._call}"
        self._deltas.append(
            {"tool_calls": [{"index": self._call, "id": call_id, "type": "function", "function": function}]}
        )
        self._emit("arguments", "{")

    def _refuse_call(self, kind: ProblemKind, detail: str) -> None:
        """Take what was read of a call without a good name for content, and what follows up to its end as well."""
        self._report(kind, detail, self._call_start)
        self._write_stray(TOOL_CALL + "".join(self._gap) + "".join(self._buffer))
        self._text, self._tag = self._refused_text, self._refused_tag

    def _refused_text(self, text: str, position: int) -> None:
        self._write_stray(text)

    def _refused_tag(self, tag: str) -> None:
        if tag == TOOL_CALL:
            self._start_call()
            return
        self._write_stray(tag)
        if tag == TOOL_CALL_END:
            self._start_content()

    def _write_stray(self, text: str) -> None:
        """Make content of what fits nowhere, as it is written."""
        self._emit("content", text)
        self._wrote.add("content")

    # Calls: between arguments

    def _between_text(self, text: str, position: int) -> None:
        if not self._in_stray:
            body = text.lstrip(WHITE_SPACE)
            self._gap.append(text[: len(text) - len(body)])
            if not body:
                return
            self._report(
                "stray_text", "text between the arguments of a call", position + len(text) - len(body), self._call
            )
            self._in_stray = True
            text = body
        self._write_stray(text)

    def _between_tag(self, tag: str) -> None:
        self._check_gap()
        self._in_stray = False
        if tag == ARG_KEY:
            self._key_start = self._position
            self._buffer = []
            self._text, self._tag = self._key_text, self._key_tag
        elif tag == TOOL_CALL_END:
            self._emit("arguments", "}")
            self._closed_calls.append(self._call)
            self._start_content()
        elif tag == TOOL_CALL:
            self._report("unclosed_call", f"another call begins before {TOOL_CALL_END}", self._position, self._call)
            self._start_call()
        else:
            self._report("stray_tag", f"{tag} between the arguments of a call", self._position, self._call)
            self._write_stray(tag)
            self._in_stray = True

    def _check_gap(self) -> None:
        """Report, once a call, white space that neither template writes."""
        gap, self._gap = "".join(self._gap), []
        if self._expected_gap is not None and gap != self._expected_gap:
            self._report("layout", "white space between the tags of a call", self._position, self._call)
            self._expected_gap = None

    def _expect_newline(self) -> None:
        if self._expected_gap is not None:
            self._expected_gap = self._newline

    # Calls: keys

    def _key_text(self, text: str, position: int) -> None:
        self._buffer.append(text)

    def _key_tag(self, tag: str) -> None:
        written = "".join(self._buffer)
        if tag == ARG_KEY_END:
            self._key = written
            self._expect_newline()
            self._text, self._tag = self._after_key_text, self._after_key_tag
        else:
            self._report("unclosed_key", f"{tag} before {ARG_KEY_END}", self._key_start, self._call)
            self._write_stray(ARG_KEY + written)
            self._go_between()
            self._tag(tag)

    def _after_key_text(self, text: str, position: int) -> None:
        if text.strip(WHITE_SPACE):
            self._give_up_key()
            self._in_stray = True
            self._write_stray(text)
        else:
            self._gap.append(text)

    def _after_key_tag(self, tag: str) -> None:
        if tag == ARG_VALUE:
            self._check_gap()
            self._start_value()
        else:
            self._give_up_key()
            self._tag(tag)

    def _give_up_key(self) -> None:
        detail = f"no {ARG_VALUE} after the key {self._key[:80]!r}"
        self._report("missing_value", detail, self._key_start, self._call)
        self._write_stray(ARG_KEY + self._key + ARG_KEY_END + "".join(self._gap))
        self._go_between()

    def _go_between(self) -> None:
        self._gap = []
        self._text, self._tag = self._between_text, self._between_tag

    # Calls: values

    def _start_value(self) -> None:
        key = self._key.strip(WHITE_SPACE)
        if key in self._keys:
            self._report("duplicate_argument", f"the key {key[:80]!r} again", self._key_start, self._call)
        self._emit("arguments", f'{self._separator()}"{escape(key)}": ')
        self._keys.add(key)
        self._value_kind = value_kind(self._parameters, key)
        if self._value_kind == "string":
            self._emit("arguments", '"')
        self._buffer = []
        self.in_value = True
        self._text, self._tag = self._value_text, self._value_tag

    def _separator(self) -> str:
        return ", " if self._keys else ""

    def _value_text(self, text: str, position: int) -> None:
        if self._value_kind == "string":
            self._emit("arguments", escape(text))
            return
        self._buffer.append(text)
        if self._value_kind == "nullable_string":
            written = "".join(self._buffer)
            if not "null".startswith(written):
                self._value_kind = "string"
                self._emit("arguments", '"' + escape(written))

    def _value_tag(self, tag: str) -> None:
        assert tag == ARG_VALUE_END, tag
        written = "".join(self._buffer)
        if self._value_kind == "string":
            self._emit("arguments", '"')
        elif self._value_kind == "nullable_string":
            self._emit("arguments", "null" if written == "null" else f'"{escape(written)}"')
        else:
            converted = convert(written, "unknown" if self._value_kind == "unknown" else "json")
            self._emit("arguments", converted.json)
            if converted.problem:
                self._report("not_json", f"{self._key[:80]!r} is {converted.problem}", self._key_start, self._call)
        self.in_value = False
        self._expect_newline()
        self._go_between()

    def _finish_arguments(self) -> None:
        """Put what was cut short in the arguments, as JSON text that does not close."""
        if self._text == self._key_text:
            self._emit("arguments", f'{self._separator()}"{escape("".join(self._buffer))}')
        elif self._text == self._after_key_text:
            self._emit("arguments", f'{self._separator()}"{escape(self._key)}"')
        elif self._text == self._value_text and self._value_kind != "string":
            self._emit("arguments", f'"{escape("".join(self._buffer))}')
