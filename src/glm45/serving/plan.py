"""From a chat or completion request to what the engine is asked: token ids, sampling parameters, how to read it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from glm45.config import configuration
from glm45.engine.request import Constraint, SamplingParams
from glm45.serving.errors import ApiError, as_client_errors
from glm45.serving.limits import Limits
from glm45.serving.schemas import (
    AllowedToolChoice,
    ChatRequest,
    CompletionRequest,
    NamedTool,
    Sampling,
    StructuredOutputs,
    as_dicts,
)
from glm45.serving.thinking import ThinkingChoice, choose_thinking, mark_messages
from glm45.text.chat import DialectName, render_tokens
from glm45.text.special_tokens import THINK, TOOL_CALL, TOOL_CALL_END
from glm45.text.tokenizer import Tokenizer


@configuration
class SamplingDefaults:
    """What holds where a request says nothing; read from a checkpoint's `generation_config.json` where it has one."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    enable_thinking: bool | None = None
    """None leaves the choice to the model, as GLM-4.5's template does."""

    def with_thinking(self, enable_thinking: bool | None) -> "SamplingDefaults":
        """Return these with another thinking switch."""
        return replace(self, enable_thinking=enable_thinking)


class Context(Protocol):
    """What planning needs to know about the server."""

    tokenizer: Tokenizer
    limits: Limits
    defaults: SamplingDefaults
    dialect: DialectName
    max_length: int
    """Most tokens of prompt and output together."""
    longest_sample: int
    """Most tokens of prompt and output together that the cache can hold as well."""
    longest_token: int
    """Bytes of the longest token: a text of more than `max_length` times as many cannot fit."""


@dataclass(slots=True)
class Plan:
    """One request to the engine, and how its output is read."""

    prompt_ids: list[int]
    params: SamplingParams
    tools: list[dict[str, Any]] | None = None
    reasoning_open: bool = False
    """Whether the prompt ends inside reasoning."""
    is_chat: bool = True
    """Whether the output is a message (reasoning, content, calls) and not plain text."""
    think_first: int = 0
    """Most tokens of reasoning, where it is a request of its own (see `thoughts`); 0 where it is not."""


def plan_chat(request: ChatRequest, context: Context, at_most: int | None = None) -> Plan:
    """Render the conversation and gather the parameters. Raises ApiError (400) with the field at fault.

    `at_most` bounds the tokens where the request names no number; the context may be a nearer bound.
    """
    thinking = choose_thinking(request, context.defaults.enable_thinking)
    tools = _allowed(request.tool_choice, as_dicts(request.tools))
    shown = [] if request.tool_choice == "none" else tools
    prompt_ids = render_prompt(as_dicts(request.messages), shown, thinking, context, request.continue_final_message)
    tokenizer = context.tokenizer
    # A budget makes reasoning a request of its own; without one, the grammar lets reasoning come first.
    apart = thinking.budget is not None and thinking.enabled is not False and not request.continue_final_message
    constraint = _constraint(request, tools, reasoning=thinking.enabled is not False and not apart)
    if apart and prompt_ids[-1] != tokenizer.special_id(THINK):
        prompt_ids += [*tokenizer.encode("\n"), tokenizer.special_id(THINK)]
    stop_ids, bias = list(request.stop_token_ids or ()), _logit_bias(request)
    if tools and request.tool_choice == "none":
        bias[tokenizer.special_id(TOOL_CALL)] = float("-inf")
    if request.parallel_tool_calls is False:
        stop_ids.append(tokenizer.special_id(TOOL_CALL_END))
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    params = _params(
        request,
        context,
        len(prompt_ids),
        _max_tokens(request),
        logit_bias=bias,
        stop_token_ids=tuple(stop_ids),
        top_logprobs=request.top_logprobs or 0,
        constraint=constraint,
    )
    if at_most is not None:
        params = replace(params, max_tokens=min(params.max_tokens, at_most))
    return Plan(
        prompt_ids,
        params,
        tools or None,
        reasoning_open=prompt_ids[-1] == tokenizer.special_id(THINK),
        think_first=(thinking.budget or 0) if apart else 0,
    )


def plan_completions(request: CompletionRequest, context: Context) -> list[Plan]:
    """Return one plan for each prompt. Raises ApiError (400) with the field at fault."""
    if request.best_of not in (None, request.n):
        raise ApiError(400, "best_of is offered only where it equals n", param="best_of")
    max_tokens = 16 if request.max_tokens is None else request.max_tokens  # 16 is OpenAI's default here
    if max_tokens == 0 and not request.echo:
        raise ApiError(400, "max_tokens is 0: ask for a token, or for echo", param="max_tokens")
    plans = []
    for prompt_ids in _prompts(request, context):
        scored = (request.echo and request.logprobs is not None) or request.prompt_logprobs is not None
        params = _params(
            request,
            context,
            len(prompt_ids),
            max(1, max_tokens),
            logit_bias=_logit_bias(request),
            stop_token_ids=tuple(request.stop_token_ids or ()),
            top_logprobs=request.logprobs or 0,
            prompt_logprobs=scored,
            detokenize=True,
            constraint=_structure(request.structured_outputs),
        )
        plans.append(Plan(prompt_ids, params, is_chat=False))
    return plans


def render_prompt(
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    thinking: ThinkingChoice,
    context: Context,
    continue_final: bool = False,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Return the ids of a conversation. Raises ApiError (400) for what the template cannot render."""
    messages = mark_messages(messages)
    _check_size(len(json.dumps(messages, ensure_ascii=False)), context)
    if continue_final and messages[-1]["role"] != "assistant":
        raise ApiError(400, "continue_final_message: the last message is not the assistant's", param="messages")
    with as_client_errors("messages"):
        return render_tokens(
            messages,
            context.tokenizer,
            tools=tools or None,
            enable_thinking=thinking.enabled,
            clear_thinking=thinking.clear,
            add_generation_prompt=add_generation_prompt and not continue_final,
            dialect=context.dialect,
        ).ids


def _params(
    request: Sampling, context: Context, num_prompt_tokens: int, max_tokens: int | None, **others: Any
) -> SamplingParams:
    """Return the engine's parameters, defaults filled in."""
    for name in ("frequency_penalty", "presence_penalty"):
        if getattr(request, name):
            raise ApiError(400, f"{name} is not offered: use repetition_penalty", param=name)
    defaults = context.defaults
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    top_k = defaults.top_k if request.top_k is None else max(request.top_k, 0)
    with as_client_errors():
        return SamplingParams(
            n=request.n,
            max_tokens=output_tokens(max_tokens, num_prompt_tokens, context),
            min_tokens=request.min_tokens,
            temperature=_or(request.temperature, defaults.temperature),
            top_p=_or(request.top_p, defaults.top_p),
            top_k=top_k,
            min_p=_or(request.min_p, 0.0),
            repetition_penalty=_or(request.repetition_penalty, defaults.repetition_penalty),
            seed=request.seed,
            stop=tuple(stop),
            ignore_eos=request.ignore_eos,
            **others,
        )


def output_tokens(asked: int | None, num_prompt_tokens: int, context: Context) -> int:
    """Return how many tokens may be generated: what was asked, or all that fits. Raises ApiError where it does not."""
    prompt_limit = min(context.limits.prompt_tokens or context.max_length, context.max_length - 1)
    if num_prompt_tokens > prompt_limit:
        raise ApiError(
            400,
            f"the prompt has {num_prompt_tokens} tokens and at most {prompt_limit} are accepted (the context is "
            f"{context.max_length} tokens): shorten the conversation",
            code="context_length_exceeded",
            param="messages",
        )
    room, limit = context.max_length - num_prompt_tokens, context.limits.output_tokens
    if asked is None:  # a prompt that fills the cache is the engine's to refuse
        return max(1, min(context.longest_sample - num_prompt_tokens, limit or room))
    if limit and asked > limit:
        raise ApiError(400, f"max_tokens is {asked} and this server gives at most {limit}", param="max_tokens")
    if asked > room:
        raise ApiError(
            400,
            f"max_tokens is {asked}, but with a prompt of {num_prompt_tokens} tokens the context of "
            f"{context.max_length} has room for {room}: lower max_tokens or leave it out",
            code="context_length_exceeded",
            param="max_tokens",
        )
    return asked


def _check_size(num_characters: int, context: Context) -> None:
    """Refuse what is certainly too long before it is tokenized, which takes seconds for megabytes."""
    fewest = num_characters // (2 * context.longest_token)  # JSON writes a character as two at most, mostly as one
    if fewest > context.max_length:
        raise ApiError(
            400,
            f"the prompt has {num_characters} characters, at least {fewest} tokens, and the context is "
            f"{context.max_length} tokens: shorten the conversation",
            code="context_length_exceeded",
            param="messages",
        )


def _max_tokens(request: ChatRequest) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise ApiError(400, f"max_tokens {old} and max_completion_tokens {new} differ: give one", param="max_tokens")
    return new if new is not None else old


def _constraint(request: ChatRequest, tools: list[dict[str, Any]], reasoning: bool) -> Constraint | None:
    """Return the grammar of the answer, if the request asks for one."""
    choice, form = request.tool_choice, request.response_format
    must_call = choice == "required" or isinstance(choice, NamedTool)
    if isinstance(choice, AllowedToolChoice):
        must_call = choice.allowed_tools.mode == "required"
    if must_call:
        if form is not None and form.type != "text":
            raise ApiError(400, "a required tool call leaves no room for response_format", param="response_format")
        return Constraint(tools=tuple(_tools_to_call(choice, tools)), reasoning=reasoning)
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Constraint(json_object=True, reasoning=reasoning)
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise ApiError(400, "response_format json_schema needs json_schema.schema", param="response_format")
    return Constraint(json_schema=form.json_schema.schema_, reasoning=reasoning)


def _structure(form: StructuredOutputs | None) -> Constraint | None:
    if form is None:
        return None
    with as_client_errors("structured_outputs"):
        return Constraint(
            json_schema=form.json_schema, json_object=bool(form.json_object), grammar=form.grammar, reasoning=False
        )


def _allowed(choice: Any, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the tools that the model may see: all, unless the choice names some as allowed."""
    if not isinstance(choice, AllowedToolChoice):
        return tools
    return [_named(each.function.name, tools) for each in choice.allowed_tools.tools]


def _tools_to_call(choice: Any, tools: list[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    if not tools:
        raise ApiError(400, "tool_choice asks for a call, but there are no tools", param="tool_choice")
    return [_named(choice.function.name, tools)] if isinstance(choice, NamedTool) else tools


def _named(name: str, tools: list[dict[str, Any]]) -> dict[str, Any]:
    for tool in tools:
        if tool["function"]["name"] == name:
            return tool
    raise ApiError(400, f"tool_choice names {name!r}, which is not among the tools", param="tool_choice")


def _logit_bias(request: Sampling) -> dict[int, float]:
    try:
        return {int(token): float(bias) for token, bias in (request.logit_bias or {}).items()}
    except ValueError as error:
        raise ApiError(400, f"logit_bias: its keys are token ids, as strings: {error}", param="logit_bias") from None


def _prompts(request: CompletionRequest, context: Context) -> list[list[int]]:
    prompt: Any = request.prompt
    tokenizer = context.tokenizer
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    for one in prompt:
        _check_size(len(one), context)
    with as_client_errors("prompt"):
        prompts = [tokenizer.encode(one) if isinstance(one, str) else list(one) for one in prompt]
    if not prompts or not all(prompts):
        raise ApiError(400, "the prompt is empty: give at least one token", param="prompt")
    return prompts


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
