"""The thinking switch, in every spelling that clients use.

GLM-4.5 thinks unless told otherwise: by a field of the request (vLLM's, Z.ai's, Anthropic's, OpenRouter's or
OpenAI's) or by `/nothink` at the end of a user's message.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from glm45.serving.errors import ApiError
from glm45.serving.schemas import ThinkingSwitch
from glm45.text.special_tokens import NOTHINK

SWITCH_WORDS = (("/nothink", False), ("/no_think", False), ("/think", True))


class ThinkingChoice(NamedTuple):
    """What a request says about thinking."""

    enabled: bool | None
    """None leaves it to the model."""
    clear: bool = True
    """Whether the reasoning of turns before the last user message is dropped, as GLM-4.5's template does."""
    budget: int | None = None
    """Most tokens of reasoning."""


def choose_thinking(request: ThinkingSwitch, default: bool | None = None) -> ThinkingChoice:
    """Gather every spelling. Raises ApiError (400) where two of them contradict each other."""
    extra = getattr(request, "extra_body", None)
    sources = [request] if extra is None else [request, extra]
    enabled = _agree("enabled", [vote for source in sources for vote in _votes(source)])
    clear = _agree("clear_thinking", [vote for source in sources for vote in _clear_votes(source)])
    budget = _agree("budget", [vote for source in sources for vote in _budget_votes(source)])
    if budget is not None and enabled is None:
        enabled = True
    return ThinkingChoice(default if enabled is None else enabled, True if clear is None else clear, budget)


def mark_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give user messages that end in `/nothink` or `/think` their `enable_thinking`, without the word.

    Also reads OpenAI's `developer` role as `system`.
    """
    return [_mark(message) for message in messages]


def _mark(message: dict[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if role == "developer":
        return {**message, "role": "system"}
    content = message.get("content")
    if role != "user" or not content:
        return message
    text = content if isinstance(content, str) else content[-1].get("text") or ""
    bare, found = _without_word(text)
    if found is None:
        return message
    own = message.get("enable_thinking")
    content = bare if isinstance(content, str) else [*content[:-1], {**content[-1], "text": bare}]
    return {**message, "content": content, "enable_thinking": found if own is None else own}


def _without_word(text: str) -> tuple[str, bool | None]:
    """Return the text without a final switch word, and what the word says."""
    end = text.rstrip()
    for word, value in SWITCH_WORDS:
        if end.endswith(word):
            bare = end.removesuffix(word)
            # GLM's own word may touch the text before it, as in the template; the others could be the end of a path.
            if word == NOTHINK or not bare or bare[-1].isspace():
                return bare.rstrip(), value
    return text, None


def _agree(name: str, votes: list[tuple[str, Any]]) -> Any:
    if len({value for _, value in votes}) > 1:
        said = ", ".join(f"{field} says {value}" for field, value in votes)
        raise ApiError(400, f"thinking ({name}): {said}; give one of them", param=votes[0][0])
    return votes[0][1] if votes else None


def _votes(request: ThinkingSwitch) -> Iterator[tuple[str, bool]]:
    if request.enable_thinking is not None:
        yield "enable_thinking", request.enable_thinking
    if request.thinking is not None:
        yield "thinking", request.thinking.type != "disabled"
    kwargs, reasoning = request.chat_template_kwargs, request.reasoning
    if kwargs is not None:
        for name in ("enable_thinking", "thinking"):
            if getattr(kwargs, name) is not None:
                yield f"chat_template_kwargs.{name}", getattr(kwargs, name)
    if reasoning is not None and reasoning.enabled is not None:
        yield "reasoning.enabled", reasoning.enabled
    if reasoning is not None and reasoning.effort == "none":
        yield "reasoning.effort", False
    if request.reasoning_effort == "none":
        yield "reasoning_effort", False


def _clear_votes(request: ThinkingSwitch) -> Iterator[tuple[str, bool]]:
    for name in ("thinking", "chat_template_kwargs"):
        source = getattr(request, name)
        if source is not None and source.clear_thinking is not None:
            yield f"{name}.clear_thinking", source.clear_thinking


def _budget_votes(request: ThinkingSwitch) -> Iterator[tuple[str, int]]:
    if request.thinking_budget is not None:
        yield "thinking_budget", request.thinking_budget
    if request.thinking is not None and request.thinking.budget_tokens is not None:
        yield "thinking.budget_tokens", request.thinking.budget_tokens
    if request.reasoning is not None and request.reasoning.max_tokens is not None:
        yield "reasoning.max_tokens", request.reasoning.max_tokens
