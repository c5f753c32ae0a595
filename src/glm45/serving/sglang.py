"""SGLang's endpoints for rollouts: token ids in and out with log-probabilities, weights, pause and continue.

What a trainer's engine client speaks (`glm45.engine.clients`), so that this server can stand where SGLang does.
Endpoints that change the engine for everyone are refused unless the server was started with `admin=true`.
"""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from glm45.engine.request import Constraint, SamplingParams
from glm45.serving.errors import ApiError, as_client_errors
from glm45.serving.exchange import event, openai_error_event
from glm45.serving.generation import Generation, Whole, collect
from glm45.serving.openai import DONE, finite
from glm45.serving.plan import Plan, output_tokens
from glm45.serving.schemas import MAX_SAMPLES, Stop, Strict, TokenId
from glm45.serving.service import STREAMED, Service, error_responses

PauseMode = Literal["abort", "retract", "in_place"]
IN_FLIGHT = {"abort": "abort", "retract": "recompute", "in_place": "continue"}
"""What becomes of requests under way when weights change in a pause: SGLang's words, then the engine's."""


class SglangParams(Strict):
    """SGLang's sampling parameters."""

    max_new_tokens: int | None = Field(None, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    n: int = Field(1, ge=1, le=MAX_SAMPLES)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    sampling_seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | list[Stop] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool = False
    logit_bias: dict[str, float] | None = None
    json_schema: str | dict[str, Any] | None = Field(None, description="JSON text, or the schema itself.")
    ebnf: str | None = None
    skip_special_tokens: bool = Field(True, description="No effect: text holds special tokens as they are spelled.")
    no_stop_trim: bool = Field(False, description="Only false is offered.")
    spaces_between_special_tokens: bool = Field(True, description="No effect.")


class GenerateRequest(Strict):
    """`POST /generate`."""

    text: str | None = None
    input_ids: list[TokenId] | None = None
    sampling_params: SglangParams | None = None
    return_logprob: bool = False
    logprob_start_len: int = Field(-1, ge=-1, description="0 also scores the prompt.")
    top_logprobs_num: int = Field(0, ge=0, le=20)
    return_text_in_logprobs: bool = False
    stream: bool = False
    rid: Annotated[str, Field(min_length=1, max_length=256)] | None = None


class UpdateWeightsRequest(Strict):
    """`POST /update_weights_from_disk`."""

    model_path: str
    weight_version: int | str | None = None
    abort_all_requests: bool = False
    load_format: str | None = Field(None, description="No effect.")
    flush_cache: bool = Field(True, description="Only true is offered: old prefixes are of no use to new weights.")


class PauseRequest(Strict):
    """`POST /pause_generation`."""

    mode: PauseMode = "abort"


class AbortRequest(Strict):
    """`POST /abort_request`."""

    rid: str = ""
    abort_all: bool = False


def router(service: Service) -> APIRouter:
    """Return the endpoints."""
    routes = APIRouter(tags=["SGLang"], responses=error_responses())
    _add_generate(routes, service)
    _add_control(routes, service)
    return routes


def _add_generate(routes: APIRouter, service: Service) -> None:
    @routes.post("/generate", responses=STREAMED)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Continue text or token ids; several samples give a list."""
        plan = await service.prepared(request, _plan, body, service)
        generation = service.generation(plan, request, body.rid or service.new_id(""))
        answer = GenerateAnswer(generation, service, body)
        if body.stream:
            return await service.streamed(plan.params.n, answer.events(), openai_error_event)
        return JSONResponse(await service.whole(request, plan.params.n, answer.whole()))

    @routes.get("/get_model_info")
    async def get_model_info() -> dict[str, Any]:
        """Describe the model."""
        version = str(service.engine.weight_version)
        return {"model_path": service.model_name, "is_generation": True, "weight_version": version}

    @routes.get("/health_generate")
    async def health_generate() -> dict[str, str]:
        """Say that the engine generates: one token, or 503."""
        plan = Plan([service.tokenizer.special_id("<|user|>")], SamplingParams(max_tokens=1), is_chat=False)
        generation = Generation(
            plan, service.engine, service.tokenizer, service.metrics, service.new_id("health-"), "health"
        )
        try:
            async with asyncio.timeout(30):
                await collect(generation)
        except TimeoutError:
            raise ApiError(503, "the engine gave no token in 30 seconds", kind="server_error") from None
        return {"status": "ok"}


def _add_control(routes: APIRouter, service: Service) -> None:
    """Add what changes the engine for everyone."""
    pause_mode: PauseMode = "in_place"

    @routes.post("/update_weights_from_disk")
    async def update_weights_from_disk(body: UpdateWeightsRequest) -> Response:
        """Serve the weights of a checkpoint folder on this machine."""
        service.check_admin()
        in_flight = "abort" if body.abort_all_requests else "finish"
        if service.engine.stats().get("paused"):
            in_flight = IN_FLIGHT[pause_mode]
        try:
            now = await service.new_weights(body.model_path, _version(body.weight_version), in_flight)
        except ValueError as error:
            told = ApiError(400, str(error), param="model_path").body()
            return JSONResponse({"success": False, "message": str(error), "num_paused_requests": 0, **told}, 400)
        message = f"weights of {body.model_path} are in force as version {now}"
        return JSONResponse({"success": True, "message": message, "num_paused_requests": 0, "weight_version": now})

    @routes.post("/pause_generation")
    async def pause_generation(body: PauseRequest) -> dict[str, str]:
        """Stop computing. Requests under way wait; with mode `abort` they end."""
        nonlocal pause_mode
        service.check_admin()
        pause_mode = body.mode
        await asyncio.to_thread(service.engine.pause)
        if body.mode == "abort":
            await service.forget("abort")
        return {"status": "paused", "mode": body.mode}

    @routes.post("/continue_generation")
    async def continue_generation() -> dict[str, str]:
        """Go on after a pause."""
        service.check_admin()
        await asyncio.to_thread(service.engine.resume)
        return {"status": "running"}

    @routes.post("/abort_request")
    async def abort_request(body: AbortRequest) -> dict[str, str]:
        """End a request by its `rid`, or all."""
        service.check_admin()
        if body.abort_all:
            await service.forget("abort")
        else:
            service.engine.abort(body.rid)
        return {"status": "ok"}

    @routes.post("/flush_cache")
    async def flush_cache() -> dict[str, str]:
        """Forget every cached prefix."""
        service.check_admin()
        await service.forget("continue")
        return {"status": "ok"}


def _version(version: int | str | None) -> int | None:
    try:
        return None if version is None else int(version)
    except ValueError:
        raise ApiError(
            400, f"weight_version is {version!r}: a whole number is needed", param="weight_version"
        ) from None


def _schema(given: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """Read a schema. Raises ValueError for text that is no JSON object."""
    if not isinstance(given, str):
        return given
    try:
        schema = json.loads(given)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json_schema is no JSON: {error}") from None
    if not isinstance(schema, dict):
        raise ValueError(f"json_schema is {given[:80]!r}: an object is needed")
    return schema


def _plan(body: GenerateRequest, service: Service) -> Plan:
    if (body.text is None) == (body.input_ids is None):
        raise ApiError(400, "give either text or input_ids", param="input_ids")
    params = body.sampling_params or SglangParams.model_validate({})
    if params.no_stop_trim:
        raise ApiError(400, "no_stop_trim is not offered: output_ids hold the stop tokens", param="sampling_params")
    with as_client_errors():
        prompt_ids = body.input_ids if body.input_ids is not None else service.tokenizer.encode(body.text or "")
        if not prompt_ids:
            raise ApiError(400, "the prompt is empty: give at least one token", param="input_ids")
        stop = [params.stop] if isinstance(params.stop, str) else params.stop or []
        constraint = None
        if params.json_schema is not None or params.ebnf is not None:
            constraint = Constraint(json_schema=_schema(params.json_schema), grammar=params.ebnf, reasoning=False)
        return Plan(
            prompt_ids,
            SamplingParams(
                n=params.n,
                max_tokens=output_tokens(params.max_new_tokens, len(prompt_ids), service),
                min_tokens=params.min_new_tokens,
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=max(params.top_k, 0),
                min_p=params.min_p,
                repetition_penalty=params.repetition_penalty,
                logit_bias={int(token): bias for token, bias in (params.logit_bias or {}).items()},
                seed=params.sampling_seed,
                stop=tuple(stop),
                stop_token_ids=tuple(params.stop_token_ids or ()),
                ignore_eos=params.ignore_eos,
                top_logprobs=body.top_logprobs_num,
                prompt_logprobs=body.return_logprob and body.logprob_start_len == 0,
                detokenize=True,
                constraint=constraint,
            ),
            is_chat=False,
        )


class GenerateAnswer:
    """An answer in SGLang's shape."""

    def __init__(self, generation: Generation, service: Service, body: GenerateRequest) -> None:
        self.generation = generation
        self.tokenizer = service.tokenizer
        self.body = body

    async def whole(self) -> dict[str, Any] | list[dict[str, Any]]:
        """Return the answer in one piece; a list for several samples."""
        answers = [self._object(whole) for whole in await collect(self.generation)]
        return answers[0] if len(answers) == 1 else answers

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the answer so far after every step, as SGLang does."""
        wholes = [Whole() for _ in self.generation.samples]
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                wholes[piece.index].add(piece)
                told = self._object(wholes[piece.index])
                yield event(told if len(wholes) == 1 else {**told, "index": piece.index})
        yield DONE

    def _object(self, whole: Whole) -> dict[str, Any]:
        prompt_ids = self.generation.plan.prompt_ids
        meta: dict[str, Any] = {
            "id": self.generation.request_id,
            "finish_reason": _finish(whole),
            "prompt_tokens": len(prompt_ids),
            "completion_tokens": len(whole.token_ids),
            "cached_tokens": self.generation.num_cached_tokens,
            "weight_version": str(whole.weight_versions[-1] if whole.weight_versions else 0),
            "weight_versions": whole.weight_versions,
        }
        if self.body.return_logprob:
            meta["output_token_logprobs"] = self._pairs(whole.logprobs, whole.token_ids)
            if whole.prompt_logprobs is not None:
                meta["input_token_logprobs"] = self._pairs(whole.prompt_logprobs, prompt_ids)
            if self.body.top_logprobs_num:
                meta["output_top_logprobs"] = [self._pairs(list(top.values()), list(top)) for top in whole.top_logprobs]
        return {"text": whole.text, "output_ids": whole.token_ids, "meta_info": meta}

    def _pairs(self, logprobs: list[Any], token_ids: list[int]) -> list[list[Any]]:
        """Return SGLang's triples: log-probability, token id, and the token's text where it was asked for."""
        with_text = self.body.return_text_in_logprobs
        return [
            [
                None if logprob is None else finite(logprob),
                token,
                self.tokenizer.decode([token]) if with_text else None,
            ]
            for logprob, token in zip(logprobs, token_ids, strict=True)
        ]


def _finish(whole: Whole) -> dict[str, Any] | None:
    if whole.finish_reason is None:
        return None
    if whole.finish_reason == "length":
        return {"type": "length", "length": len(whole.token_ids)}
    return {"type": "stop", "matched": whole.stop_reason}
