"""The server's door: who may come in, with how large a body, and what is counted of everyone who does."""

import asyncio
import logging
import time
import uuid
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm45.serving.errors import ApiError, ErrorResponse, is_anthropic
from glm45.serving.service import Service

logger = logging.getLogger("glm45.serving")
OPEN_PATHS = ("/", "/page", "/health", "/ready", "/favicon.ico")
"""Paths that need no key: the page asks for one."""
DRAINED_BODIES = 8
"""A body that is too large is read and dropped up to this many times the limit, so that its sender reads the answer."""


class Door:
    """ASGI middleware: request id, host check, API key, body limits, response counts."""

    def __init__(self, app: ASGIApp, service: Service, allowed_hosts: Iterable[str] = ()) -> None:
        """`allowed_hosts` empty takes any Host header; on a loopback address it keeps foreign pages out."""
        self.app = app
        self.service = service
        self.allowed_hosts = frozenset(allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer why not."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = uuid.uuid4().hex
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            scope.setdefault("state", {})["owner"] = self._check(scope, headers)
            replay = await self._read_body(scope, headers, receive)
            if replay is None:
                return  # the client left
            await self.app(scope, replay, counted)
        except ApiError as error:
            await ErrorResponse(error, is_anthropic(scope["path"]))(scope, receive, counted)
        except Exception:
            if status:
                raise  # too late to say anything: the connection breaks
            # Answered here, since the framework's own handler would close the connection under the next request.
            logger.exception("%s %s failed", scope["method"], scope["path"])
            failed = ApiError(500, "the server failed to answer; its log says why", kind="server_error")
            await ErrorResponse(failed, is_anthropic(scope["path"]))(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.service.metrics.responses[route, status] += 1

    def _check(self, scope: Scope, headers: Headers) -> str:
        """Return whom the request is counted for. Raises ApiError for a foreign host or a wrong key."""
        host = headers.get("host", "").rsplit(":", 1)[0] if headers.get("host", "")[-1:] != "]" else headers["host"]
        if self.allowed_hosts and host not in self.allowed_hosts:
            raise ApiError(403, f"the Host header {host!r} is not this server's: start it with allow_hosts to allow it")
        client = (scope.get("client") or ("",))[0]
        path = scope["path"]
        if path in OPEN_PATHS or path.startswith("/page/"):
            return client
        return self.service.keys.owner(headers.get("authorization"), headers.get("x-api-key")) or client

    async def _read_body(self, scope: Scope, headers: Headers, receive: Receive) -> Receive | None:
        """Read the body within its limits and return a `receive` that gives it; None if the client left."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return receive
        limits = self.service.limits
        declared = headers.get("content-length", "")
        too_large = declared.isdigit() and int(declared) > limits.body_bytes
        parts: list[bytes] = []
        size, deadline = 0, time.monotonic() + limits.body_seconds
        more = True
        while more and size <= limits.body_bytes * DRAINED_BODIES:
            try:
                async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408, f"the body took longer than {limits.body_seconds:g} seconds to arrive", code="timeout"
                ) from None
            if message["type"] == "http.disconnect":
                self.service.metrics.disconnects += 1
                return None
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            too_large = too_large or size > limits.body_bytes
            if not too_large:
                parts.append(message.get("body", b""))
            else:
                parts.clear()
        if too_large:
            raise ApiError(413, f"the body is larger than {limits.body_bytes} bytes: send less", code="body_too_large")
        return _replayed(b"".join(parts), receive)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the whole body once, and then what the server says."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
