"""The pieces of an OpenAI stream: made as an answer is read, and joined to the message that they add up to."""

from collections.abc import Sequence
from typing import Any, Literal

Delta = dict[str, Any]
"""The `delta` of an OpenAI chunk: `content`, `reasoning_content` or `tool_calls`."""

FragmentKind = Literal["content", "reasoning_content", "arguments"]


class DeltaWriter:
    """Gathers fragments of text into as few deltas as say them in order."""

    def __init__(self, call_id_prefix: str) -> None:
        self.call = -1
        """Index of the latest call."""
        self._call_id_prefix = call_id_prefix
        self._deltas: list[Delta] = []
        self._kind: FragmentKind = "content"
        self._fragments: list[str] = []

    def write(self, kind: FragmentKind, text: str) -> None:
        """Add text to the content, to the reasoning or to the arguments of the latest call."""
        if kind != self._kind:
            self._join_fragments()
            self._kind = kind
        self._fragments.append(text)

    def open_call(self, name: str) -> None:
        """Begin the next call."""
        self._join_fragments()
        self.call += 1
        function = {"name": name, "arguments": ""}
        call_id = f"{self._call_id_prefix}{self.call}"
        self._deltas.append(
            {"tool_calls": [{"index": self.call, "id": call_id, "type": "function", "function": function}]}
        )

    def drain(self) -> list[Delta]:
        """Return the deltas since the last time."""
        self._join_fragments()
        deltas, self._deltas = self._deltas, []
        return deltas

    def delta(self, kind: FragmentKind, text: str) -> Delta:
        """Return the delta that adds text to the content, to the reasoning or to the arguments of the latest call."""
        if kind == "arguments":
            return {"tool_calls": [{"index": self.call, "function": {"arguments": text}}]}
        return {kind: text}

    def _join_fragments(self) -> None:
        if not self._fragments:
            return
        self._deltas.append(self.delta(self._kind, "".join(self._fragments)))
        self._fragments = []


def join_deltas(deltas: Sequence[Delta]) -> dict[str, Any]:
    """Return the assistant message that a stream of deltas adds up to."""
    prose: dict[str, list[str]] = {"content": [], "reasoning_content": []}
    calls: list[dict[str, Any]] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        for kind, value in delta.items():
            if kind != "tool_calls":
                prose[kind].append(value)
                continue
            for call in value:
                if "id" in call:
                    calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
                    arguments.append([])
                arguments[call["index"]].append(call["function"]["arguments"])
    message: dict[str, Any] = {"role": "assistant", "content": "".join(prose["content"]) or None}
    if prose["reasoning_content"]:
        message["reasoning_content"] = "".join(prose["reasoning_content"])
    for call, parts in zip(calls, arguments, strict=True):
        call["function"]["arguments"] = "".join(parts)
    if calls:
        message["tool_calls"] = calls
    return message
