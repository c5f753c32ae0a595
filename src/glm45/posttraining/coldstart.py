"""Cold-start data for each expert: small sets of worked answers, made from rules, never of held-out prompts.

The report starts each expert from a small set with long chains of thought (section 3.1), written by earlier models;
at laptop scale rules write them. Nothing of these generators is in the report.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

from glm45.config import configuration
from glm45.corpus.arithmetic import ArithmeticConfig, draw_problem, write_trace
from glm45.environments.arithmetic import arithmetic_task
from glm45.environments.instructions import instruction_tasks, reference_reply
from glm45.environments.protocol import Message, Task, assistant
from glm45.environments.tasks import is_held_out_task
from glm45.environments.tools import tool_call, tool_tasks
from glm45.posttraining.conversations import Conversation, answered
from glm45.seeds import derive_seed


@configuration
class ColdStartConfig:
    """How good the cold start's answers are. Not in the report."""

    arithmetic: ArithmeticConfig = ArithmeticConfig(careful_share=0.4)
    """Problems, and the share of careful traces: the rest are sloppy, so that there is something to select."""
    sound_share: float = 0.7
    """Share of right tool calls and instructions kept; the others get a plausible fault. Not in the report."""
    requests_per_conversation: int = 1
    """Requests that a conversation with tools holds, with their results and a reply after each: more than one shares
    the tools' schemas, which are most of a short conversation's tokens. Not in the report."""

    @property
    def sound(self) -> "ColdStartConfig":
        """The same without faults: careful traces and right calls and replies only."""
        return replace(self, arithmetic=replace(self.arithmetic, careful_share=1.0), sound_share=1.0)


def cold_start(domain: str, seed: int, count: int, config: ColdStartConfig) -> Iterator[Conversation]:
    """Yield `count` worked conversations of a domain (a name of MAKERS); prompts may repeat.

    Raises ValueError for another domain.
    """
    if domain not in MAKERS:
        raise ValueError(f"no cold start for {domain!r}: there is one for {', '.join(MAKERS)}")
    made = MAKERS[domain](derive_seed(seed, "cold start", domain), config)
    for _ in range(count):
        yield next(made)


def _arithmetic(seed: int, config: ColdStartConfig) -> Iterator[Conversation]:
    source = random.Random(seed)
    while True:
        task = arithmetic_task(problem := draw_problem(source, config.arithmetic))
        if is_held_out_task(task):
            continue
        careful = source.random() < config.arithmetic.careful_share
        trace = write_trace(problem, careful, full=source.random() < config.arithmetic.full_share)
        yield answered(task, assistant(trace.answer, trace.steps), source="cold start", careful=careful)


def _direct_arithmetic(seed: int, config: ColdStartConfig) -> Iterator[Conversation]:
    """Right answers without steps: what the model must know by heart."""
    source = random.Random(seed)
    while True:
        task = arithmetic_task(problem := draw_problem(source, config.arithmetic), thinking=False)
        if not is_held_out_task(task):
            yield answered(task, assistant(problem.answer), source="cold start")


def _tools(seed: int, config: ColdStartConfig) -> Iterator[Conversation]:
    requests = _tool_requests(seed, config.sound_share)
    while True:
        drawn = list(islice(requests, config.requests_per_conversation))
        messages: list[Message] = []
        for task, response in drawn[:-1]:
            messages += [*task.messages, response]
            if calls := response.get("tool_calls"):
                messages += [{"role": "tool", "content": "ok"} for _ in calls]
                messages.append(assistant("Done."))
        task, response = drawn[-1]
        tools = {tool["function"]["name"]: tool for task, _ in drawn for tool in task.tools}
        last = replace(task, messages=[*messages, *task.messages], tools=list(tools.values()))
        yield answered(last, response, source="cold start")


def _tool_requests(seed: int, sound_share: float) -> Iterator[tuple[Task, Message]]:
    """Yield requests with the right calls, or with a plausible fault in them."""
    for number, task in enumerate(_endless(tool_tasks, seed)):
        source = random.Random(derive_seed(seed, "fault", number))
        calls = [(call["name"], dict(call["arguments"])) for call in task.answer]
        if calls and source.random() >= sound_share:
            calls = _spoil(calls, source)
        content = "" if calls else "You are welcome."
        yield task, assistant(content, tool_calls=[tool_call(*call) for call in calls])


def _instructions(seed: int, config: ColdStartConfig) -> Iterator[Conversation]:
    for number, task in enumerate(_endless(instruction_tasks, seed)):
        source = random.Random(derive_seed(seed, "fault", number))
        reply = reference_reply(task)
        if source.random() >= config.sound_share:
            words = reply.split()
            reply = " ".join(words[:-1] if len(words) > 1 else [*words, *words]).lower()
        yield answered(task, assistant(reply), source="cold start")


def _endless(family: Callable[[int, int], Iterator[Task]], seed: int) -> Iterator[Task]:
    """Yield training tasks of a family without end."""
    batch = 0
    while True:
        for task in family(derive_seed(seed, batch), 256):
            if not is_held_out_task(task):
                yield task
        batch += 1


def _spoil(calls: list[tuple[str, dict]], source: random.Random) -> list[tuple[str, dict]]:
    """Give calls one plausible fault: a missing call, or an argument that is off."""
    if len(calls) > 1:
        return calls[:1]
    name, arguments = calls[0]
    key = source.choice(sorted(arguments))
    value = arguments[key]
    return [(name, {**arguments, key: value + 1 if isinstance(value, int) else value[:-1]})]


MAKERS = {
    "arithmetic": _arithmetic,
    "arithmetic-direct": _direct_arithmetic,
    "tools": _tools,
    "instructions": _instructions,
}
