"""The state machine behind the output parser: takes text and tags in order, writes OpenAI deltas and problems.

It knows nothing of chunks or tokens: a run of text may come in any pieces, and nothing that the machine emits or
reports depends on where they were cut.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glm45.text.arguments import ValueKind, convert, escape, tool_parameters, value_kind
from glm45.text.deltas import Delta, DeltaWriter, FragmentKind
from glm45.text.special_tokens import (
    ARG_KEY,
    ARG_KEY_END,
    ARG_VALUE,
    ARG_VALUE_END,
    THINK,
    THINK_END,
    TOOL_CALL,
    TOOL_CALL_END,
)
from glm45.text.status import FormatStatus, Problem, ProblemKind

WHITE_SPACE = " \t\r\n"
BAD_NAME = re.compile(r"[\s<>{}\"'`]")
LITERAL_NEWLINE = "\\n"
"""Some models write a backslash and an n after a call's name; accepted, as in SGLang."""


Handler = Callable[[str, int], None]
"""Takes a piece of text that holds no tag and is not empty, or a tag; and how many characters came before it."""


class AnswerMachine:
    """Reads one assistant turn.

    Every state is a pair of methods, in `text` and `tag`, that the caller hands the turn to: prose (content or
    reasoning), and within a call its name, what stands between arguments, a key, what follows a key, a value, and
    what is left of a call that was refused.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None, reasoning_open: bool, call_id_prefix: str) -> None:
        self._tools = tool_parameters(tools)
        self.out = DeltaWriter(call_id_prefix)
        self.in_value = False
        """Whether only `</arg_value>` is a tag now."""

        self._end: str | None = None  # the token that ends the turn, once seen
        self._problems: list[Problem] = []

        self._prose: FragmentKind = "reasoning_content" if reasoning_open else "content"
        self._wrote: set[str] = set()  # kinds of prose written so far
        self._fresh = not reasoning_open  # whether no tag was taken yet: reasoning may still open
        self._in_prose = False  # whether this stretch of prose has text and not only white space
        self._space: list[str] = []  # white space that is part of the prose only if text follows

        self._call_start = 0
        self._closed_calls: list[int] = []
        self._parameters: Mapping[str, Any] = {}
        self._kinds: dict[str, ValueKind] = {}  # of the parameters seen of this tool
        self._kinds_by_tool: dict[str, dict[str, ValueKind]] = {}
        self._keys: set[str] = set()
        self._newline = ""  # what the dialect of this call puts between tags
        self._gap: list[str] = []  # white space since the last tag of the call
        self._expected_gap: str | None = ""  # what it should be; None: no longer asked
        self._in_stray = False  # whether stray text goes on that is already reported
        self._buffer: list[str] = []  # a name, key or value until it is whole
        self._key, self._key_start = "", 0
        self._value_kind: ValueKind = "unknown"

        self.text: Handler = self._prose_text
        self.tag: Handler = self._reasoning_tag if reasoning_open else self._content_tag
        self._after_end: tuple[Handler, Handler] = (self.text, self.tag)

    def plain(self, text: str, position: int) -> list[Delta]:
        """Take a piece that holds no part of a tag and return its deltas: inside a long text, most pieces are one."""
        if self._end is None:
            if self.in_value and self._value_kind == "string":
                return [self.out.delta("arguments", escape(text))]
            if self._in_prose and not self._space and not text[-1].isspace():
                return [{self._prose: text}]
        self.text(text, position)
        return self.out.drain()

    def end_turn(self, token: str, position: int) -> None:
        """Take a token that ends the turn: if anything follows, it was text after all."""
        if self._end:
            self._go_on_after_end(position)
        self._end = token
        self._after_end = self.text, self.tag
        self.text, self.tag = self._text_after_end, self._tag_after_end

    def finish(self, position: int) -> None:
        """Take the end of the text: give back what is held, and report what is open."""
        text, _ = self._after_end if self._end else (self.text, self.tag)
        if text == self._prose_text:
            self._finish_prose(position)
        elif text == self._name_text:
            self._refuse_call("truncated_call", "the text ends in the name of a call")
        elif text != self._refused_text:
            self._finish_arguments(text)
            self._report("truncated_call", "the text ends inside a call", self._call_start, self.out.call)

    @property
    def status(self) -> FormatStatus:
        """What was wrong so far, in the order of the text."""
        spoilt = {problem.call for problem in self._problems if problem.kind != "layout"}
        whole = tuple(call for call in self._closed_calls if call not in spoilt)
        return FormatStatus(tuple(sorted(self._problems, key=lambda problem: problem.position)), self._end, whole)

    def _report(self, kind: ProblemKind, detail: str, position: int, call: int | None = None) -> None:
        self._problems.append(Problem(kind, position, detail, call))

    def _text_after_end(self, text: str, position: int) -> None:
        self._go_on_after_end(position)
        self.text(text, position)

    def _tag_after_end(self, tag: str, position: int) -> None:
        self._go_on_after_end(position)
        self.tag(tag, position)

    def _go_on_after_end(self, position: int) -> None:
        """Take the end token for text, since more follows it."""
        end, self._end = self._end, None
        assert end is not None
        self.text, self.tag = self._after_end
        self._report("text_after_end", f"text follows {end}", position)
        self.text(end, position - len(end))

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
            self.out.write(self._prose, space if self._prose in self._wrote else space.lstrip("\n"))
            self._wrote.add(self._prose)
            self._in_prose = True
        else:
            self.out.write(self._prose, body)
        if len(body) < len(text):
            self._space.append(text[len(body) :])

    def _content_tag(self, tag: str, position: int) -> None:
        fresh = self._fresh and not self._in_prose
        if tag == TOOL_CALL:
            self._end_prose()
            self._start_call(position)
        elif tag == THINK and fresh:
            self._end_prose()
            self._prose, self.tag = "reasoning_content", self._reasoning_tag
        elif tag == THINK_END and fresh:
            self._end_prose()
            self._report("stray_tag", f"{THINK_END} closes reasoning that was not open", position)
        else:
            self._stray_tag(tag, position)
            self._prose_text(tag, position)

    def _reasoning_tag(self, tag: str, position: int) -> None:
        if tag == THINK_END:
            self._start_content()
        elif tag == TOOL_CALL:
            self._report("unclosed_reasoning", f"{TOOL_CALL} before {THINK_END}", position)
            self._start_content()
            self._start_call(position)
        else:
            self._stray_tag(tag, position)
            if tag != THINK or self._in_prose:  # a prompt may have opened the reasoning that the model opens again
                self._prose_text(tag, position)

    def _stray_tag(self, tag: str, position: int) -> None:
        self._report("stray_tag", f"{tag} has no place here", position)

    def _start_content(self) -> None:
        self._end_prose()
        self._prose, self.text, self.tag = "content", self._prose_text, self._content_tag

    def _end_prose(self) -> None:
        """End prose at a tag: of the white space before it, what stands on the line of the text is prose."""
        if self._in_prose and (space := "".join(self._space).partition("\n")[0]):
            self.out.write(self._prose, space)
        self._space.clear()
        self._in_prose = False
        self._fresh = False

    def _finish_prose(self, position: int) -> None:
        space = "".join(self._space)
        if not self._in_prose:
            space = space.lstrip("\n") if self._fresh else ""
        if space:
            self.out.write(self._prose, space)
        if self._prose == "reasoning_content":
            self._report("unclosed_reasoning", "the text ends inside reasoning", position)

    # Calls: the name

    def _start_call(self, position: int) -> None:
        self._call_start = position
        self.text, self.tag = self._name_text, self._name_tag
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
            self.text(rest, position + len(text) - len(rest))

    def _name_tag(self, tag: str, position: int) -> None:
        name = "".join(self._buffer)
        if tag == TOOL_CALL:
            self._refuse_call("unclosed_call", "another call begins in the name of a call")
            self._start_call(position)
        elif name and tag in (ARG_KEY, TOOL_CALL_END):
            self._open_call(name, "")
            self.tag(tag, position)
        else:
            self._refuse_call("bad_name", f"{tag} where the name of a call should be")
            self.tag(tag, position)

    def _open_call(self, text: str, newline: str) -> None:
        """Begin a call whose name is whole, or refuse it."""
        name = text.rstrip(WHITE_SPACE).removesuffix(LITERAL_NEWLINE)
        known = self._tools is not None and name in self._tools
        if not name or (not known and BAD_NAME.search(name)):
            self._buffer = [text + newline]
            self._refuse_call("bad_name", f"no function can be called {name[:80]!r}")
            return
        self.out.open_call(name)
        if self._tools is not None and not known:
            self._report("unknown_tool", f"there is no tool {name!r}", self._call_start, self.out.call)
        self._parameters = (self._tools or {}).get(name, {})
        self._kinds = self._kinds_by_tool.setdefault(name, {})
        self._keys = set()
        self._newline = newline
        self._in_stray = False
        self._expected_gap = "" if name == text else None
        if name != text or "".join(self._gap):
            self._report("layout", "white space around the name", self._call_start, self.out.call)
            self._expected_gap = None
        self._gap = []
        self.text, self.tag = self._between_text, self._between_tag
        self.out.write("arguments", "{")

    def _refuse_call(self, kind: ProblemKind, detail: str) -> None:
        """Take what was read of a call without a good name for content, and what follows up to its end as well."""
        self._report(kind, detail, self._call_start)
        self._write_stray(TOOL_CALL + "".join(self._gap) + "".join(self._buffer))
        self.text, self.tag = self._refused_text, self._refused_tag

    def _refused_text(self, text: str, position: int) -> None:
        self._write_stray(text)

    def _refused_tag(self, tag: str, position: int) -> None:
        if tag == TOOL_CALL:
            self._start_call(position)
            return
        self._write_stray(tag)
        if tag == TOOL_CALL_END:
            self._start_content()

    def _write_stray(self, text: str) -> None:
        """Make content of what fits nowhere, as it is written."""
        self.out.write("content", text)
        self._wrote.add("content")

    # Calls: between arguments

    def _between_text(self, text: str, position: int) -> None:
        if not self._in_stray:
            body = text.lstrip(WHITE_SPACE)
            self._gap.append(text[: len(text) - len(body)])
            if not body:
                return
            self._report(
                "stray_text", "text between the arguments of a call", position + len(text) - len(body), self.out.call
            )
            self._in_stray = True
            text = body
        self._write_stray(text)

    def _between_tag(self, tag: str, position: int) -> None:
        self._check_gap(position)
        self._in_stray = False
        if tag == ARG_KEY:
            self._key_start = position
            self._buffer = []
            self.text, self.tag = self._key_text, self._key_tag
        elif tag == TOOL_CALL_END:
            self.out.write("arguments", "}")
            self._closed_calls.append(self.out.call)
            self._start_content()
        elif tag == TOOL_CALL:
            self._report("unclosed_call", f"another call begins before {TOOL_CALL_END}", position, self.out.call)
            self._start_call(position)
        else:
            self._report("stray_tag", f"{tag} between the arguments of a call", position, self.out.call)
            self._write_stray(tag)
            self._in_stray = True

    def _check_gap(self, position: int) -> None:
        """Report, once a call, white space that neither template writes."""
        expected, gap = self._expected_gap, self._gap
        self._gap = []
        if expected is not None and expected != "".join(gap):
            self._report("layout", "white space between the tags of a call", position, self.out.call)
            self._expected_gap = None

    def _expect_newline(self) -> None:
        if self._expected_gap is not None:
            self._expected_gap = self._newline

    @property
    def between_arguments(self) -> bool:
        """Whether an argument may begin here."""
        return self.text == self._between_text

    def argument(self, key: str, gap: str, value: str, position: int) -> None:
        """Take a whole argument at once, with the white space before its value: quicker than its four tags."""
        self._between_tag(ARG_KEY, position)
        self._key = key
        self._expect_newline()
        self._gap = [gap]
        self._check_gap(position + len(ARG_KEY) + len(key) + len(ARG_KEY_END) + len(gap))
        self._start_value()
        if value:
            self._value_text(value, position)
        self._value_tag(ARG_VALUE_END, position)

    # Calls: keys

    def _key_text(self, text: str, position: int) -> None:
        self._buffer.append(text)

    def _key_tag(self, tag: str, position: int) -> None:
        written = "".join(self._buffer)
        if tag == ARG_KEY_END:
            self._key = written
            self._expect_newline()
            self.text, self.tag = self._after_key_text, self._after_key_tag
        else:
            self._report("unclosed_key", f"{tag} before {ARG_KEY_END}", self._key_start, self.out.call)
            self._write_stray(ARG_KEY + written)
            self._go_between()
            self.tag(tag, position)

    def _after_key_text(self, text: str, position: int) -> None:
        if text.strip(WHITE_SPACE):
            self._give_up_key()
            self._in_stray = True
            self._write_stray(text)
        else:
            self._gap.append(text)

    def _after_key_tag(self, tag: str, position: int) -> None:
        if tag == ARG_VALUE:
            self._check_gap(position)
            self._start_value()
        else:
            self._give_up_key()
            self.tag(tag, position)

    def _give_up_key(self) -> None:
        detail = f"no {ARG_VALUE} after the key {self._key[:80]!r}"
        self._report("missing_value", detail, self._key_start, self.out.call)
        self._write_stray(ARG_KEY + self._key + ARG_KEY_END + "".join(self._gap))
        self._go_between()

    def _go_between(self) -> None:
        self._gap = []
        self.text, self.tag = self._between_text, self._between_tag

    # Calls: values

    def _start_value(self) -> None:
        key = self._key.strip(WHITE_SPACE)
        if key in self._keys:
            self._report("duplicate_argument", f"the key {key[:80]!r} again", self._key_start, self.out.call)
        self.out.write("arguments", f'{self._separator()}"{escape(key)}": ')
        self._keys.add(key)
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = value_kind(self._parameters, key)
        self._value_kind = kind
        if self._value_kind == "string":
            self.out.write("arguments", '"')
        self._buffer = []
        self.in_value = True
        self.text, self.tag = self._value_text, self._value_tag

    def _separator(self) -> str:
        return ", " if self._keys else ""

    def _value_text(self, text: str, position: int) -> None:
        if self._value_kind == "string":
            self.out.write("arguments", escape(text))
            return
        self._buffer.append(text)
        if self._value_kind == "nullable_string":
            written = "".join(self._buffer)
            if not "null".startswith(written):
                self._value_kind = "string"
                self.out.write("arguments", '"' + escape(written))

    def _value_tag(self, tag: str, position: int) -> None:
        assert tag == ARG_VALUE_END, tag
        written = "".join(self._buffer)
        if self._value_kind == "string":
            self.out.write("arguments", '"')
        elif self._value_kind == "nullable_string":
            self.out.write("arguments", "null" if written == "null" else f'"{escape(written)}"')
        else:
            converted = convert(written, self._value_kind)
            self.out.write("arguments", converted.json)
            if converted.problem:
                self._report("not_json", f"{self._key[:80]!r} is {converted.problem}", self._key_start, self.out.call)
        self.in_value = False
        self._expect_newline()
        self._go_between()

    def _finish_arguments(self, state: Handler) -> None:
        """Put what was cut short in the arguments, as JSON text that does not close."""
        if state == self._key_text:
            self.out.write("arguments", f'{self._separator()}"{escape("".join(self._buffer))}')
        elif state == self._after_key_text:
            self.out.write("arguments", f'{self._separator()}"{escape(self._key)}"')
        elif state == self._value_text and self._value_kind != "string":
            self.out.write("arguments", f'"{escape("".join(self._buffer))}')
