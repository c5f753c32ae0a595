"""Renders OpenAI chat messages to GLM-4.5's text, token ids and loss mask (report section 3.1, figure 4).

A conversation is a list of pieces, each a special token or a run of plain text. Joined, they are the text that
GLM-4.5's chat template gives, byte for byte; encoded one by one, they are token ids in which no message's text can
pass for a special token. Every message begins and ends at a special token, so a conversation rendered at once and
one rendered message by message have the same ids.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

from glm45.config import configuration
from glm45.text import messages as openai
from glm45.text.arguments import tool_parameters
from glm45.text.messages import Message
from glm45.text.special_tokens import (
    ARG_KEY,
    ARG_KEY_END,
    ARG_VALUE,
    ARG_VALUE_END,
    ASSISTANT,
    GMASK,
    NOTHINK,
    OBSERVATION,
    SOP,
    SYSTEM,
    THINK,
    THINK_END,
    TOOL_CALL,
    TOOL_CALL_END,
    TOOL_RESPONSE,
    TOOL_RESPONSE_END,
    USER,
)
from glm45.text.tokenizer import Tokenizer

DialectName = Literal["glm-4.5", "glm-4.7"]


class Piece(NamedTuple):
    """A special token or a run of plain text, and whether the assistant produced it."""

    text: str
    special: bool
    produced: bool = False


@configuration
class Dialect:
    """What differs between the chat formats of GLM-4.5 and GLM-4.7."""

    newline: str
    """Stands after a role, around reasoning and between the tags of a call."""
    thinking_prompt: tuple[str, ...]
    """What the generation prompt opens after the assistant's role: nothing in GLM-4.5, where the model itself
    chooses to think, reasoning in GLM-4.7."""
    direct_prompt: tuple[str, ...]
    """What it holds instead where thinking is off; also what stands for absent reasoning in a past turn."""
    nothink: str
    """Appended to a user's message where thinking is off."""


DIALECTS: dict[DialectName, Dialect] = {
    "glm-4.5": Dialect(newline="\n", thinking_prompt=(), direct_prompt=("\n", THINK, THINK_END), nothink=NOTHINK),
    "glm-4.7": Dialect(newline="", thinking_prompt=(THINK,), direct_prompt=(THINK_END,), nothink=""),
}

TOOLS_INTRODUCTION = """
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
CALLS_INTRODUCTION = """</tools>

For each function call, output the function name and arguments within the following XML format:
"""


class RenderedTokens(NamedTuple):
    """Token ids of a conversation and, of the same length, which of them the assistant produced."""

    ids: list[int]
    loss_mask: list[bool]


def render(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = False,
    clear_thinking: bool = True,
    dialect: DialectName = "glm-4.5",
) -> str:
    """Return the text of a conversation, byte-equal with GLM-4.5's chat template.

    `enable_thinking=False` asks for answers without reasoning; a user message's own `enable_thinking` overrides it
    for its turn. `clear_thinking` drops the reasoning of turns before the last user message, as GLM-4.5 does; False
    keeps it (GLM-4.7's preserved thinking). Raises ValueError, with the index of the message, for what GLM-4.5
    cannot read: unknown roles, arguments that are not JSON, tool results without a call, parts that are not text.
    """
    pieces = _conversation(messages, tools, enable_thinking, add_generation_prompt, clear_thinking, dialect)
    return "".join([piece[0] for piece in pieces])


def render_tokens(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = False,
    clear_thinking: bool = True,
    dialect: DialectName = "glm-4.5",
    end_turn: bool = False,
) -> RenderedTokens:
    """Return the token ids of `render`'s text and the mask of what the assistant produced.

    True in the mask: all that the model writes after its generation prompt (reasoning with its tags, content, calls)
    and the following role token, which ends the turn; nothing else. Reasoning that the template blanks was not
    written so, and the empty tags in its place are not learnt. `end_turn` appends the token that ends a last
    assistant turn (`<|observation|>` after calls, else `<|user|>`): for training on turns that are complete.
    """
    pieces = _conversation(messages, tools, enable_thinking, add_generation_prompt, clear_thinking, dialect)
    if end_turn:
        if messages[-1]["role"] != "assistant" or add_generation_prompt:
            raise ValueError("end_turn: the conversation does not end in an assistant turn")
        pieces.append(Piece(OBSERVATION if messages[-1].get("tool_calls") else USER, True, True))
    return _encode(pieces, tokenizer)


def extend_tokens(
    ids: Sequence[int],
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    enable_thinking: bool | None = None,
    clear_thinking: bool = True,
    dialect: DialectName = "glm-4.5",
) -> list[int]:
    """Return the ids to append after a sampled turn, up to the next generation prompt.

    `ids` is everything so far, the sampled tokens as they were sampled: they are never rendered again. The role token
    that ended the turn is not repeated. Raises ValueError where keeping them is wrong: the first message must be a
    tool result or, since a user message makes the template drop earlier reasoning, a user message in a conversation
    without reasoning or with `clear_thinking=False`; otherwise render the conversation anew, as a branch of its own.
    """
    roles = [message.get("role") for message in messages]
    if not roles or not all(role in ("user", "tool", "system") for role in roles):
        raise ValueError(f"only tool results, user and system messages can follow a sampled turn, not {roles}")
    if "user" in roles and clear_thinking and _has_reasoning(ids, tokenizer):
        raise ValueError(
            "a new user message drops the reasoning before it, so the sampled tokens are no prefix of the new prompt: "
            "render the conversation anew, or keep reasoning with clear_thinking=False"
        )
    layout = DIALECTS[dialect]
    pieces: list[Piece] = []
    thinking = enable_thinking
    for index, message in enumerate(messages):
        thinking = _thinking_of(message, enable_thinking, thinking)
        after_tool = index > 0 and roles[index - 1] == "tool"
        _add_message(pieces, message, index, layout, thinking, after_tool=after_tool)
    if ids and ids[-1] == tokenizer.special_id(pieces[0].text):
        del pieces[0]
    _add_generation_prompt(pieces, layout, thinking)
    return _encode(pieces, tokenizer).ids


def _conversation(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    enable_thinking: bool | None,
    add_generation_prompt: bool,
    clear_thinking: bool,
    dialect: DialectName,
) -> list[Piece]:
    if dialect not in DIALECTS:
        raise ValueError(f"dialect {dialect!r} is not one of {', '.join(DIALECTS)}")
    layout = DIALECTS[dialect]
    openai.check(messages)
    pieces = [Piece(GMASK, True), Piece(SOP, True)]
    if tools:
        _add_tools(pieces, tools, layout)
    roles = [message["role"] for message in messages]
    last_user = max((index for index, role in enumerate(roles) if role == "user"), default=-1)
    thinking = enable_thinking
    previous = None
    for index, message in enumerate(messages):
        role = roles[index]
        thinking = _thinking_of(message, enable_thinking, thinking)
        if role == "assistant":
            keep = index > last_user or not clear_thinking
            _add_assistant(pieces, message, index, layout, thinking, keep_reasoning=keep)
        else:
            ends_turn = previous == "assistant"
            _add_message(pieces, message, index, layout, thinking, after_tool=previous == "tool", ends_turn=ends_turn)
        previous = role
    if add_generation_prompt:
        _add_generation_prompt(pieces, layout, thinking)
    return pieces


def _thinking_of(message: Message, enable_thinking: bool | None, current: bool | None) -> bool | None:
    """Return whether to think from this message on: a user message decides for its turn."""
    if message["role"] != "user":
        return current
    own = message.get("enable_thinking")
    return enable_thinking if own is None else own


def _add_tools(pieces: list[Piece], tools: Sequence[Mapping[str, Any]], layout: Dialect) -> None:
    tool_parameters(tools)  # refuses what no answer could call
    lines = "".join([json.dumps(tool, ensure_ascii=False) + "\n" for tool in tools])
    pieces.append(Piece(SYSTEM, True))
    pieces.append(Piece(TOOLS_INTRODUCTION + lines + CALLS_INTRODUCTION, False))
    pieces.extend(_call_format(layout.newline))


@cache
def _call_format(newline: str) -> list[Piece]:
    """Return the description of a call that the system prompt shows; its tags are special tokens there too."""
    pieces = [Piece(TOOL_CALL, True), Piece("{function-name}" + newline, False)]
    for number in "12":
        _add_argument(pieces, f"{{arg-key-{number}}}", f"{{arg-value-{number}}}", newline, produced=False)
    pieces += [Piece("..." + newline, False), Piece(TOOL_CALL_END, True)]
    return pieces


def _add_message(
    pieces: list[Piece],
    message: Message,
    index: int,
    layout: Dialect,
    thinking: bool | None,
    *,
    after_tool: bool,
    ends_turn: bool = False,
) -> None:
    """Add a system, user or tool message; its role token ends the assistant turn before it."""
    role, text, newline = message["role"], openai.text_of(message.get("content"), index), layout.newline
    if role == "tool":
        if not after_tool:
            pieces.append(Piece(OBSERVATION, True, ends_turn))
        if newline:
            pieces.append(Piece(newline, False))
        pieces.append(Piece(TOOL_RESPONSE, True))
        pieces.append(Piece(newline + text + newline, False))
        pieces.append(Piece(TOOL_RESPONSE_END, True))
        return
    pieces.append(Piece(USER if role == "user" else SYSTEM, True, ends_turn))
    if role == "user" and thinking is False and layout.nothink:
        # A /nothink that the user already wrote is not written twice.
        pieces.append(Piece(newline + text.removesuffix(layout.nothink), False))
        pieces.append(Piece(layout.nothink, True))
    else:
        pieces.append(Piece(newline + text, False))


def _add_assistant(
    pieces: list[Piece],
    message: Message,
    index: int,
    layout: Dialect,
    thinking: bool | None,
    *,
    keep_reasoning: bool,
) -> None:
    reasoning, content = openai.reasoning_and_content(message, index)
    newline = layout.newline
    pieces.append(Piece(ASSISTANT, True))
    if reasoning and keep_reasoning:
        if newline:
            pieces.append(Piece(newline, False, True))
        pieces.append(Piece(THINK, True, THINK not in layout.thinking_prompt))
        pieces.append(Piece(reasoning.strip(), False, True))
        pieces.append(Piece(THINK_END, True, True))
    else:
        # Empty tags are the model's own where it could have thought and the message says that it did not.
        produced = not (reasoning or thinking is False or layout.thinking_prompt)
        pieces.extend([Piece(token, token != newline, produced) for token in layout.direct_prompt])
    content = content.strip()
    text = newline + content if content else ""
    for name, arguments in openai.calls_of(message, index):
        pieces.append(Piece(text + newline, False, True))
        pieces.append(Piece(TOOL_CALL, True, True))
        pieces.append(Piece(name + newline, False, True))
        for key, value in arguments.items():
            _add_argument(pieces, str(key), openai.argument_text(value, key, index), newline, produced=True)
        pieces.append(Piece(TOOL_CALL_END, True, True))
        text = ""
    if text:
        pieces.append(Piece(text, False, True))


def _add_argument(pieces: list[Piece], key: str, value: str, newline: str, *, produced: bool) -> None:
    pieces += (
        Piece(ARG_KEY, True, produced),
        Piece(key, False, produced),
        Piece(ARG_KEY_END, True, produced),
        Piece(newline, False, produced),
        Piece(ARG_VALUE, True, produced),
        Piece(value, False, produced),
        Piece(ARG_VALUE_END, True, produced),
        Piece(newline, False, produced),
    )


def _add_generation_prompt(pieces: list[Piece], layout: Dialect, thinking: bool | None) -> None:
    pieces.append(Piece(ASSISTANT, True))
    prompt = layout.direct_prompt if thinking is False else layout.thinking_prompt
    pieces.extend([Piece(token, token != layout.newline) for token in prompt])


def _has_reasoning(ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Return whether any think block of a conversation holds something."""
    think, think_end = tokenizer.special_id(THINK), tokenizer.special_id(THINK_END)
    return any(here == think and after != think_end for here, after in itertools.pairwise(ids))


def _encode(pieces: Sequence[Piece], tokenizer: Tokenizer) -> RenderedTokens:
    """Encode pieces: special tokens by id, neighbouring runs of text as one, never across a special token."""
    ids: list[int] = []
    loss_mask: list[bool] = []
    pending = ""
    pending_produced = False
    for piece in pieces:
        if not piece.special:
            assert not pending or pending_produced == piece.produced, "a run of text is one author's"
            pending += piece.text
            pending_produced = piece.produced
            continue
        if pending:
            _add_ids(ids, loss_mask, tokenizer.encode(pending), pending_produced)
            pending = ""
        _add_ids(ids, loss_mask, [tokenizer.special_id(piece.text)], piece.produced)
    if pending:
        _add_ids(ids, loss_mask, tokenizer.encode(pending), pending_produced)
    return RenderedTokens(ids, loss_mask)


def _add_ids(ids: list[int], loss_mask: list[bool], new_ids: list[int], produced: bool) -> None:
    ids += new_ids
    loss_mask += [produced] * len(new_ids)
