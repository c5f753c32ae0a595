"""What `glm45 chat render` and `glm45 chat parse` print, for people who debug templates."""

from collections.abc import Mapping, Sequence
from typing import Any

from glm45.text.chat import DialectName, render, render_tokens
from glm45.text.parsing import parse
from glm45.text.tokenizer import Tokenizer


def rendered(
    conversation: Any,
    tools: Sequence[Mapping[str, Any]] | None,
    enable_thinking: bool | None,
    dialect: DialectName,
    tokenizer: str | None,
) -> dict[str, Any]:
    """Return the text of a conversation, with ids and loss mask where a tokenizer is named.

    A conversation is a list of messages or an object with `messages` and perhaps `tools`. The generation prompt
    follows unless an assistant's message is the last.
    """
    if isinstance(conversation, dict):
        tools = conversation.get("tools") if tools is None else tools
        conversation = conversation.get("messages")
    if not isinstance(conversation, list):
        raise ValueError("the messages are neither a JSON list nor an object with a list 'messages'")
    last = conversation[-1] if conversation else None
    prompt = not (isinstance(last, dict) and last.get("role") == "assistant")
    text = render(
        conversation, tools=tools, enable_thinking=enable_thinking, add_generation_prompt=prompt, dialect=dialect
    )
    result: dict[str, Any] = {"text": text}
    if tokenizer is not None:
        tokens = render_tokens(
            conversation,
            Tokenizer.load(tokenizer),
            tools=tools,
            enable_thinking=enable_thinking,
            add_generation_prompt=prompt,
            dialect=dialect,
        )
        result |= {"ids": tokens.ids, "loss_mask": [int(produced) for produced in tokens.loss_mask]}
    return result


def parsed(text: str, tools: Sequence[Mapping[str, Any]] | None, reasoning_open: bool) -> dict[str, Any]:
    """Return the message that a text spells, and the status of its format."""
    message, status = parse(text, tools, reasoning_open)
    return {
        "message": message,
        "status": {
            "well_formed": status.well_formed,
            "exact": status.exact,
            "problems": [problem._asdict() for problem in status.problems],
            "end": status.end,
            "complete_calls": list(status.complete_calls),
        },
    }
