"""What every endpoint shares: the engine, the tokenizer, the limits and the counters."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from fastapi import Request

from glm45.serving.errors import ApiError, as_client_errors, unavailable
from glm45.serving.exchange import EventStream, started, watched
from glm45.serving.generation import Generation
from glm45.serving.limits import Gate, Keys, Limits
from glm45.serving.metrics import Metrics
from glm45.serving.plan import Plan, SamplingDefaults
from glm45.text.chat import DialectName
from glm45.text.tokenizer import Tokenizer

T = TypeVar("T")
LARGE_BODY = 32 * 1024
"""Bodies from this size on are rendered and tokenized in a thread, so that other streams go on."""


@dataclass
class Service:
    """One served model."""

    engine: Any
    """A `glm45.engine.engine.Engine`; tests use a scripted one (see `generation.ServedEngine`)."""
    tokenizer: Tokenizer
    model_name: str
    limits: Limits = field(default_factory=Limits)
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    dialect: DialectName = "glm-4.5"
    keys: Keys = field(default_factory=lambda: Keys(()))
    is_admin: bool = False
    """Whether weights may be changed and the engine paused over HTTP."""

    def __post_init__(self) -> None:
        self.max_length: int = self.engine.max_length
        self.longest_sample: int = self.engine.longest_sample
        self.longest_token = max(len(self.tokenizer.decode_bytes([i])) for i in range(self.tokenizer.vocab_size))
        self.metrics = Metrics()
        self.gate = Gate(self.limits.samples)
        self.stop = asyncio.Event()
        self.created = int(time.time())
        self._tokenizing = asyncio.Semaphore(2)

    def check_model(self, name: str | None) -> None:
        """Raise ApiError (404) for a model that is not served."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"the model {name!r} is not served here: ask for {self.model_name!r}, or leave model out",
                code="model_not_found",
                param="model",
            )

    def check_admin(self) -> None:
        """Raise ApiError (403) where the engine may not be changed over HTTP."""
        if not self.is_admin:
            raise ApiError(
                403,
                "this changes the engine for everyone and is off: start the server with admin=true",
                kind="permission_error",
                code="not_admin",
            )

    async def new_weights(self, path: str, version: int | None = None, in_flight: str = "finish") -> int:
        """Serve the weights of a folder and return their version. Raises ValueError for what cannot be loaded."""
        update = partial(self.engine.update_weights, path, version=version, in_flight=in_flight)
        try:
            return await asyncio.to_thread(update)
        except (OSError, RuntimeError) as error:
            raise ValueError(str(error)) from error

    async def forget(self, in_flight: str) -> None:
        """Drop every cached prefix; with `abort`, end the requests under way.

        Raises ApiError (503) while new weights wait for requests to finish.
        """
        update, version = self.engine.update_weights, self.engine.weight_version
        try:
            await asyncio.to_thread(partial(update, None, version=version, in_flight=in_flight))
        except RuntimeError as error:
            raise unavailable(str(error), retry_after=1) from error

    @property
    def fingerprint(self) -> str:
        """What OpenAI calls the system fingerprint: the version of the weights."""
        return f"weights-{self.engine.weight_version}"

    def new_id(self, prefix: str) -> str:
        """Return an id that no other request has."""
        return prefix + uuid.uuid4().hex

    def generation(self, plan: Plan, request: Request, request_id: str) -> Generation:
        """Return a plan made ready to run."""
        return Generation(plan, self.engine, self.tokenizer, self.metrics, request_id, request.state.owner)

    async def prepared(self, request: Request, plan: Callable[..., T], *arguments: Any) -> T:
        """Run the planning of a request, in a thread where its body is large or a grammar must be compiled."""
        planned = await self._planned(request, plan, *arguments)
        for one in planned if isinstance(planned, list) else [planned]:
            if isinstance(one, Plan) and one.params.constraint is not None:
                with as_client_errors():
                    await asyncio.to_thread(self.engine.compile, one.params.constraint)
        return planned

    async def _planned(self, request: Request, plan: Callable[..., T], *arguments: Any) -> T:
        if int(request.headers.get("content-length") or LARGE_BODY) < LARGE_BODY:
            return plan(*arguments)
        async with self._tokenizing:
            return await asyncio.to_thread(plan, *arguments)

    async def whole(self, request: Request, num_samples: int, work: Coroutine[Any, Any, T]) -> T:
        """Await an answer that is sent in one piece, within every limit."""
        with closing(work), self.gate.entered(num_samples):
            return await watched(request, work, self.limits.request_seconds, self.stop)

    async def streamed(
        self, num_samples: int, events: AsyncGenerator[bytes, None], error_event: Callable[[ApiError], bytes]
    ) -> EventStream:
        """Return an answer that is sent as events, within every limit."""
        with ExitStack() as place:  # taken before anything is awaited, given back here or by the stream
            place.enter_context(self.gate.entered(num_samples))
            return EventStream(
                await started(events),
                error_event=error_event,
                place=place.pop_all(),
                stop=self.stop,
                seconds=self.limits.request_seconds,
                keepalive_seconds=self.limits.keepalive_seconds,
                metrics=self.metrics,
            )


STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, whole or as server-sent events.",
        "content": {
            "application/json": {"schema": {"type": ["object", "array"]}},
            "text/event-stream": {"schema": {"type": "object", "description": "One event."}},
        },
    }
}
"""Description of an endpoint that answers in either way, for the OpenAPI document."""


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the description of the errors of an endpoint, for the OpenAPI document."""
    about = {
        400: "The request is wrong; the message says where.",
        401: "No or a wrong API key.",
        403: "Not offered.",
        404: "The model is not served here.",
        408: "The body took too long to arrive.",
        413: "The body is too large.",
        415: "The body is not JSON.",
        429: "The queue is full.",
        500: "The server failed.",
        503: "The server is stopping, or gave the request up.",
        504: "The answer took too long.",
    }
    schema = {"schema": {"$ref": "#/components/schemas/Error"}}
    chosen = statuses or tuple(about)
    return {status: {"description": about[status], "content": {"application/json": schema}} for status in chosen}
