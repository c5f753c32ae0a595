"""What clients may send, as pydantic models: the fields of OpenAI's API, and the extensions that GLM clients use.

A field that is unknown here is refused, with its name, rather than ignored. Fields that are accepted and have no
effect are listed as such.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WrapValidator, model_validator

TokenId = Annotated[int, Field(ge=0)]
Stop = Annotated[str, Field(min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
MAX_STOPS = 16
MAX_SAMPLES = 128


class Strict(BaseModel):
    """No unknown fields, no conversions; a field that is null is as good as absent, as in OpenAI's API."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or name not in cls.model_fields}


class Open(BaseModel):
    """Further fields are allowed; what is known is checked."""

    model_config = ConfigDict(extra="allow", strict=True)


def _as_given(value: Any, check: Any) -> Any:
    """Check a value and keep it as it came: the chat template writes a client's tools in the client's key order."""
    check(value)
    return value


class StreamOptions(Strict):
    """What a stream tells besides the answer."""

    include_usage: bool = False
    """Send a last chunk with the usage of the whole request."""
    include_timings: bool = False
    """Extension: put tokens a second and the share of accepted drafts into that chunk."""
    include_obfuscation: bool | None = None
    """No effect."""


class Sampling(Strict):
    """How to sample: common to chat and completions."""

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_SAMPLES)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="Extension. 0 and -1 keep all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Extension.")
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="Extension. 1 is none.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="Only 0 is offered.")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="Only 0 is offered.")
    logit_bias: dict[str, Bias] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOPS, description="Extension.")
    ignore_eos: bool = Field(False, description="Extension, for measurements.")
    min_tokens: int = Field(0, ge=0, description="Extension.")
    return_token_ids: bool = Field(False, description="Extension: token ids beside the text, as in vLLM.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="No effect.")
    metadata: dict[str, Any] | None = Field(None, description="No effect.")
    store: bool | None = Field(None, description="No effect.")
    service_tier: str | None = Field(None, description="No effect.")
    safety_identifier: str | None = Field(None, description="No effect.")
    prompt_cache_key: str | None = Field(None, description="No effect: equal prefixes are always cached.")


class Function(Open):
    """A function that the model may call."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Open):
    """A tool in OpenAI's form."""

    type: Literal["function"]
    function: Function


class CalledFunction(Open):
    """A call's function and arguments, as JSON text."""

    name: str = Field(min_length=1)
    arguments: str | dict[str, Any] | None = None


class Call(Open):
    """A call in an assistant message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Part(Open):
    """A part of a message's content; GLM-4.5 reads `text` parts."""

    type: str
    text: str | None = None


class Message(Open):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    enable_thinking: bool | None = Field(None, description="Extension, in a user message: for its turn.")


GivenTool = Annotated[Tool, WrapValidator(_as_given)]
GivenMessage = Annotated[Message, WrapValidator(_as_given)]
"""Checked as the model says; the value is the client's own dict (`as_dicts`)."""


def as_dicts(given: list[Any] | None) -> list[dict[str, Any]]:
    """Return messages or tools as the dicts that the client sent."""
    return list(given or ())


class NamedFunction(Strict):
    """The name of a function."""

    name: str


class NamedTool(Strict):
    """The one tool to call."""

    type: Literal["function"] = "function"
    function: NamedFunction


class AllowedTools(Strict):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1)


class AllowedToolChoice(Strict):
    """The model sees and calls these tools alone."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class JsonSchema(Strict):
    """The schema of an answer."""

    name: str = "answer"
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(Strict):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Thinking(Strict):
    """Whether to think, as Z.ai's and Anthropic's clients write it."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1, description="Most tokens of reasoning; then the answer begins.")
    clear_thinking: bool | None = Field(None, description="False keeps the reasoning of earlier turns in the prompt.")
    display: str | None = Field(None, description="No effect.")


class TemplateKwargs(Strict):
    """Arguments of the chat template, as vLLM's and SGLang's clients write them."""

    enable_thinking: bool | None = None
    thinking: bool | None = None
    clear_thinking: bool | None = None


class Reasoning(Strict):
    """Whether to think, as OpenRouter's clients write it."""

    enabled: bool | None = None
    effort: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    exclude: bool | None = Field(None, description="No effect.")
    summary: str | None = Field(None, description="No effect.")


class ThinkingSwitch(Strict):
    """Every spelling of the thinking switch."""

    thinking: Thinking | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    reasoning: Reasoning | None = None
    reasoning_effort: str | None = Field(None, description="`none` turns thinking off; other values have no effect.")
    thinking_budget: int | None = Field(None, ge=1, description="Most tokens of reasoning; then the answer begins.")


class ChatRequest(Sampling, ThinkingSwitch):
    """`POST /v1/chat/completions`."""

    messages: list[GivenMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[GivenTool] | None = Field(None, max_length=512)
    tool_choice: Literal["auto", "none", "required"] | NamedTool | AllowedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    continue_final_message: bool = Field(False, description="Extension: go on with a last assistant message.")
    extra_body: ThinkingSwitch | None = Field(
        None, description="What the `openai` client merges into the request; here also where it was sent as it stands."
    )
    modalities: list[Literal["text"]] | None = Field(None, description="No effect.")
    verbosity: str | None = Field(None, description="No effect.")


class StructuredOutputs(Strict):
    """The form of a completion, as vLLM writes it."""

    json_schema: dict[str, Any] | None = Field(None, alias="json")
    json_object: bool | None = None
    grammar: str | None = None


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    suffix: None = Field(None, description="Not offered.")
    best_of: int | None = Field(None, ge=1, description="Only the value of `n` is offered.")
    prompt_logprobs: Literal[0] | None = Field(None, description="Extension, as in vLLM: score the prompt's tokens.")
    return_tokens_as_token_ids: bool = Field(False, description="Extension: name tokens `token_id:7` in logprobs.")
    structured_outputs: StructuredOutputs | None = Field(None, description="Extension, as in vLLM.")
    skip_special_tokens: bool = Field(True, description="No effect: text holds special tokens as they are spelled.")


class TokenizeRequest(ThinkingSwitch):
    """`POST /tokenize`: plain text, or messages as chat completions would render them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[GivenMessage] | None = None
    tools: list[GivenTool] | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]
