"""Any OpenAI-compatible endpoint as a target: patient with busy servers, plain about what it cannot do."""

import asyncio
import email.utils
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from glm45.environments.protocol import Task
from glm45.evaluation.targets import Answer, PromptTooLongError, Sampling

if TYPE_CHECKING:
    import httpx

BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses worth another attempt."""
TOO_LONG = re.compile(r"context[_ ]length")
"""What OpenAI's, vLLM's, SGLang's and our own refusals of a long prompt have in common."""
LONGEST_WAIT_S = 120.0
"""Longest pause between two attempts; a server that asks for a longer one is given up."""


class HttpTarget:
    """An OpenAI-compatible endpoint, `/v1/chat/completions` and `/v1/completions`."""

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        *,
        concurrency: int = 16,
        attempts: int = 7,
        first_wait_s: float = 1.0,
        extensions: bool = True,
    ) -> None:
        """`url` ends in `/v1` or is the server's root; without `model` the first that is listed is asked.

        A busy or unreachable endpoint is asked `attempts` times, after the pause that its Retry-After names or else
        after `first_wait_s` seconds, twice as long each time. `extensions` sends `chat_template_kwargs`, which is how
        servers of this kind of model are told whether to think; others may refuse it.
        """
        base = url.rstrip("/")
        self._base = base if base.endswith("/v1") else f"{base}/v1"
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._concurrency, self._attempts, self._first_wait_s = concurrency, attempts, first_wait_s
        self._extensions = extensions
        self._url, self._model = url, model
        self._loop: asyncio.AbstractEventLoop | None = None
        self.num_retries = 0
        """Attempts that had to be repeated so far."""

    @property
    def name(self) -> str:
        """The address and the model's name there: an endpoint does not tell its weights."""
        return f"{self._url} {self._model or ''}".strip()

    async def answer(self, task: Task, sampling: Sampling, seed: int) -> Answer:
        """See `Target.answer`. Raises ValueError for an answer that is not OpenAI's form and OSError without one."""
        body: dict[str, Any] = {
            "model": await self.model_name(),
            "messages": task.messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": seed % 2**31,
        }
        if self._extensions:
            body["chat_template_kwargs"] = {"enable_thinking": task.thinking}
        if task.tools:
            body["tools"] = task.tools
        answered = await self._ask("/chat/completions", body)
        try:
            choice = answered["choices"][0]
            message = {key: value for key, value in choice["message"].items() if value is not None}
            tokens = (answered.get("usage") or {}).get("completion_tokens", 0)
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ValueError(f"{self.name} did not answer in OpenAI's form: {str(answered)[:300]}") from None
        message.setdefault("content", "")
        return Answer(message, choice.get("finish_reason") or "stop", tokens)

    async def loglikelihoods(self, context: str, continuations: Sequence[str]) -> list[float]:
        """See `Target.loglikelihoods`: the prompt is echoed with log-probabilities, in one request for each."""
        if not context:
            raise ValueError("the context is empty: the likelihood of a first token is not defined")
        bodies = [
            {"prompt": context + continuation, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 0}
            for continuation in continuations
        ]
        model = await self.model_name()
        answers = await asyncio.gather(*(self._ask("/completions", {"model": model, **body}) for body in bodies))
        return [
            self._sum_after(len(context), len(context + continuation), answered)
            for continuation, answered in zip(continuations, answers, strict=True)
        ]

    async def complete(self, prompt: str, *, max_tokens: int, stop: Sequence[str], temperature: float = 0.0) -> str:
        """Return the text that follows a prompt. Raises as `answer` does."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": temperature, "stop": list(stop) or None}
        answered = await self._ask("/completions", {"model": await self.model_name(), **body})
        try:
            return str(answered["choices"][0]["text"])
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{self.name} did not answer in OpenAI's form: {str(answered)[:300]}") from None

    def _sum_after(self, start: int, end: int, answered: Mapping[str, Any]) -> float:
        """Sum the log-probabilities of the tokens that hold characters `start` to `end` of the echoed prompt."""
        try:
            scored = answered["choices"][0]["logprobs"]
            tokens = zip(scored["tokens"], scored["text_offset"], scored["token_logprobs"], strict=True)
            inside = [value for token, at, value in tokens if at + len(token) > start and at < end]
            covered = scored["text_offset"][0] == 0 and scored["text_offset"][-1] >= end - 1
        except (KeyError, IndexError, TypeError, ValueError):
            covered, inside = False, []
        if not covered or not inside or None in inside:
            raise ValueError(
                f"{self.name} does not give the log-probabilities of a prompt (/v1/completions with echo and "
                "logprobs), so likelihoods cannot be had from it: evaluate the checkpoint itself, or ask a suite that "
                "generates"
            )
        return float(sum(inside))

    async def _ask(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """Return the JSON of a request (GET without a body), asking again where that can help."""
        client, slots = self._connection()
        async with slots:
            for attempt in range(1, self._attempts + 1):
                problem, wait = await self._attempt(client, path, body)
                if not isinstance(problem, str):
                    return problem
                if attempt == self._attempts or (wait is not None and wait > LONGEST_WAIT_S):
                    break
                self.num_retries += 1
                await asyncio.sleep(min(wait or self._first_wait_s * 2 ** (attempt - 1), LONGEST_WAIT_S))
        asked = f" and asked for a pause of {wait:.0f} s" if wait else ""
        raise OSError(f"{self.name} {problem}{asked}, after {attempt} attempts; answers so far are kept: run it again")

    async def _attempt(
        self, client: "httpx.AsyncClient", path: str, body: Mapping[str, Any] | None
    ) -> tuple[Any, float | None]:
        """Return an answer's JSON, or, as a string, why there is none for now, and the pause the server asks for.

        Raises OSError for a refusal that another attempt would meet, too, PromptTooLongError for one that is about the
        context, and ValueError for what is not JSON.
        """
        import httpx

        try:
            response = await (client.get(path) if body is None else client.post(path, json=body))
        except httpx.TransportError as error:
            return f"does not answer: {error!r}", None
        if response.status_code in BUSY:
            return f"answered {response.status_code}: {response.text[:300]}", retry_after(response.headers)
        if response.status_code == 400 and TOO_LONG.search(response.text):
            raise PromptTooLongError(response.text[:300])
        if response.status_code != 200:
            hint = ""
            if "chat_template_kwargs" in response.text:
                hint = " (it knows no chat_template_kwargs: leave them out with --no-extensions)"
            raise OSError(f"{self.name} refused {path}, {response.status_code}: {response.text[:300]}{hint}")
        try:
            answered = response.json()
        except ValueError:
            answered = None
        if not isinstance(answered, dict):
            raise ValueError(f"{self.name} did not answer in OpenAI's form: {response.text[:300]}")
        return answered, None

    def _connection(self) -> "tuple[httpx.AsyncClient, asyncio.Semaphore]":
        """Return the client of the running event loop: connections do not outlive theirs, and suites have one each."""
        import httpx

        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._client = httpx.AsyncClient(base_url=self._base, headers=self._headers, timeout=600)
            self._slots = asyncio.Semaphore(self._concurrency)
        return self._client, self._slots

    async def model_name(self) -> str:
        """Return the model that is asked, the first that is listed if none was given. Raises as `answer` does."""
        if self._model is None:
            served = (await self._ask("/models", None)).get("data") or []
            if not served:
                raise ValueError(f"{self.name} lists no model: name one with --served-name")
            self._model = served[0]["id"]
        return self._model

    def close(self) -> None:
        """Nothing to release: connections end with their event loop."""


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a Retry-After header asks to wait, given as a number or as a date; None without one."""
    value = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
