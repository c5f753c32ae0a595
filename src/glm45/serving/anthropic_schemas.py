"""What Anthropic's clients send, and how it reads as a chat request."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from glm45.serving.errors import ApiError
from glm45.serving.schemas import MAX_STOPS, ChatRequest, Open, Stop, Strict

Role = Literal["user", "assistant", "system"]


class Block(Open):
    """A content block: text, thinking, tool_use or tool_result."""

    type: str


class AnthropicMessage(Open):
    """One message."""

    role: Role
    content: str | list[Block]


class AnthropicTool(Open):
    """A tool of the client's own."""

    type: str | None = None
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class ToolChoice(Strict):
    """Which tool to call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Open):
    """Whether to think."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1)


class CountRequest(Strict):
    """`POST /v1/messages/count_tokens`: what a request's prompt is made of."""

    model: str
    messages: list[AnthropicMessage] = Field(min_length=1)
    system: str | list[Block] | None = None
    tools: list[AnthropicTool] | None = Field(None, max_length=512)
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = Field(None, description="Without it, as in Anthropic's API, thinking is off.")
    output_config: dict[str, Any] | None = Field(None, description="`format` is honoured; `effort` has no effect.")
    cache_control: dict[str, Any] | None = Field(None, description="No effect: equal prefixes are always cached.")
    context_management: dict[str, Any] | None = Field(None, description="No effect.")


class MessagesRequest(CountRequest):
    """`POST /v1/messages`."""

    max_tokens: int = Field(ge=1)
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    stream: bool = False
    metadata: dict[str, Any] | None = Field(None, description="No effect.")
    service_tier: str | None = Field(None, description="No effect.")


def to_chat(body: CountRequest) -> ChatRequest:
    """Return the chat request of the same meaning. Raises ApiError (400) for what it cannot say."""
    thinking = body.thinking
    values: dict[str, Any] = {
        "messages": _system(body.system)
        + [said for i, message in enumerate(body.messages) for said in _said(message, i)],
        "tools": [_tool(tool) for tool in body.tools] if body.tools else None,
        "enable_thinking": thinking is not None and thinking.type != "disabled",
        "thinking_budget": thinking.budget_tokens if thinking and thinking.type == "enabled" else None,
        "continue_final_message": body.messages[-1].role == "assistant",
        **_choice(body.tool_choice),
    }
    schema = ((body.output_config or {}).get("format") or {}).get("schema")
    if schema is not None:
        values["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    if isinstance(body, MessagesRequest):
        sampling = {"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k}
        values |= {**sampling, "stop": body.stop_sequences or None}
    try:
        return ChatRequest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ApiError(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _system(system: str | list[Block] | None) -> list[dict[str, Any]]:
    text = _text(system or "", "system")
    return [{"role": "system", "content": text}] if text else []


def _said(message: AnthropicMessage, index: int) -> list[dict[str, Any]]:
    """Return a message as OpenAI's messages: tool results come first, as messages of their own."""
    where = f"messages.{index}"
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    if message.role == "assistant":
        return [_assistant(message.content, where)]
    results = [block for block in message.content if block.type == "tool_result"]
    others = [block for block in message.content if block.type != "tool_result"]
    said: list[dict[str, Any]] = [
        {"role": "tool", "tool_call_id": _field(block, "tool_use_id", where), "content": _result(block, where)}
        for block in results
    ]
    if others or not results:
        said.append({"role": message.role, "content": _text(others, where)})
    return said


def _assistant(blocks: list[Block], where: str) -> dict[str, Any]:
    calls = [
        {
            "id": _field(block, "id", where),
            "type": "function",
            "function": {"name": _field(block, "name", where), "arguments": json.dumps(_field(block, "input", where))},
        }
        for block in blocks
        if block.type == "tool_use"
    ]
    thoughts = [str(_field(block, "thinking", where)) for block in blocks if block.type == "thinking"]
    prose = [block for block in blocks if block.type not in ("tool_use", "thinking", "redacted_thinking")]
    message: dict[str, Any] = {"role": "assistant", "content": _text(prose, where)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return message | ({"tool_calls": calls} if calls else {})


def _result(block: Block, where: str) -> str:
    content: Any = (block.model_extra or {}).get("content") or ""
    if isinstance(content, list):
        content = [Block.model_validate(part) for part in content if isinstance(part, dict) and "type" in part]
    text = _text(content, where)
    return f"Error: {text}" if (block.model_extra or {}).get("is_error") else text


def _text(content: str | list[Block], where: str) -> str:
    if isinstance(content, str):
        return content
    for block in content:
        if block.type != "text":
            raise ApiError(400, f"{where}: a block of type {block.type!r}; this model reads text", param=where)
    return "\n".join(str(_field(block, "text", where)) for block in content)


def _field(block: Block, name: str, where: str) -> Any:
    if name not in (block.model_extra or {}):
        raise ApiError(400, f"{where}: a block of type {block.type!r} without {name!r}", param=where)
    return (block.model_extra or {})[name]


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise ApiError(400, f"tools: {tool.type!r} runs on Anthropic's servers and is not offered", param="tools")
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _choice(choice: ToolChoice | None) -> dict[str, Any]:
    if choice is None:
        return {}
    named = {"type": "function", "function": {"name": choice.name or ""}}
    chosen: Any = {"auto": "auto", "none": "none", "any": "required", "tool": named}[choice.type]
    return {"tool_choice": chosen, "parallel_tool_calls": False if choice.disable_parallel_tool_use else None}
