"""OpenAI's endpoints: chat completions, completions and models."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from glm45.serving.exchange import event, merged, openai_error_event
from glm45.serving.generation import Generation, Piece, Usage, Whole, collect
from glm45.serving.plan import Plan, plan_chat, plan_completions
from glm45.serving.schemas import ChatRequest, CompletionRequest
from glm45.serving.service import STREAMED, Service, error_responses
from glm45.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
UNLIKELY = -9999.0
"""What OpenAI writes for log-probabilities of minus infinity, which JSON cannot hold."""


def router(service: Service) -> APIRouter:
    """Return the endpoints."""
    routes = APIRouter(tags=["OpenAI"], responses=error_responses())

    @routes.post("/v1/chat/completions", responses=STREAMED)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, whole or as a stream of server-sent events."""
        service.check_model(body.model)
        plan = await service.prepared(request, plan_chat, body, service)
        generation = service.generation(plan, request, service.new_id("chatcmpl-"))
        answer = ChatAnswer(generation, service, body)
        if body.stream:
            return await service.streamed(plan.params.n, answer.events(), openai_error_event)
        return JSONResponse(await service.whole(request, plan.params.n, answer.whole()))

    @routes.post("/v1/completions", responses=STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue text or token ids, whole or as a stream of server-sent events."""
        service.check_model(body.model)
        plans = await service.prepared(request, plan_completions, body, service)
        request_id = service.new_id("cmpl-")
        generations = [service.generation(plan, request, f"{request_id}-{i}") for i, plan in enumerate(plans)]
        answer = TextAnswer(request_id, generations, service, body)
        num_samples = body.n * len(plans)
        if body.stream:
            return await service.streamed(num_samples, answer.events(), openai_error_event)
        return JSONResponse(await service.whole(request, num_samples, answer.whole()))

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the one model that is served."""
        return {"object": "list", "data": [_model(service)]}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Describe the model that is served."""
        service.check_model(name)
        return _model(service)

    return routes


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "glm45",
        "max_model_len": service.max_length,
    }


class ChatAnswer:
    """A chat completion in OpenAI's shape."""

    def __init__(self, generation: Generation, service: Service, body: ChatRequest) -> None:
        self.generation = generation
        self.tokenizer = service.tokenizer
        self.body = body
        self.head = {
            "id": generation.request_id,
            "object": "chat.completion",
            "created": _now(),
            "model": service.model_name,
            "system_fingerprint": service.fingerprint,
        }

    async def whole(self) -> dict[str, Any]:
        """Return the answer in one piece."""
        wholes = await collect(self.generation)
        choices = [self._choice(index, whole) for index, whole in enumerate(wholes)]
        return {**self.head, "choices": choices, "usage": usage_object(self.generation.usage)}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the answer as chunks."""
        head = {**self.head, "object": "chat.completion.chunk"}
        options = self.body.stream_options
        tail = {"usage": None} if options and options.include_usage else {}
        begun = False
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                if not begun:
                    for index in range(self.body.n):
                        yield event({**head, "choices": [_chunk(index, {"role": "assistant", "content": ""})], **tail})
                    begun = True
                for choice in self._chunks(piece):
                    yield event({**head, "choices": [choice], **tail})
        if options and (options.include_usage or options.include_timings):
            last = {**head, "choices": [], "usage": usage_object(self.generation.usage)}
            if options.include_timings:
                last["timings"] = self.generation.timings()
            yield event(last)
        yield DONE

    def _choice(self, index: int, whole: Whole) -> dict[str, Any]:
        choice = {
            "index": index,
            "message": {**whole.message, "refusal": None},
            "logprobs": self._logprobs(whole) if self.body.logprobs else None,
            "finish_reason": whole.finish_reason,
        }
        return choice | ({"token_ids": whole.token_ids} if self.body.return_token_ids else {})

    def _chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Return the choices of the chunks that tell a piece: one a delta, the last with the finish reason."""
        chunks = [_chunk(piece.index, delta) for delta in piece.deltas]
        if piece.finish_reason is not None:
            chunks.append(_chunk(piece.index, {}, piece.finish_reason))
        wants_tokens = piece.token_ids and (self.body.logprobs or self.body.return_token_ids)
        if wants_tokens and not chunks:
            chunks.append(_chunk(piece.index, {}))
        if wants_tokens and self.body.logprobs:
            chunks[0]["logprobs"] = self._logprobs(piece)
        if wants_tokens and self.body.return_token_ids:
            chunks[0]["token_ids"] = piece.token_ids
        return chunks

    def _logprobs(self, piece: Piece | Whole) -> dict[str, Any]:
        """Return what OpenAI calls logprobs: of every sampled token, those of reasoning and tags included."""
        content = []
        num_top = self.body.top_logprobs or 0
        for i, (token, logprob) in enumerate(zip(piece.token_ids, piece.logprobs, strict=True)):
            top = sorted(piece.top_logprobs[i].items(), key=lambda item: -item[1])[:num_top] if num_top else []
            content.append(
                {
                    **_token(self.tokenizer, token, logprob),
                    "top_logprobs": [_token(self.tokenizer, other, value) for other, value in top],
                }
            )
        return {"content": content, "refusal": None}


class TextAnswer:
    """A text completion in OpenAI's shape, of one or more prompts."""

    def __init__(
        self, request_id: str, generations: list[Generation], service: Service, body: CompletionRequest
    ) -> None:
        self.generations = generations
        self.tokenizer = service.tokenizer
        self.body = body
        self.drops_tokens = body.max_tokens == 0  # the engine generates at least one; it is not shown
        self.head = {
            "id": request_id,
            "object": "text_completion",
            "created": _now(),
            "model": service.model_name,
            "system_fingerprint": service.fingerprint,
        }

    async def whole(self) -> dict[str, Any]:
        """Return the answer in one piece."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(collect(generation)) for generation in self.generations]
        except BaseExceptionGroup as failed:  # the first failure is the answer
            raise failed.exceptions[0] from None
        choices = []
        for number, task in enumerate(tasks):
            for index, whole in enumerate(task.result()):
                choices.append(self._choice(number, index, whole, is_first=True))
        return {**self.head, "choices": choices, "usage": usage_object(self._usage())}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the answer as chunks; prompts are answered together."""
        options = self.body.stream_options
        tail = {"usage": None} if options and options.include_usage else {}
        begun: set[tuple[int, int]] = set()
        async with aclosing(
            merged([numbered(n, generation.pieces()) for n, generation in enumerate(self.generations)])
        ) as pieces:
            async for number, piece in pieces:
                is_first = (number, piece.index) not in begun
                begun.add((number, piece.index))
                choice = self._choice(number, piece.index, piece, is_first)
                if choice["text"] or piece.token_ids or piece.finish_reason:
                    yield event({**self.head, "choices": [choice], **tail})
        if options and (options.include_usage or options.include_timings):
            last = {**self.head, "choices": [], "usage": usage_object(self._usage())}
            if options.include_timings:
                last["timings"] = self.generations[0].timings()
            yield event(last)
        yield DONE

    def _usage(self) -> Usage:
        usage = Usage()
        for generation in self.generations:
            usage.add(generation.usage)
        if self.drops_tokens:
            usage.completion_tokens = 0
        usage.reasoning_tokens = 0
        return usage

    def _choice(self, number: int, index: int, piece: Piece | Whole, is_first: bool) -> dict[str, Any]:
        plan = self.generations[number].plan
        text = "" if self.drops_tokens else piece.text
        if self.body.echo and is_first:
            text = self.tokenizer.decode(plan.prompt_ids) + text
        choice: dict[str, Any] = {
            "index": number * self.body.n + index,
            "text": text,
            "logprobs": self._logprobs(plan, piece, is_first) if self.body.logprobs is not None else None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self.body.prompt_logprobs is not None and is_first:
            choice["prompt_logprobs"] = self._prompt_logprobs(plan, piece)
        if self.body.return_token_ids:
            choice["token_ids"] = [] if self.drops_tokens else piece.token_ids
            choice["prompt_token_ids"] = plan.prompt_ids if is_first else None
        return choice

    def _logprobs(self, plan: Plan, piece: Piece | Whole, is_first: bool) -> dict[str, Any]:
        """Return the four lists of the old completions API; the prompt's tokens have no alternatives listed."""
        token_ids: list[int] = []
        logprobs: list[float | None] = []
        top: list[dict[str, float] | None] = []
        if self.body.echo and is_first:
            token_ids += plan.prompt_ids
            logprobs += piece.prompt_logprobs or [None] * len(plan.prompt_ids)
            top += [None] * len(plan.prompt_ids)
        if not self.drops_tokens:
            token_ids += piece.token_ids
            logprobs += piece.logprobs
            for alternatives in piece.top_logprobs or [{}] * len(piece.token_ids):
                top.append({self._name(token): finite(value) for token, value in alternatives.items()})
        tokens = [self._name(token) for token in token_ids]
        offsets = [0]
        for token in tokens[:-1]:
            offsets.append(offsets[-1] + len(token))
        return {
            "tokens": tokens,
            "token_logprobs": [None if logprob is None else finite(logprob) for logprob in logprobs],
            "top_logprobs": top,
            "text_offset": offsets[: len(tokens)],
        }

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self.body.return_tokens_as_token_ids else self.tokenizer.decode([token])

    def _prompt_logprobs(self, plan: Plan, piece: Piece | Whole) -> list[dict[str, Any] | None]:
        """Return vLLM's list: of every prompt token its log-probability under its id, null for the first."""
        return [
            None if logprob is None else {str(token): {"logprob": finite(logprob)}}
            for token, logprob in zip(plan.prompt_ids, piece.prompt_logprobs or [], strict=False)
        ]


async def numbered(number: int, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Yield pieces with the number of their prompt."""
    async with aclosing(pieces):
        async for piece in pieces:
            yield number, piece


def usage_object(usage: Usage) -> dict[str, Any]:
    """Return OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can hold."""
    return max(logprob, UNLIKELY)


def _chunk(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.decode_bytes([token])
    return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}


def _now() -> int:
    return int(time.time())
