"""Reasoning first, then the answer: two requests to the engine that read as one sample.

Needed where reasoning is bounded by a budget, and where a grammar holds for the answer but not for the reasoning
before it. The first request starts inside `<think>` and ends at `</think>`; the second goes on from there, with the
prefix cache making its prompt cheap.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from glm45.engine.request import Delta
from glm45.engine.sampling import sample_seed
from glm45.seeds import derive_seed
from glm45.serving.plan import Plan
from glm45.text.special_tokens import THINK_END
from glm45.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Inserted:
    """A token that the model did not sample, put into its output: `</think>` where the budget is spent."""

    index: int
    token_id: int


async def think_then_answer(
    engine: Any, tokenizer: Tokenizer, plan: Plan, index: int, request_id: str, owner: str
) -> AsyncGenerator[Delta | Inserted, None]:
    """Yield the deltas of sample `index`; reasoning that reaches its budget is closed and the answer begins."""
    end = tokenizer.special_id(THINK_END)
    params, seed = plan.params, plan.params.seed
    if seed is not None:
        seed = sample_seed(seed, index)
    thinking = replace(
        params,
        n=1,
        seed=seed,
        max_tokens=min(plan.think_first, params.max_tokens),
        min_tokens=0,
        stop=(),
        stop_token_ids=(end,),
        constraint=None,
        detokenize=params.wants_text,
    )
    thoughts: list[int] = []
    stream = engine.stream(plan.prompt_ids, thinking, request_id=f"{request_id}-{index}-thoughts", owner=owner)
    async with aclosing(stream) as deltas:
        async for delta in deltas:
            delta.index = index
            thoughts += delta.token_ids
            if delta.finish_reason == "abort":
                yield delta
                return
            if delta.finish_reason is not None and len(thoughts) >= params.max_tokens:
                yield replace(delta, finish_reason="length", stop_reason=None)
                return
            if delta.finish_reason is not None and thoughts[-1] in tokenizer.eos_token_ids:
                thoughts.pop()
                delta = _without_last_token(delta, tokenizer)
            yield replace(delta, finish_reason=None, stop_reason=None)
    num_sampled = len(thoughts)
    if thoughts[-1:] != [end]:
        thoughts.append(end)
        yield Inserted(index, end)
    answering = replace(
        params,
        n=1,
        seed=None if seed is None else derive_seed(seed, "answer"),
        max_tokens=params.max_tokens - num_sampled,
        min_tokens=0,
    )
    stream = engine.stream(
        plan.prompt_ids + thoughts, answering, request_id=f"{request_id}-{index}-answer", owner=owner
    )
    async with aclosing(stream) as deltas:
        async for delta in deltas:
            yield replace(delta, index=index)


def _without_last_token(delta: Delta, tokenizer: Tokenizer) -> Delta:
    """Drop a token that would end the turn inside reasoning: the answer is still to come."""
    return replace(
        delta,
        token_ids=delta.token_ids[:-1],
        logprobs=delta.logprobs[:-1],
        weight_versions=delta.weight_versions[:-1],
        top_logprobs=delta.top_logprobs[:-1],
        text=None if delta.text is None else delta.text.removesuffix(tokenizer.decode(delta.token_ids[-1:])),
    )
