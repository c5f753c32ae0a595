"""What is evaluated: a model in this process, or any OpenAI-compatible endpoint."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from glm45.config import configuration
from glm45.environments.protocol import Message, Task


@configuration
class Sampling:
    """How answers are drawn. The report's settings are `suites.REPORT_SAMPLING`."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus; 1 keeps everything."""
    max_tokens: int = 128
    """Most tokens of one answer, reasoning included."""
    seed: int = 0
    """Root of the seeds of all samples."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as it came."""

    message: Message
    """An assistant message; `faults` lists what was malformed."""
    finish_reason: str
    """`stop`, `tool_calls`, `length` or `error`."""
    num_tokens: int
    """Completion tokens, where the target tells; else 0."""


class Target(Protocol):
    """Something that answers."""

    name: str

    async def answer(self, task: Task, sampling: Sampling, seed: int) -> Answer:
        """Answer a task's messages once."""
        ...

    def close(self) -> None:
        """Release what the target holds."""
        ...


class LocalTarget:
    """A model in this process, through the engine."""

    def __init__(self, engine: Any, tokenizer: Any, name: str) -> None:
        self.name = name
        self._engine, self._tokenizer = engine, tokenizer

    @classmethod
    def load(cls, path: Path) -> "LocalTarget":
        """Open a hub checkpoint with its tokenizer. Raises FileNotFoundError or ValueError, naming the file."""
        from glm45.engine.engine import Engine
        from glm45.model import hub
        from glm45.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(path)
        return cls(Engine(hub.load(path).eval(), tokenizer), tokenizer, str(path))

    async def answer(self, task: Task, sampling: Sampling, seed: int) -> Answer:
        """See `Target.answer`."""
        from glm45.engine.request import SamplingParams
        from glm45.text.chat import render_tokens
        from glm45.text.parsing import parse_ids

        prompt = render_tokens(
            task.messages,
            self._tokenizer,
            tools=task.tools or None,
            enable_thinking=None if task.thinking else False,
            add_generation_prompt=True,
        )
        room = self._engine.max_length - len(prompt.ids)
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=max(1, min(sampling.max_tokens, room)),
            seed=seed,
        )
        (completion,) = await self._engine.generate_async(prompt.ids, params)
        message, status = parse_ids(completion.token_ids, self._tokenizer, task.tools or None)
        faults = [str(problem) for problem in status.problems]
        return Answer({**message, "faults": faults}, completion.finish_reason, len(completion.token_ids))

    def close(self) -> None:
        """End the engine."""
        self._engine.close()


class HttpTarget:
    """An OpenAI-compatible chat endpoint."""

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None, concurrency: int = 16) -> None:
        """`url` ends in `/v1` or is the server's root. Raises ValueError if no model is named and none is served."""
        import httpx

        base = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.AsyncClient(
            base_url=base if base.endswith("/v1") else f"{base}/v1", headers=headers, timeout=600
        )
        self._slots = asyncio.Semaphore(concurrency)
        self._model = model
        self.name = f"{url} {model or ''}".strip()

    async def answer(self, task: Task, sampling: Sampling, seed: int) -> Answer:
        """See `Target.answer`. Raises ValueError for an answer that is not OpenAI's form and OSError without one."""
        import httpx

        body: dict[str, Any] = {
            "model": await self._model_name(),
            "messages": task.messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": seed % 2**31,
            "chat_template_kwargs": {"enable_thinking": task.thinking},
        }
        if task.tools:
            body["tools"] = task.tools
        async with self._slots:
            try:
                response = await self._client.post("/chat/completions", json=body)
            except httpx.HTTPError as error:
                raise OSError(f"{self.name} does not answer: {error!r}") from None
        if response.status_code != 200:
            raise OSError(f"{self.name} answered {response.status_code}: {response.text[:300]}")
        try:
            choice = response.json()["choices"][0]
            message = {key: value for key, value in choice["message"].items() if value is not None}
        except (ValueError, KeyError, IndexError, TypeError):
            raise ValueError(f"{self.name} did not answer in OpenAI's form: {response.text[:300]}") from None
        message.setdefault("content", "")
        tokens = (response.json().get("usage") or {}).get("completion_tokens", 0)
        return Answer({**message, "faults": []}, choice.get("finish_reason") or "stop", tokens)

    async def _model_name(self) -> str:
        if self._model is None:
            served = (await self._client.get("/models")).json().get("data") or []
            if not served:
                raise ValueError(f"{self.name} lists no model: name one with --model")
            self._model = served[0]["id"]
        return self._model

    def close(self) -> None:
        """Nothing to release: connections end with the event loop."""
