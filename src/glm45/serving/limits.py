"""What the server allows, who may ask, and when it says "later"."""

import hashlib
import hmac
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from glm45.config import configuration
from glm45.serving.errors import ApiError, unavailable


@configuration
class Limits:
    """Bounds of one server. Not in the report."""

    body_bytes: int = 8 * 2**20
    """Largest request body."""
    body_seconds: float = 30.0
    """Longest time that a body may take to arrive."""
    prompt_tokens: int = 0
    """Longest prompt; 0 leaves it to the context."""
    output_tokens: int = 0
    """Most tokens that one sample may have; 0 leaves it to the context."""
    samples: int = 1024
    """Most samples under way or queued, over all requests; more are refused with 429."""
    request_seconds: float = 600.0
    """Longest time from request to last token, queue included."""
    shutdown_seconds: float = 30.0
    """How long streams may go on once the server is told to stop."""
    keepalive_seconds: float = 15.0
    """After so long without a token a stream sends a comment, so that proxies keep it open."""

    def __post_init__(self) -> None:
        for name in ("body_bytes", "body_seconds", "samples", "request_seconds", "keepalive_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        for name in ("prompt_tokens", "output_tokens", "shutdown_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 or more")


class Gate:
    """Counts the samples under way; refuses more than the limit, and everything once the server drains."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.num_samples = 0
        self.num_refused = 0
        self.draining = False

    def check(self, num_samples: int) -> None:
        """Raise ApiError: 429 where there is no room for so many, 503 where the server is stopping."""
        if self.draining:
            raise unavailable("the server is shutting down", code="shutting_down", retry_after=5)
        if num_samples > self.limit:
            raise ApiError(
                400, f"{num_samples} samples in one request; this server takes {self.limit} at once", param="n"
            )
        if self.num_samples + num_samples > self.limit:
            self.num_refused += 1
            raise ApiError(
                429,
                f"{self.num_samples} samples are under way or queued, of {self.limit}: try again later",
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    @contextmanager
    def entered(self, num_samples: int) -> Iterator[None]:
        """Hold places for the samples of a request. Raises ApiError where `check` does."""
        self.check(num_samples)
        self.num_samples += num_samples
        try:
            yield
        finally:
            self.num_samples -= num_samples


class Keys:
    """API keys, compared in constant time; without any, everyone may ask."""

    def __init__(self, keys: Sequence[str]) -> None:
        if not all(key.strip() for key in keys):
            raise ValueError("an API key is empty: give at least one character, or no key")
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def owner(self, authorization: str | None, api_key: str | None) -> str | None:
        """Return who asks, by either header, or None without any keys. Raises ApiError (401) for a wrong one."""
        if not self._digests:
            return None
        scheme, _, token = (authorization or "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else api_key or ""
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        # Every key is compared, so that the time tells nothing about which one came close.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise ApiError(
                401,
                "missing or wrong API key: send it as 'Authorization: Bearer KEY'",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return f"key-{matches.index(True)}"
