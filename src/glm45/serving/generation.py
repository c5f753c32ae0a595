"""One request under way: the engine's tokens become pieces of messages, and usage is counted.

Everything that the server answers, streamed or whole, chat or text, OpenAI or Anthropic, comes from `pieces`.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from glm45.engine.request import Delta, SamplingParams
from glm45.serving.errors import ApiError, as_client_errors, unavailable
from glm45.serving.exchange import merged
from glm45.serving.metrics import Metrics
from glm45.serving.plan import Plan
from glm45.serving.thoughts import Inserted, think_then_answer
from glm45.text.parsing import StreamParser, join_deltas
from glm45.text.special_tokens import THINK, THINK_END, TOOL_CALL
from glm45.text.tokenizer import Tokenizer


class ServedEngine(Protocol):
    """What the server needs of an engine (`glm45.engine.engine.Engine`)."""

    max_length: int
    longest_sample: int

    def stream(
        self, prompt: list[int], params: SamplingParams, *, request_id: str | None = None, owner: str = ""
    ) -> AsyncGenerator[Delta, None]:
        """Yield pieces of the samples; the last of each has a `finish_reason`."""
        ...

    @property
    def weight_version(self) -> int:
        """Version of the weights in force."""
        ...

    def stats(self) -> dict[str, Any]:
        """Return totals and gauges."""
        ...


@dataclass(slots=True)
class Piece:
    """What one step of the engine adds to one sample."""

    index: int
    deltas: list[dict[str, Any]]
    """Of a chat: OpenAI deltas, each of one kind."""
    text: str
    """Of a completion: new text."""
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    finish_reason: str | None = None
    """`stop`, `length` or `tool_calls`, with the last piece of a sample."""
    stop_reason: int | str | None = None
    """The stop id or string that ended it."""
    prompt_logprobs: list[float | None] | None = None
    weight_versions: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Usage:
    """Tokens of a request, over all its samples."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    def add(self, other: "Usage") -> None:
        """Add another request's tokens."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class ReasoningCounter:
    """Counts sampled tokens between `<think>` and `</think>` (or the call that cuts reasoning short)."""

    def __init__(self, tokenizer: Tokenizer, is_open: bool) -> None:
        self._opens = tokenizer.special_id(THINK)
        self._closes = (tokenizer.special_id(THINK_END), tokenizer.special_id(TOOL_CALL))
        self._is_open = is_open
        self.count = 0

    def take(self, token_ids: list[int]) -> None:
        """Read further tokens."""
        for token in token_ids:
            if token in self._closes:
                self._is_open = False
            elif token == self._opens:
                self._is_open = True
            elif self._is_open:
                self.count += 1


class Sample:
    """One of a request's samples: how its tokens are read."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, index: int, call_id_prefix: str) -> None:
        self.index = index
        self.parser = StreamParser(plan.tools, plan.reasoning_open, call_id_prefix, tokenizer) if plan.is_chat else None
        self.reasoning = ReasoningCounter(tokenizer, plan.reasoning_open)
        self.by_text = bool(plan.params.stop)  # a stop string may end inside a token: then text is read, not ids
        self.num_tokens = 0
        self.has_calls = False
        self.last_token_at = 0.0

    def insert(self, token_id: int, tokenizer: Tokenizer) -> Piece:
        """Return what a token adds that was not sampled: it is read, and counted nowhere."""
        assert self.parser is not None
        self.reasoning.take([token_id])
        deltas = self.parser.feed(tokenizer.decode([token_id])) if self.by_text else self.parser.feed_ids([token_id])
        return Piece(index=self.index, deltas=deltas, text="", token_ids=[], logprobs=[], top_logprobs=[])

    def read(self, delta: Delta) -> Piece:
        """Return what the engine's delta adds."""
        self.num_tokens += len(delta.token_ids)
        self.reasoning.take(delta.token_ids)
        deltas: list[dict[str, Any]] = []
        if self.parser is not None:
            deltas = self.parser.feed(delta.text or "") if self.by_text else self.parser.feed_ids(delta.token_ids)
            if delta.finish_reason is not None:
                deltas += self.parser.finish()
            self.has_calls = self.has_calls or any("tool_calls" in one for one in deltas)
        reason: str | None = delta.finish_reason
        if reason == "stop" and self.has_calls:
            reason = "tool_calls"
        return Piece(
            index=delta.index,
            deltas=deltas,
            text=delta.text or "",
            token_ids=delta.token_ids,
            logprobs=delta.logprobs,
            top_logprobs=delta.top_logprobs,
            finish_reason=reason,
            stop_reason=delta.stop_reason,
            prompt_logprobs=delta.prompt_logprobs,
            weight_versions=delta.weight_versions,
        )


class Generation:
    """Runs one plan. `usage` and the times are complete once `pieces` is exhausted."""

    def __init__(
        self, plan: Plan, engine: ServedEngine, tokenizer: Tokenizer, metrics: Metrics, request_id: str, owner: str
    ) -> None:
        self.plan = plan
        self.engine = engine
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.request_id = request_id
        self.owner = owner
        prefix = f"call_{request_id[-12:]}_"
        self.samples = [
            Sample(plan, tokenizer, i, f"{prefix}{i}_" if plan.params.n > 1 else prefix) for i in range(plan.params.n)
        ]
        self.num_cached_tokens = 0
        self.began_at = time.perf_counter()
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        self._stats_before = engine.stats()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield pieces until every sample has ended. Raises ApiError: 400 for what the engine refuses, 503 if aborted.

        Closing the generator aborts the request.
        """
        async with aclosing(self._deltas()) as deltas:
            with as_client_errors():
                async for delta in deltas:
                    if isinstance(delta, Inserted):
                        yield self.samples[delta.index].insert(delta.token_id, self.tokenizer)
                        continue
                    if delta.finish_reason == "abort":
                        raise unavailable("the request was aborted by the server", code="aborted", retry_after=1)
                    self._count(delta)
                    yield self.samples[delta.index].read(delta)
        self.ended_at = time.perf_counter()
        self.metrics.duration.observe(self.ended_at - self.began_at)

    def _deltas(self) -> AsyncGenerator[Delta | Inserted, None]:
        plan, who = self.plan, (self.request_id, self.owner)
        if not plan.think_first:
            return self.engine.stream(plan.prompt_ids, plan.params, request_id=who[0], owner=who[1])
        chains = [think_then_answer(self.engine, self.tokenizer, plan, sample.index, *who) for sample in self.samples]
        return chains[0] if len(chains) == 1 else merged(chains)

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            prompt_tokens=len(self.plan.prompt_ids),
            cached_tokens=self.num_cached_tokens,
            completion_tokens=sum(sample.num_tokens for sample in self.samples),
            reasoning_tokens=sum(sample.reasoning.count for sample in self.samples),
        )

    def timings(self) -> dict[str, float | None]:
        """Return seconds to the first token, tokens a second after it, and the share of drafts that were accepted.

        The share is the engine's, over everything that ran in this request's time.
        """
        now, first = self.ended_at or time.perf_counter(), self.first_token_at
        seconds = None if first is None else now - first
        before, after = self._stats_before, self.engine.stats()
        drafted = after.get("drafted_tokens", 0) - before.get("drafted_tokens", 0)
        accepted = after.get("accepted_tokens", 0) - before.get("accepted_tokens", 0)
        num_later = self.usage.completion_tokens - len(self.samples)
        return {
            "first_token_seconds": None if first is None else first - self.began_at,
            "tokens_per_second": num_later / seconds if seconds and num_later > 0 else None,
            "draft_acceptance": accepted / drafted if drafted else None,
        }

    def _count(self, delta: Delta) -> None:
        now, sample = time.perf_counter(), self.samples[delta.index]
        if delta.index == 0 and not sample.num_tokens:
            self.num_cached_tokens = delta.num_cached_tokens
        if self.first_token_at is None:
            self.first_token_at = now
            self.metrics.first_token.observe(now - self.began_at)
        elif sample.last_token_at and delta.token_ids:
            self.metrics.inter_token.observe((now - sample.last_token_at) / len(delta.token_ids))
        sample.last_token_at = now


@dataclass(slots=True)
class Whole:
    """Every piece of one sample put together."""

    deltas: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    prompt_logprobs: list[float | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        self.deltas += piece.deltas
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.top_logprobs += piece.top_logprobs
        self.weight_versions += piece.weight_versions
        self.prompt_logprobs = self.prompt_logprobs or piece.prompt_logprobs
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.stop_reason = self.stop_reason if piece.stop_reason is None else piece.stop_reason

    @property
    def message(self) -> dict[str, Any]:
        """The OpenAI assistant message."""
        message = join_deltas(self.deltas)
        if not message.get("tool_calls"):
            message["content"] = message["content"] or ""
        return message


async def collect(generation: Generation) -> list[Whole]:
    """Return the samples of a generation once they are complete."""
    wholes = [Whole() for _ in generation.samples]
    async with aclosing(generation.pieces()) as pieces:
        async for piece in pieces:
            wholes[piece.index].add(piece)
    if any(whole.finish_reason is None for whole in wholes):
        raise ApiError(500, "the engine ended without finishing every sample", kind="server_error")
    return wholes
