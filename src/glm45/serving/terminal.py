"""`glm45 chat PATH_OR_RUN`: the chat page's conversation, in a terminal."""

import asyncio
import json
import signal
import sys
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from glm45.serving.command import ServeConfig, build_service
from glm45.serving.errors import ApiError
from glm45.serving.generation import Generation
from glm45.serving.plan import plan_chat
from glm45.serving.schemas import ChatRequest
from glm45.serving.service import Service
from glm45.text.parsing import join_deltas

HELP = """\
/think, /nothink   think, or do not; /auto leaves it to the model
/system TEXT       set the system prompt (empty: none)
/set NAME=VALUE    temperature, top_p, top_k, min_p, repetition_penalty, seed, max_tokens, thinking_budget
/tools FILE        tools that the model may call, as a JSON list (empty: none); you type their results
/retry             answer again
/undo              take back the last exchange
/new               forget the conversation
/save FILE         write the conversation as JSON
/help              this list
/quit              leave (also Ctrl-D)
Ctrl-C stops an answer. A line that ends in \\ goes on on the next."""
SETTINGS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "max_tokens",
    "thinking_budget",
)


@dataclass
class Conversation:
    """What was said, and how to go on."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    system: str = ""
    thinking: bool | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def request(self) -> ChatRequest:
        """Return the request for the next answer. Raises ValueError for settings that are out of range."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return ChatRequest.model_validate(
            {
                "messages": system + self.messages,
                "tools": self.tools or None,
                "enable_thinking": self.thinking,
                **self.settings,
            }
        )

    def take_back(self) -> bool:
        """Drop everything from the last user message on; return whether there was one."""
        users = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if users:
            del self.messages[users[-1] :]
        return bool(users)


class Terminal:
    """Reads lines and commands, and writes answers as they come."""

    def __init__(self, service: Service, console: Console, read: Callable[[str], str]) -> None:
        """`read` shows a prompt and returns a line; it raises EOFError at the end of the input."""
        self.service = service
        self.console = console
        self.read = read
        self.said = Conversation()
        self.commands: dict[str, Callable[[str], None]] = {
            "think": lambda text: self._set_thinking(True),
            "nothink": lambda text: self._set_thinking(False),
            "auto": lambda text: self._set_thinking(None),
            "system": self._set_system,
            "set": self._set,
            "tools": self._set_tools,
            "retry": lambda text: self._retry(),
            "undo": lambda text: self._undo(),
            "new": lambda text: self._new(),
            "save": self._save,
            "help": lambda text: self._note(HELP),
        }

    def run(self) -> None:
        """Converse until /quit or the end of the input."""
        self._note(f"{self.service.model_name} · context of {self.service.max_length:,} tokens · /help")
        while True:
            try:
                text = self._read_message()
            except EOFError:
                return
            except KeyboardInterrupt:  # at the prompt: drop the line
                self.console.print()
                continue
            if text.split(maxsplit=1)[:1] in (["/quit"], ["/exit"]):
                return
            if text.startswith("/"):
                self._command(text)
            elif text.strip():
                self.said.messages.append({"role": "user", "content": text})
                self._answer()

    def _read_message(self) -> str:
        lines = [self.read("› ")]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self.read("  "))
        return "\n".join(lines)

    def _command(self, line: str) -> None:
        name, _, text = line[1:].partition(" ")
        if name not in self.commands:
            self._note(f"there is no /{name}; /help lists what there is")
            return
        try:
            self.commands[name](text.strip())
        except (OSError, ValueError) as error:
            self._fail(str(error))

    def _answer(self) -> None:
        """Answer, and go on while the model calls tools whose results the user types."""
        while True:
            try:
                message, figures = asyncio.run(self._generate())
            except (ApiError, ValueError) as error:
                self._fail(str(error))
                self.said.take_back()
                return
            self.said.messages.append(message)
            self._note(figures)
            if not message.get("tool_calls"):
                return
            try:
                for call in message["tool_calls"]:
                    result = self.read(f"result of {call['function']['name']} › ")
                    self.said.messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
            except (EOFError, KeyboardInterrupt):
                self.said.take_back()
                return

    async def _generate(self) -> tuple[dict[str, Any], str]:
        """Return the answer and a line of figures; Ctrl-C ends the answer where it is."""
        service = self.service
        plan = plan_chat(self.said.request(), service)
        if plan.params.constraint is not None:
            service.engine.compile(plan.params.constraint)
        generation = Generation(
            plan, service.engine, service.tokenizer, service.metrics, service.new_id("chat-"), "terminal"
        )
        deltas: list[dict[str, Any]] = []
        writing = asyncio.ensure_future(self._write(generation, deltas))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, writing.cancel)
        try:
            await asyncio.wait({writing})
        finally:
            loop.remove_signal_handler(signal.SIGINT)
        reason = None if writing.cancelled() else writing.result()
        message = join_deltas(deltas)
        message["content"] = message["content"] or ""
        if reason != "tool_calls":
            message.pop("tool_calls", None)  # a call that was cut short cannot be answered
        return message, _figures(generation, reason)

    async def _write(self, generation: Generation, deltas: list[dict[str, Any]]) -> str | None:
        """Show an answer as it comes, collect its deltas and return why it ended."""
        writer = Writer(self.console)
        reason: str | None = None
        try:
            async with aclosing(generation.pieces()) as pieces:
                async for piece in pieces:
                    deltas += piece.deltas
                    writer.write(piece.deltas)
                    reason = piece.finish_reason or reason
        finally:
            writer.end()
        return reason

    # Commands

    def _set_thinking(self, thinking: bool | None) -> None:
        self.said.thinking = thinking
        self._note({True: "thinking on", False: "thinking off", None: "thinking as the model likes"}[thinking])

    def _set_system(self, text: str) -> None:
        self.said.system = text
        self._note("system prompt set" if text else "no system prompt")

    def _set(self, text: str) -> None:
        name, equals, value = text.partition("=")
        if not equals or name not in SETTINGS:
            raise ValueError(f"write NAME=VALUE with one of {', '.join(SETTINGS)}")
        settings = {**self.said.settings, name: json.loads(value)} if value else dict(self.said.settings)
        if not value:
            settings.pop(name, None)
        ChatRequest.model_validate({"messages": [{"role": "user", "content": ""}], **settings})
        self.said.settings = settings
        self._note(f"{name} is {value or 'the default'}")

    def _set_tools(self, text: str) -> None:
        tools = json.loads(Path(text).expanduser().read_text(encoding="utf-8")) if text else []
        ChatRequest.model_validate({"messages": [{"role": "user", "content": ""}], "tools": tools or None})
        self.said.tools = tools
        self._note(f"{len(tools)} tools")

    def _retry(self) -> None:
        users = [message for message in self.said.messages if message["role"] == "user"]
        if self.said.take_back():
            self.said.messages.append(users[-1])
            self._answer()

    def _undo(self) -> None:
        self._note("taken back" if self.said.take_back() else "nothing was said yet")

    def _new(self) -> None:
        self.said.messages.clear()
        self._note("a new conversation")

    def _save(self, text: str) -> None:
        if not text:
            raise ValueError("write /save FILE")
        path = Path(text).expanduser()
        path.write_text(json.dumps(self.said.messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        self._note(f"wrote {path}")

    def _note(self, text: str) -> None:
        self.console.print(escape(text), style="bright_black", highlight=False)

    def _fail(self, text: str) -> None:
        self.console.print(escape(text), style="red", highlight=False)


class Writer:
    """Writes deltas: reasoning dim, content plain, calls in colour."""

    STYLES = {"reasoning_content": "italic bright_black", "content": "", "tool_calls": "cyan"}  # noqa: RUF012

    def __init__(self, console: Console) -> None:
        self.console = console
        self.kind = ""

    def write(self, deltas: list[dict[str, Any]]) -> None:
        """Write what is new."""
        for delta in deltas:
            for kind, value in delta.items():
                if self.kind and kind != self.kind:
                    self.console.print()
                self.kind = kind
                for text in self._texts(kind, value):
                    self.console.print(escape(text), style=self.STYLES[kind], end="", highlight=False, soft_wrap=True)

    def end(self) -> None:
        """End the line."""
        if self.kind:
            self.console.print()

    @staticmethod
    def _texts(kind: str, value: Any) -> list[str]:
        if kind != "tool_calls":
            return [value]
        return [call["function"].get("name", "") + call["function"]["arguments"] for call in value]


def _figures(generation: Generation, reason: str | None) -> str:
    timings, usage = generation.timings(), generation.usage
    parts = [f"{usage.completion_tokens} tokens"]
    if timings["tokens_per_second"] is not None:
        parts.append(f"{timings['tokens_per_second']:.1f} tokens/s")
    if timings["draft_acceptance"] is not None:
        parts.append(f"MTP {timings['draft_acceptance']:.0%} accepted")
    if reason == "length":
        parts.append("cut at the token limit")
    if reason is None:
        parts.append("stopped")
    return " · ".join(parts)


def chat(path: str, config: ServeConfig) -> None:
    """Load a model and converse on this terminal."""
    service = build_service(path, config)
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives input() a history and line editing
    try:
        Terminal(service, Console(), input).run()
    finally:
        service.engine.close()
