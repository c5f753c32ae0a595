"""Failures as clients read them: one OpenAI error object, or Anthropic's shape where Anthropic's client asks."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi.responses import JSONResponse

ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A failure with its HTTP status, to be told to the client. The message says what was wrong and what to do."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self, anthropic: bool = False) -> dict[str, Any]:
        """Return the error object, in OpenAI's or Anthropic's shape."""
        if anthropic:
            kind = ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class ErrorResponse(JSONResponse):
    """An error object; ASCII, since a message may quote text that UTF-8 cannot hold."""

    def __init__(self, error: ApiError, anthropic: bool = False) -> None:
        super().__init__(error.body(anthropic), error.status, error.headers)

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return json.dumps(content).encode()


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's API."""
    return path.startswith("/v1/messages")


def unavailable(message: str, *, code: str = "unavailable", retry_after: int | None = None) -> ApiError:
    """Return a 503: not now, but perhaps later."""
    headers = {"Retry-After": str(retry_after)} if retry_after is not None else None
    return ApiError(503, message, kind="server_error", code=code, headers=headers)


def timed_out(seconds: float) -> ApiError:
    """Return a 504 for a request that took longer than it may."""
    return ApiError(
        504, f"the answer took longer than {seconds:g} seconds: ask for less", kind="server_error", code="timeout"
    )


@contextmanager
def as_client_errors(param: str | None = None) -> Iterator[None]:
    """Turn a ValueError of the renderer, the parameters or the engine into a 400."""
    try:
        yield
    except ValueError as error:
        raise ApiError(400, str(error), param=param) from error
