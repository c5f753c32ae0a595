"""Endpoints besides the chat APIs: health, metrics, tokenizer."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from glm45.serving.errors import ApiError, as_client_errors
from glm45.serving.plan import render_prompt
from glm45.serving.schemas import DetokenizeRequest, TokenizeRequest, as_dicts
from glm45.serving.service import Service, error_responses
from glm45.serving.thinking import choose_thinking


def router(service: Service) -> APIRouter:
    """Return the endpoints."""
    routes = APIRouter(tags=["server"], responses=error_responses())

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Say that the process lives."""
        return {"status": "ok"}

    @routes.get("/ready")
    async def ready() -> dict[str, Any]:
        """Say that requests are taken: 503 while the server stops."""
        service.gate.check(0)
        return {"status": "ready", "model": service.model_name, "weight_version": service.engine.weight_version}

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return counters and latencies in Prometheus's text format."""
        gate = service.gate
        text = service.metrics.render(service.engine.stats(), gate.num_samples, gate.num_refused)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
        """Return the token ids of plain text, or of messages as chat completions render them."""
        service.check_model(body.model)
        ids = await service.prepared(request, _tokenize, body, service)
        answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": service.max_length}
        if body.return_token_strs:
            answer["token_strs"] = [service.tokenizer.decode([token]) for token in ids]
        return answer

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """Return the text of token ids."""
        service.check_model(body.model)
        with as_client_errors("tokens"):
            return {"prompt": service.tokenizer.decode(body.tokens)}

    return routes


def _tokenize(body: TokenizeRequest, service: Service) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    if body.prompt is not None:
        with as_client_errors("prompt"):
            return service.tokenizer.encode(body.prompt)
    thinking = choose_thinking(body, service.defaults.enable_thinking)
    return render_prompt(
        as_dicts(body.messages),
        as_dicts(body.tools),
        thinking,
        service,
        add_generation_prompt=body.add_generation_prompt,
    )
