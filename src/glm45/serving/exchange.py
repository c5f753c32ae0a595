"""Answers that take long: watched for clients that leave, for time limits and for the server's own end."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from glm45.serving.errors import ApiError, timed_out, unavailable
from glm45.serving.metrics import Metrics

T = TypeVar("T")
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
logger = logging.getLogger("glm45.serving")
CLIENT_LEFT = 499
"""Status in the log and the metrics of a client that left; nobody receives it."""


class ClientLeftError(Exception):
    """The client closed its connection before the answer was complete."""


async def watched(request: Request, work: Coroutine[Any, Any, T], seconds: float, stop: asyncio.Event) -> T:
    """Await `work`, unless the client leaves, time runs out or the server must stop: then `work` is cancelled."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_client_leaves(request.receive))
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, left, stopped}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if left.done():
            raise ClientLeftError
        raise _shutting_down() if stopped.done() else timed_out(seconds)
    finally:
        await _cancel(task, left, stopped)


async def started(events: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Start a generator, so that what it refuses at once is raised here, before a status is sent."""
    first = asyncio.ensure_future(anext(events, None))
    for _ in range(6):  # a refusal needs no waiting, only a few turns of the loop
        await asyncio.sleep(0)
    if first.done() and first.exception() is not None:
        raise first.exception() or AssertionError

    async def rest() -> AsyncGenerator[T, None]:
        try:
            event = await first
            if event is not None:
                yield event
                async for event in events:
                    yield event
        finally:
            await _cancel(first)
            await events.aclose()

    return rest()


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Yield what several streams yield, as it comes; the first failure ends all."""
    queue: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    async def drain(stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream) as items:
                async for item in items:
                    queue.put_nowait(("item", item))
            queue.put_nowait(("end", None))
        except Exception as error:
            queue.put_nowait(("error", error))

    tasks = [asyncio.create_task(drain(stream)) for stream in streams]
    try:
        num_open = len(tasks)
        while num_open:
            kind, item = await queue.get()
            if kind == "error":
                raise item
            if kind == "end":
                num_open -= 1
            else:
                yield item
    finally:
        await _cancel(*tasks)


class EventStream(Response):
    """Server-sent events. The stream ends with an error event if anything goes wrong in it."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        error_event: Callable[[ApiError], bytes],
        place: AbstractContextManager[Any],
        stop: asyncio.Event,
        seconds: float,
        keepalive_seconds: float,
        metrics: Metrics,
    ) -> None:
        """`place` is held while the stream lasts; `stop` ends it with a 503 event."""
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.status_code = 200
        self.background = None
        self.events = events
        self.error_event = error_event
        self.place = place
        self.stop = stop
        self.seconds = seconds
        self.keepalive_seconds = keepalive_seconds
        self.metrics = metrics
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; see the class."""
        sender = asyncio.ensure_future(self._send_all(send))
        left = asyncio.ensure_future(_client_leaves(receive))
        stopped = asyncio.ensure_future(self.stop.wait())
        with self.place:
            try:
                error = await self._watch(sender, left, stopped, send)
                if error is not None:
                    await self._end(send, error)
            finally:
                await _cancel(sender, left, stopped)
                await self.events.aclose()

    async def _watch(
        self, sender: asyncio.Future[None], left: asyncio.Future[None], stopped: asyncio.Future[Any], send: Send
    ) -> ApiError | None:
        """Wait for the end, whichever comes first, and return the error to tell of, if any."""
        deadline = time.monotonic() + self.seconds
        while True:
            timeout = min(self.keepalive_seconds, max(deadline - time.monotonic(), 0))
            await asyncio.wait({sender, left, stopped}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                return self._told(sender.exception())
            if left.done():
                self.metrics.disconnects += 1
                return None
            if stopped.done() or time.monotonic() >= deadline:
                await _cancel(sender)
                return _shutting_down() if stopped.done() else timed_out(self.seconds)
            if time.monotonic() - self._sent_at >= self.keepalive_seconds:
                await self._send(send, b": still here\n\n")

    def _told(self, error: BaseException | None) -> ApiError | None:
        if error is None or isinstance(error, ApiError):
            return error
        if isinstance(error, OSError):  # the connection broke under a write
            self.metrics.disconnects += 1
            return None
        logger.error("a stream failed", exc_info=error)
        return ApiError(500, "the server failed to finish this answer; its log says why", kind="server_error")

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self.events:
            await self._send(send, event)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, event: bytes) -> None:
        await send({"type": "http.response.body", "body": event, "more_body": True})
        self._sent_at = time.monotonic()

    async def _end(self, send: Send, error: ApiError) -> None:
        """Tell of an error, if the client still reads."""
        self.metrics.stream_errors += 1
        try:
            async with asyncio.timeout(2):
                await self._send(send, self.error_event(error))
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (TimeoutError, OSError):
            logger.info("a client did not read its last event")


def event(data: Any, name: str | None = None) -> bytes:
    """Return one server-sent event with JSON data."""
    text = f"data: {_encode(data)}\n\n"
    return (f"event: {name}\n{text}" if name else text).encode()


def openai_error_event(error: ApiError) -> bytes:
    """Return an error as an event of an OpenAI stream."""
    return b"data: " + json.dumps(error.body()).encode() + b"\n\n"


def _shutting_down() -> ApiError:
    return unavailable("the server is shutting down", code="shutting_down", retry_after=5)


async def _client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*futures: asyncio.Future[Any]) -> None:
    """Cancel what is not done and wait until it has ended."""
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)
