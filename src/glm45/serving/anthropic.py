"""Anthropic's messages API, thin: its requests become chat requests, and the same pieces are told in its shape."""

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from glm45.serving.anthropic_schemas import CountRequest, MessagesRequest, to_chat
from glm45.serving.errors import ApiError
from glm45.serving.exchange import event
from glm45.serving.generation import Generation, Piece, collect
from glm45.serving.plan import Plan, plan_chat
from glm45.serving.service import STREAMED, Service, error_responses

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def router(service: Service) -> APIRouter:
    """Return the endpoints."""
    routes = APIRouter(tags=["Anthropic"], responses=error_responses())

    @routes.post("/v1/messages", responses=STREAMED)
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation, whole or as a stream of server-sent events."""
        service.check_model(body.model)
        plan = await service.prepared(request, _plan, body, service)
        answer = Answer(service.generation(plan, request, service.new_id("msg_")), service.model_name)
        if body.stream:
            return await service.streamed(1, answer.events(), error_event)
        return JSONResponse(await service.whole(request, 1, answer.whole()))

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountRequest, request: Request) -> dict[str, int]:
        """Return how many tokens a conversation has."""
        service.check_model(body.model)
        plan = await service.prepared(request, plan_chat, to_chat(body), service)
        return {"input_tokens": len(plan.prompt_ids)}

    return routes


def _plan(body: MessagesRequest, service: Service) -> Plan:
    # max_tokens is mandatory here and clients send a constant: it is a bound, and the context may be a nearer one.
    return plan_chat(to_chat(body), service, at_most=body.max_tokens)


def error_event(error: ApiError) -> bytes:
    """Return an error as an event of Anthropic's stream."""
    return f"event: error\ndata: {json.dumps(error.body(anthropic=True))}\n\n".encode()


class Answer:
    """A message in Anthropic's shape."""

    def __init__(self, generation: Generation, model_name: str) -> None:
        self.generation = generation
        self.head = {
            "id": generation.request_id,
            "type": "message",
            "role": "assistant",
            "model": model_name,
            "stop_reason": None,
            "stop_sequence": None,
        }

    async def whole(self) -> dict[str, Any]:
        """Return the message in one piece."""
        (whole,) = await collect(self.generation)
        message = whole.message
        content: list[dict[str, Any]] = []
        if message.get("reasoning_content"):
            content.append({"type": "thinking", "thinking": message["reasoning_content"], "signature": ""})
        if message["content"]:
            content.append({"type": "text", "text": message["content"]})
        for call in message.get("tool_calls", ()):
            function = call["function"]
            arguments = _arguments(function["arguments"])
            content.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments})
        return {
            **self.head,
            "content": content,
            **_stop(whole.finish_reason, whole.stop_reason),
            "usage": self._usage(),
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the message as Anthropic's events."""
        blocks = Blocks()
        last: Piece | None = None
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                if last is None:
                    usage = {**self._usage(), "output_tokens": 0}
                    start = {"type": "message_start", "message": {**self.head, "content": [], "usage": usage}}
                    yield event(start, "message_start")
                last = piece
                for delta in piece.deltas:
                    for told in blocks.take(delta):
                        yield event(told, told["type"])
        for told in blocks.close():
            yield event(told, told["type"])
        assert last is not None, "a sample ends with a piece"
        delta = _stop(last.finish_reason, last.stop_reason)
        yield event({"type": "message_delta", "delta": delta, "usage": self._usage()}, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    def _usage(self) -> dict[str, Any]:
        usage = self.generation.usage
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
        }


class Blocks:
    """Turns OpenAI deltas into content blocks that open, grow and close."""

    def __init__(self) -> None:
        self.index = -1
        self.kind = ""

    def take(self, delta: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events that tell one delta."""
        if "reasoning_content" in delta:
            yield from self._open("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield self._grow({"type": "thinking_delta", "thinking": delta["reasoning_content"]})
        elif "content" in delta:
            yield from self._open("text", {"type": "text", "text": ""})
            yield self._grow({"type": "text_delta", "text": delta["content"]})
        for call in delta.get("tool_calls", ()):
            function = call["function"]
            if "id" in call:
                yield from self.close()
                block = {"type": "tool_use", "id": call["id"], "name": function["name"], "input": {}}
                yield from self._open("tool_use", block)
            if function["arguments"]:
                yield self._grow({"type": "input_json_delta", "partial_json": function["arguments"]})

    def close(self) -> Iterator[dict[str, Any]]:
        """Yield the events that end the open block, if any."""
        if self.kind == "thinking":
            yield self._grow({"type": "signature_delta", "signature": ""})
        if self.kind:
            yield {"type": "content_block_stop", "index": self.index}
        self.kind = ""

    def _open(self, kind: str, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self.kind == kind:
            return
        yield from self.close()
        self.kind = kind
        self.index += 1
        yield {"type": "content_block_start", "index": self.index, "content_block": block}

    def _grow(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self.index, "delta": delta}


def _stop(finish_reason: str | None, stop_reason: int | str | None) -> dict[str, Any]:
    if isinstance(stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_reason}
    return {"stop_reason": STOP_REASONS[finish_reason or "stop"], "stop_sequence": None}


def _arguments(text: str) -> dict[str, Any]:
    """Return a call's arguments; those of a call that was cut short are kept as text, under `partial`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"partial": text}
