"""lm-eval driving a `glm45` server: `python -m glm45.evaluation.lm_eval_adapter run --model glm45 --tasks NAME`.

lm-eval's own `local-completions` asks for the most likely alternatives to every token of a prompt, which the server
does not list, and for a tokenizer of its own; this one takes the server's tokens as they are. Needs `glm45[eval]`.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from glm45.evaluation.endpoint import HttpTarget

Result = TypeVar("Result")


@register_model("glm45")
class Glm45Server(LM):
    """A server with `/v1/completions`, as lm-eval's harness wants it.

    `likelihood of a whole document` (rolling) is not offered: `glm45 eval --data` measures perplexity.
    """

    def __init__(self, url: str, model: str | None = None, max_tokens: int = 256, **_: Any) -> None:
        """Take `--model_args url=...,model=...,max_tokens=...`; lm-eval adds its own batch size and device."""
        super().__init__()
        self._target = HttpTarget(url, model)
        self._max_tokens = max_tokens

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return, for every (context, continuation), its log-probability and whether greedy decoding writes it."""
        return _all(self._likelihood, (request.args for request in requests))

    async def _likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        (value,) = await self._target.loglikelihoods(context, [continuation])
        # Every token holds at least one byte, so that many tokens are enough.
        greedy = await self._target.complete(context, max_tokens=len(continuation.encode()), stop=[])
        return value, greedy.startswith(continuation)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows every context up to the first of its stop strings."""
        return _all(self._until, (request.args for request in requests))

    async def _until(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        return await self._target.complete(
            context,
            max_tokens=int(settings.get("max_gen_toks") or self._max_tokens),
            stop=[until] if isinstance(until, str) else list(until),
            temperature=float(settings.get("temperature") or 0) if settings.get("do_sample") else 0.0,
        )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refuse. Raises NotImplementedError."""
        raise NotImplementedError("perplexity of whole documents: use glm45 eval MODEL --data DIR")


def _all(ask: Callable[..., Awaitable[Result]], arguments: Iterable[tuple[Any, ...]]) -> list[Result]:
    async def gather() -> list[Result]:
        return await asyncio.gather(*(ask(*each) for each in arguments))

    return asyncio.run(gather())


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    sys.exit(cli_evaluate())
