"""Engine clients: one protocol for whoever needs samples, three places that they come from.

Token ids in, token ids and log-probabilities out; chat templates and text stay with the caller. Over HTTP the server
is SGLang, vLLM or `glm45 serve`, which speaks SGLang's shape and OpenAI's. Failures of a server are RuntimeError with
its own words.
"""

import asyncio
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import httpx

from glm45.engine.engine import Engine, Weights
from glm45.engine.request import Completion, FinishReason, SamplingParams

TIMEOUT = httpx.Timeout(connect=10, read=None, write=60, pool=None)
"""No limit on reading: a rollout takes as long as it takes."""


class EngineClient(Protocol):
    """Generates from the current weights, and is told when they change."""

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> list[Completion]:
        """Return the `n` completions of a prompt. Raises ValueError for what cannot be served."""
        ...

    async def update_weights(self, weights: Weights = None, *, version: int | None = None) -> int:
        """Serve new weights, once requests under way have ended; return their version."""
        ...

    async def pause(self) -> None:
        """Stop generating; requests wait."""
        ...

    async def resume(self) -> None:
        """Go on after `pause`."""
        ...

    async def is_healthy(self) -> bool:
        """Say whether requests are taken."""
        ...

    async def close(self) -> None:
        """Give up connections."""
        ...


class InProcessClient:
    """An engine of this process; its weights are those of the model that is trained."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> list[Completion]:
        """See `EngineClient`."""
        return await self.engine.generate_async(prompt_ids, params)

    async def update_weights(self, weights: Weights = None, *, version: int | None = None) -> int:
        """See `EngineClient`: a state, a checkpoint folder, or None if the parameters changed in place."""
        return await asyncio.to_thread(partial(self.engine.update_weights, weights, version=version))

    async def pause(self) -> None:
        """See `EngineClient`."""
        await asyncio.to_thread(self.engine.pause)

    async def resume(self) -> None:
        """See `EngineClient`."""
        await asyncio.to_thread(self.engine.resume)

    async def is_healthy(self) -> bool:
        """See `EngineClient`."""
        return not self.engine.is_closed

    async def close(self) -> None:
        """See `EngineClient`: the engine belongs to whoever made it."""


class _HttpClient:
    """What both servers share: a connection pool, failures as exceptions, and health."""

    def __init__(
        self, url: str, *, api_key: str | None = None, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        """`transport` replaces the network, for tests."""
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._http = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=TIMEOUT, limits=limits, transport=transport
        )

    async def _post(self, path: str, body: dict[str, Any] | None = None, **query: Any) -> Any:
        response = await self._http.post(path, json=body, params=query)
        if response.status_code in (400, 404, 422):
            raise ValueError(f"{self._http.base_url}{path} refused: {response.text[:2000]}")
        if response.is_error:
            raise RuntimeError(f"{self._http.base_url}{path} failed ({response.status_code}): {response.text[:2000]}")
        return response.json() if "json" in response.headers.get("content-type", "") else None

    async def is_healthy(self) -> bool:
        """See `EngineClient`."""
        try:
            return (await self._http.get("/health", timeout=10)).status_code == 200
        except httpx.HTTPError:
            return False

    async def close(self) -> None:
        """See `EngineClient`."""
        await self._http.aclose()


class SglangClient(_HttpClient):
    """SGLang's native endpoints: `/generate`, `/update_weights_from_disk`, `/pause_generation` and their like.

    SGLang scales log-probabilities by temperature, as this project does. Seeds hold on a server that was started with
    `--enable-deterministic-inference`.
    """

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> list[Completion]:
        """See `EngineClient`."""
        body: dict[str, Any] = {
            "input_ids": list(prompt_ids),
            "sampling_params": _sglang_params(params),
            "return_logprob": True,
            "top_logprobs_num": params.top_logprobs,
            "logprob_start_len": 0 if params.prompt_logprobs else -1,
        }
        answer = await self._post("/generate", body)
        answers = answer if isinstance(answer, list) else [answer]
        return [self._completion(index, one, params) for index, one in enumerate(answers)]

    async def update_weights(self, weights: Weights = None, *, version: int | None = None) -> int:
        """See `EngineClient`: a checkpoint folder that the server can read."""
        body: dict[str, Any] = {"model_path": _checkpoint(weights), "flush_cache": True}
        if version is not None:
            body["weight_version"] = str(version)
        answer = await self._post("/update_weights_from_disk", body)
        if not answer["success"]:
            raise RuntimeError(f"the server did not load {weights}: {answer['message']}")
        info = (await self._http.get("/get_model_info")).json()
        return _version(info.get("weight_version"))

    async def pause(self) -> None:
        """See `EngineClient`."""
        await self._post("/pause_generation", {"mode": "in_place"})

    async def resume(self) -> None:
        """See `EngineClient`."""
        await self._post("/continue_generation", {})

    @staticmethod
    def _completion(index: int, answer: dict[str, Any], params: SamplingParams) -> Completion:
        meta = answer["meta_info"]
        finish = meta["finish_reason"] or {"type": "abort"}
        pairs = meta["output_token_logprobs"]
        token_ids = [token for _, token, _ in pairs]
        if "output_ids" in answer and list(answer["output_ids"]) != token_ids:
            raise RuntimeError("the server's output_ids differ from the tokens that its log-probabilities are of")
        prompt = meta.get("input_token_logprobs") if params.prompt_logprobs else None
        versions = meta.get("weight_versions") or [_version(meta.get("weight_version"))] * len(token_ids)
        return Completion(
            index=index,
            token_ids=token_ids,
            logprobs=[logprob for logprob, _, _ in pairs],
            weight_versions=versions,
            finish_reason=_finish_reason(finish["type"]),
            stop_reason=finish.get("matched"),
            text=answer["text"] if params.wants_text else None,
            top_logprobs=[{token: lp for lp, token, _ in top} for top in meta.get("output_top_logprobs") or []],
            prompt_logprobs=None if prompt is None else [logprob for logprob, _, _ in prompt],
            num_cached_tokens=meta.get("cached_tokens", 0),
        )


class VllmClient(_HttpClient):
    """vLLM's OpenAI-style completions with token ids (vLLM 0.10.2 and later), also served by `glm45 serve`.

    Start vLLM with `--logprobs-mode processed_logprobs`, or at temperatures other than 1 its log-probabilities are
    not those that were sampled from. Weights and pause need `VLLM_SERVER_DEV_MODE=1`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`model` is the name under which the server knows its model."""
        super().__init__(url, api_key=api_key, transport=transport)
        self.model = model
        self.weight_version = 0
        """Counted here: vLLM does not tell."""

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> list[Completion]:
        """See `EngineClient`."""
        version = self.weight_version
        answer = await self._post("/v1/completions", self._body(prompt_ids, params))
        usage = answer.get("usage") or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [self._completion(choice, params, version, cached) for choice in choices]

    async def update_weights(self, weights: Weights = None, *, version: int | None = None) -> int:
        """See `EngineClient`: a checkpoint folder that the server can read."""
        kwargs = {"weights_path": _checkpoint(weights)}
        await self._post("/collective_rpc", {"method": "reload_weights", "kwargs": kwargs})
        await self._post("/reset_prefix_cache")
        self.weight_version = self.weight_version + 1 if version is None else version
        return self.weight_version

    async def pause(self) -> None:
        """See `EngineClient`."""
        await self._post("/pause", mode="keep")

    async def resume(self) -> None:
        """See `EngineClient`."""
        await self._post("/resume")

    def _body(self, prompt_ids: Sequence[int], params: SamplingParams) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(prompt_ids),
            "return_token_ids": True,
            "logprobs": params.top_logprobs,
            **_common_params(params),
            "n": params.n,
            "max_tokens": params.max_tokens,
            "min_tokens": params.min_tokens,
            "top_k": params.top_k,
        }
        if params.seed is not None:
            body["seed"] = params.seed
        if params.prompt_logprobs:
            body["prompt_logprobs"] = 0
        if params.top_logprobs:
            body["return_tokens_as_token_ids"] = True
        if (constraint := params.constraint) is not None:
            form = {"json": constraint.json_schema, "grammar": constraint.grammar}
            body["structured_outputs"] = {key: value for key, value in form.items() if value is not None}
        return body

    @staticmethod
    def _completion(choice: dict[str, Any], params: SamplingParams, version: int, cached: int) -> Completion:
        token_ids = list(choice["token_ids"])
        prompt = choice.get("prompt_logprobs") if params.prompt_logprobs else None
        tops = choice["logprobs"].get("top_logprobs") if params.top_logprobs else None
        return Completion(
            index=choice["index"],
            token_ids=token_ids,
            logprobs=list(choice["logprobs"]["token_logprobs"]),
            weight_versions=[version] * len(token_ids),
            finish_reason=_finish_reason(choice["finish_reason"]),
            stop_reason=choice.get("stop_reason"),
            text=choice["text"] if params.wants_text else None,
            top_logprobs=[{int(key.removeprefix("token_id:")): lp for key, lp in top.items()} for top in tops or []],
            prompt_logprobs=None if prompt is None else [_only_logprob(entry) for entry in prompt],
            num_cached_tokens=cached,
        )


def _common_params(params: SamplingParams) -> dict[str, Any]:
    """Parameters that both servers call the same."""
    body: dict[str, Any] = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "ignore_eos": params.ignore_eos,
        "stop": list(params.stop),
        "stop_token_ids": list(params.stop_token_ids),
    }
    if params.wants_text:
        body["skip_special_tokens"] = False  # text as the engine here gives it
    if params.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    constraint = params.constraint
    if constraint is not None and (constraint.tools is not None or constraint.json_object):
        raise ValueError("over HTTP a constraint is a JSON schema or a grammar: write tools and objects as one")
    if constraint is not None and constraint.json_schema is not None and constraint.reasoning:
        raise ValueError("over HTTP a schema holds from the first token on: set reasoning=False")
    return body


def _sglang_params(params: SamplingParams) -> dict[str, Any]:
    body = {
        **_common_params(params),
        "n": params.n,
        "max_new_tokens": params.max_tokens,
        "min_new_tokens": params.min_tokens,
        "top_k": params.top_k or -1,
    }
    if params.seed is not None:
        body["sampling_seed"] = params.seed
    if (constraint := params.constraint) is not None:
        if constraint.json_schema is not None:
            body["json_schema"] = json.dumps(constraint.json_schema)
        else:
            body["ebnf"] = constraint.grammar
    return body


def _checkpoint(weights: Weights) -> str:
    if not isinstance(weights, str | Path):
        raise ValueError("over HTTP, weights are a checkpoint folder that the server can read: save them first")
    return str(weights)


def _version(version: Any) -> int:
    """SGLang's weight versions are any text; what is no number counts as 0."""
    return int(version) if str(version).isdigit() else 0


def _finish_reason(reason: str | None) -> FinishReason:
    return "stop" if reason == "stop" else "length" if reason == "length" else "abort"


def _only_logprob(entry: dict[str, Any] | None) -> float | None:
    """The log-probability of a prompt token, which is the first of its entry."""
    return None if entry is None else next(iter(entry.values()))["logprob"]
