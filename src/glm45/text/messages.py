"""OpenAI chat messages as clients send them: read, checked, and refused with the index of the message at fault."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")


def check(messages: Sequence[Message]) -> None:
    """Raise ValueError for an empty conversation, an unknown role or a tool result that answers no call."""
    if not messages:
        raise ValueError("there are no messages to render")
    unanswered: list[str | None] = []  # ids of the open calls of the assistant turn that tool results now answer
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise ValueError(f"message {index}: role {role!r} is not one of {', '.join(ROLES)}")
        if role == "tool":
            _answer(unanswered, message.get("tool_call_id"), index)
        else:
            calls = message.get("tool_calls") if role == "assistant" else None
            unanswered = [call.get("id") for call in _as_list(calls) if isinstance(call, Mapping)]


def _answer(unanswered: list[str | None], call_id: str | None, index: int) -> None:
    """Take the call that a tool result answers off the list: the one of its id, or the next where ids are absent."""
    if not unanswered:
        raise ValueError(f"message {index}: a tool result that answers no call of the assistant turn before it")
    if call_id in unanswered:
        unanswered.remove(call_id)
    elif call_id is None:
        unanswered.pop(0)
    elif None in unanswered:
        unanswered.remove(None)
    else:
        known = ", ".join(str(known) for known in unanswered)
        raise ValueError(f"message {index}: tool_call_id {call_id!r} answers no open call; open are {known}")


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else ()


def text_of(content: Any, index: int) -> str:
    """Return the text of a message's content: a string, a list of text parts, or nothing for null."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list):
        raise ValueError(f"message {index}: content is a {type(content).__name__}, not a string, list of parts or null")
    return "".join([_text_of_part(part, index) for part in content])


def _text_of_part(part: Any, index: int) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"message {index}: a content part of type {kind!r}; GLM-4.5 reads text parts only")
    return part["text"]


def reasoning_and_content(message: Message, index: int) -> tuple[str, str]:
    """Return an assistant message's reasoning and content, unstripped.

    Without `reasoning_content`, what `content` holds up to `</think>` is the reasoning, as in GLM-4.5's template.
    """
    content = text_of(message.get("content"), index)
    reasoning = message.get("reasoning_content")
    if reasoning is None:
        if "</think>" not in content:
            return "", content
        before, after = content.split("</think>", 1)
        return before.rstrip("\n").split("<think>")[-1].lstrip("\n"), after.lstrip("\n")
    if not isinstance(reasoning, str):
        raise ValueError(f"message {index}: reasoning_content is a {type(reasoning).__name__}, not a string")
    return reasoning, content


def calls_of(message: Message, index: int) -> list[tuple[str, Mapping[str, Any]]]:
    """Return name and arguments of every call of an assistant message, in order."""
    calls = message.get("tool_calls") or ()
    if calls and not _as_list(calls):
        raise ValueError(f"message {index}: tool_calls is a {type(calls).__name__}, not a list")
    return [_call_of(call, place, index) for place, call in enumerate(calls)]


def _call_of(call: Any, place: int, index: int) -> tuple[str, Mapping[str, Any]]:
    where = f"message {index}, call {place}"
    function = (call.get("function") or call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{where}: a call needs a function with a name, not {call!r}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: arguments of {function['name']} are not JSON: {error}") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}: arguments of {function['name']} are a {type(arguments).__name__}, not an object")
    return function["name"], arguments


def argument_text(value: Any, key: str, index: int) -> str:
    """Return an argument's value as it stands between the tags: a string as it is, anything else as JSON."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"message {index}: argument {key!r} cannot be written as JSON: {error}") from None
