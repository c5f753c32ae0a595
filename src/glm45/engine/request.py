"""What is asked of the engine, what it gives back, and what it keeps about a generation under way.

Nothing here knows tensors. Token ids are plain integers, log-probabilities plain floats, in nats.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from glm45.config import configuration
from glm45.engine.blocks import BlockTable

FinishReason = Literal["stop", "length", "abort"]


@configuration
class Constraint:
    """A grammar that the output must follow. One of the first four fields is set; needs an engine with a tokenizer."""

    json_schema: dict[str, Any] | None = None
    """The output is one JSON value of this schema."""
    json_object: bool = False
    """The output is any JSON object."""
    tools: tuple[dict[str, Any], ...] | None = None
    """The output is one or more calls, in the report's XML form, of these OpenAI-style tools."""
    grammar: str | None = None
    """The output follows this grammar, in xgrammar's EBNF."""
    reasoning: bool = True
    """Whether reasoning may come first, as `<think>...</think>`; a `grammar` says so itself."""

    def __post_init__(self) -> None:
        given = [self.json_schema is not None, self.json_object, self.tools is not None, self.grammar is not None]
        if sum(given) != 1:
            raise ValueError("Constraint: set exactly one of json_schema, json_object, tools, grammar")


@configuration
class SamplingParams:
    """How to sample one request. Every field is checked; nothing is clamped.

    Order of operations: grammar, logit bias, repetition penalty, minimum length, temperature, top-k, top-p, min-p.
    Not in the report, which names temperature and top-p only.
    """

    n: int = 1
    """Samples of the prompt: one prefill, then forks."""
    max_tokens: int = 256
    """Most tokens that are generated; the context of the engine may end a sample earlier."""
    min_tokens: int = 0
    """Tokens before which no stop id can be sampled and no stop string ends the sample."""
    temperature: float = 1.0
    """Divides the logits. 0 is greedy."""
    top_p: float = 1.0
    """Keeps the smallest set of most likely tokens with at least this probability. 1 keeps all."""
    top_k: int = 0
    """Keeps this many of the most likely tokens. 0 keeps all."""
    min_p: float = 0.0
    """Drops tokens less likely than this share of the most likely one's probability. 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens already seen, prompt included. 1 is none."""
    logit_bias: dict[int, float] = dataclasses.field(default_factory=dict)
    """Added to the logits of these token ids; -inf bans a token."""
    seed: int | None = None
    """Same seed, same prompt, same parameters: same output, whatever else is in the batch. None draws one."""
    stop: tuple[str, ...] = ()
    """Strings that end a sample. They are cut from `text`; the tokens that spell them stay in `token_ids`."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a sample, besides the engine's end-of-sequence ids. They stay in `token_ids`."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence id (for measurements)."""
    top_logprobs: int = 0
    """How many of the most likely tokens to report at each position, besides the chosen one."""
    prompt_logprobs: bool = False
    """Whether to report the prompt's log-probabilities; the prompt is then computed without the prefix cache."""
    detokenize: bool = False
    """Whether to report text, besides token ids; implied by `stop`."""
    constraint: Constraint | None = None
    """A grammar that the output must follow."""

    def __post_init__(self) -> None:
        problems = [message for holds, message in self._checks() if not holds]
        if problems:
            raise ValueError("SamplingParams: " + "; ".join(problems))

    def _checks(self) -> list[tuple[bool, str]]:
        return [
            (self.n >= 1, f"n is {self.n}: ask for at least one sample"),
            (self.max_tokens >= 1, f"max_tokens is {self.max_tokens}: allow at least one token"),
            (
                0 <= self.min_tokens <= self.max_tokens,
                f"min_tokens is {self.min_tokens}: keep it between 0 and max_tokens {self.max_tokens}",
            ),
            (0 <= self.temperature < float("inf"), f"temperature is {self.temperature}: use 0 (greedy) or more"),
            (0 < self.top_p <= 1, f"top_p is {self.top_p}: use a share above 0 and at most 1"),
            (self.top_k >= 0, f"top_k is {self.top_k}: use 0 (off) or a count"),
            (0 <= self.min_p <= 1, f"min_p is {self.min_p}: use a share between 0 and 1"),
            (self.repetition_penalty > 0, f"repetition_penalty is {self.repetition_penalty}: use a factor above 0"),
            (
                all(bias < float("inf") for bias in self.logit_bias.values()),  # false for a NaN, too
                "logit_bias holds +inf or a NaN: use numbers, or -inf to ban a token",
            ),
            (all(self.stop), "stop holds an empty string, which would end every sample at once"),
            (0 <= self.top_logprobs <= 100, f"top_logprobs is {self.top_logprobs}: use 0 to 100"),
        ]

    @property
    def is_plain(self) -> bool:
        """Whether temperature alone shapes the distribution, so that the fast sampler may be used."""
        return (
            self.top_p == 1
            and self.top_k == 0
            and self.min_p == 0
            and self.repetition_penalty == 1
            and not self.logit_bias
            and self.top_logprobs == 0
            and self.constraint is None
        )

    @property
    def wants_text(self) -> bool:
        """Whether the engine must turn tokens into text."""
        return self.detokenize or bool(self.stop)


@dataclass(slots=True)
class Completion:
    """One finished sample (or what there is of an aborted one)."""

    index: int
    """Which of the request's n samples this is."""
    token_ids: list[int]
    """The sampled tokens, the stop token included."""
    logprobs: list[float]
    """Of each sampled token: log softmax(logits / temperature), before penalties, filters and grammar; at
    temperature 0 that of the unscaled logits. The same number that the training forward computes."""
    weight_versions: list[int]
    """Version of the weights that produced each token."""
    finish_reason: FinishReason
    """`stop` (stop id or string), `length` (token limit or end of context) or `abort`."""
    stop_reason: int | str | None = None
    """The stop id or string that ended the sample."""
    text: str | None = None
    """The text, cut before a stop string; None unless asked for."""
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    """At each position the most likely tokens and their log-probabilities; empty unless asked for."""
    prompt_logprobs: list[float | None] | None = None
    """Of each prompt token, None for the first; None unless asked for."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""


@dataclass(slots=True)
class Delta:
    """A piece of a sample as it is generated."""

    index: int
    """Which of the request's n samples this belongs to."""
    token_ids: list[int]
    """New tokens."""
    logprobs: list[float]
    """Their log-probabilities."""
    weight_versions: list[int]
    """Version of the weights that produced each of them."""
    text: str | None = None
    """New text that can no longer be part of a stop string; None unless asked for."""
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    """As in `Completion`, for the new tokens."""
    finish_reason: FinishReason | None = None
    """Set on the last delta of a sample."""
    stop_reason: int | str | None = None
    """The stop id or string that ended the sample."""
    prompt_logprobs: list[float | None] | None = None
    """On the first delta of a sample, if asked for."""
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""


@dataclass(eq=False, slots=True)
class Request:
    """A prompt with its parameters, as the engine holds it."""

    id: str
    prompt_ids: list[int]
    params: SamplingParams
    owner: str = ""
    """Who asks; owners share the engine fairly."""
    seed: int = 0
    """The seed in force: `params.seed` or one that the engine drew."""
    stop_ids: frozenset[int] = frozenset()
    """Every token id that ends a sample."""
    prompt_logprobs: list[float | None] | None = None
    """Those known so far: they grow with the prefill."""

    @property
    def is_to_be_scored(self) -> bool:
        """Whether log-probabilities of the prompt are asked for and not all known: it must be computed, not cached."""
        return self.params.prompt_logprobs and len(self.prompt_logprobs or ()) < len(self.prompt_ids)


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample under way: its tokens, how many of them the cache holds, and its blocks."""

    request: Request
    index: int
    seed: int
    token_ids: list[int]
    """Prompt and output."""
    num_prompt_tokens: int
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the cache."""
    table: BlockTable = field(default_factory=BlockTable)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_reported: int = 0
    """Output tokens already handed to the stream."""
    drafts: list[int] = field(default_factory=list)
    """Tokens that the MTP layer proposes for the next positions."""
    draft_probs: Any = None
    """The distributions that the drafts were drawn from; belongs to `speculative`."""
    draft_state: Any = None
    """How far the MTP layer's cache has got; belongs to `speculative`."""
    matcher: Any = None
    """Grammar state; belongs to `constraints`."""
    text: Any = None
    """Detokenizer state; belongs to `detokenizer`."""

    @classmethod
    def of(cls, request: Request, index: int, seed: int) -> "Sequence":
        """Start sample `index` of a request."""
        return cls(
            request=request,
            index=index,
            seed=seed,
            token_ids=list(request.prompt_ids),
            num_prompt_tokens=len(request.prompt_ids),
        )

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_pending_tokens(self) -> int:
        """Tokens whose keys and values are not in the cache yet: 1 while decoding, more while prefilling."""
        return len(self.token_ids) - self.num_computed_tokens
