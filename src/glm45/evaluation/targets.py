"""What is evaluated: a model in this process, or any OpenAI-compatible endpoint (`glm45.evaluation.endpoint`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from glm45.config import configuration
from glm45.environments.protocol import Message, Task
from glm45.files import fingerprint


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
    """An assistant message; `faults`, where there are any, lists what was malformed."""
    finish_reason: str
    """`stop`, `tool_calls`, `length` or `error`."""
    num_tokens: int
    """Completion tokens, where the target tells; else 0."""


class PromptTooLongError(ValueError):
    """A prompt leaves no room for an answer in the target's context; the message has the numbers."""


class Target(Protocol):
    """Something that answers, and says how likely a text is."""

    @property
    def name(self) -> str:
        """What answers are kept under: it changes with the weights as far as the target knows them."""
        ...

    async def answer(self, task: Task, sampling: Sampling, seed: int) -> Answer:
        """Answer a task's messages once. Raises PromptTooLongError where they do not fit the context."""
        ...

    async def loglikelihoods(self, context: str, continuations: Sequence[str]) -> list[float]:
        """Return the log-probability of each continuation after `context`, in nats, summed over its tokens.

        The token that crosses the boundary, where there is one, belongs to the continuation. Raises ValueError where
        the target cannot tell, PromptTooLongError as `answer`.
        """
        ...

    def close(self) -> None:
        """Release what the target holds."""
        ...


class LocalTarget:
    """A model in this process, through the engine."""

    def __init__(self, engine: Any, tokenizer: Any, folder: Path) -> None:
        self.name = f"{folder} {fingerprint(folder)[:16]}"
        self.folder = folder
        self._engine, self._tokenizer = engine, tokenizer

    @classmethod
    def load(cls, path: Path) -> "LocalTarget":
        """Open a hub checkpoint with its tokenizer. Raises FileNotFoundError or ValueError, naming the file."""
        from glm45.engine.engine import Engine
        from glm45.model import hub
        from glm45.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(path)
        return cls(Engine(hub.load(path, device=hub.best_device()).eval(), tokenizer), tokenizer, path)

    async def answer(self, task: Task, sampling: Sampling, seed: int) -> Answer:
        """See `Target.answer`."""
        from glm45.engine.request import SamplingParams
        from glm45.environments.tokens import prompt_ids, read_answer

        prompt = prompt_ids(task, self._tokenizer)
        room = self._room_after(len(prompt))
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=min(sampling.max_tokens, room),
            seed=seed,
        )
        (completion,) = await self._engine.generate_async(prompt, params)
        message = read_answer(completion.token_ids, task, self._tokenizer)
        return Answer(message, completion.finish_reason, len(completion.token_ids))

    async def loglikelihoods(self, context: str, continuations: Sequence[str]) -> list[float]:
        """See `Target.loglikelihoods`."""
        from glm45.engine.request import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=True)
        context_ids = self._tokenizer.encode(context)
        found = []
        for continuation in continuations:
            ids = self._tokenizer.encode(context + continuation)
            self._room_after(len(ids))
            (completion,) = await self._engine.generate_async(ids, params)
            found.append(sum(completion.prompt_logprobs[num_shared(context_ids, ids) :]))
        return found

    @property
    def max_length(self) -> int:
        """Tokens of the context, prompt and answer together."""
        return self._engine.max_length

    def characters_in(self, num_tokens: int, sample: str) -> int:
        """Return about how many characters of a text like `sample` so many tokens hold."""
        return num_tokens * len(sample) // len(self._tokenizer.encode(sample))

    def _room_after(self, num_tokens: int) -> int:
        if num_tokens >= self.max_length:
            raise PromptTooLongError(f"the prompt has {num_tokens} tokens and the context {self.max_length}")
        return self.max_length - num_tokens

    def close(self) -> None:
        """End the engine."""
        self._engine.close()


def num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many ids at the start are the same, at least 1: the first token has no log-probability.

    Raises ValueError for an empty context, after which nothing has one.
    """
    if not first:
        raise ValueError("the context is empty: the likelihood of a first token is not defined")
    same = (index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return max(1, next(same, min(len(first), len(second))))
