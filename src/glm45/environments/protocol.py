"""Tasks, verifiers, environments and rewards: the words that every kind of reinforcement learning here shares.

Everything speaks OpenAI-style messages; tokens belong to the rollout. A verifier that breaks is not an answer that is
wrong: a score is a `Reward` or a `Failure`, and a failure drops its sample and is counted.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

Message = dict[str, Any]
"""An OpenAI-style message; what a model wrote may carry `faults`, the parser's list of what was malformed."""

BOXED = re.compile(r"<\|begin_of_box\|>(.*?)<\|end_of_box\|>", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One prompt with what is needed to judge the answer to it; JSON-ready, since it crosses processes."""

    task_id: str
    """Unique within a task set; the same prompt always has the same id."""
    verifier: str
    """A name of `catalogue.VERIFIERS`, or `module:attribute` for one's own."""
    messages: list[Message]
    answer: Any
    """The reference that the verifier compares with; None where metadata says it all."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """OpenAI-style tool schemas that the prompt shows."""
    thinking: bool = True
    """Whether the prompt asks for reasoning; False renders `/nothink`."""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reward:
    """A judged answer: the number that is learnt from and the parts it was made of."""

    value: float
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failure:
    """An answer that could not be judged; never a reward of zero.

    `kind` is "timeout", "memory", "crash" (the process died), "error" (the verifier raised) or "refused" (what the
    verifier needs, such as a sandbox, is not there).
    """

    kind: str
    detail: str


Outcome = Reward | Failure


class Verifier(Protocol):
    """Scores one assistant message. It runs in a process of its own and may raise: the outcome is then a Failure."""

    def score(self, task: Task, response: Message) -> Reward:
        """Judge `response`; 1.0 is a right answer and 0.0 a wrong one."""
        ...

    def examples(self) -> Iterator[tuple[Task, Message, Message]]:
        """Yield tasks with a response that must score 1 and a corrupted one that must score 0."""
        ...


class Environment(Protocol):
    """A conversation with a world. Most are one question and one answer: `SingleTurn`."""

    def reset(self, task: Task) -> list[Message]:
        """Start over with a task and return the opening messages."""
        ...

    async def step(self, message: Message) -> tuple[list[Message], bool]:
        """Take the assistant's message; return the messages that answer it and whether the episode is over."""
        ...

    def score(self) -> Reward:
        """Judge the finished episode."""
        ...

    def close(self) -> None:
        """Release whatever the episode held."""
        ...


class SingleTurn:
    """An environment of one question and one answer, judged by a verifier."""

    def __init__(self, verifier: Verifier):
        self._verifier = verifier
        self._task: Task | None = None
        self._response: Message | None = None

    def reset(self, task: Task) -> list[Message]:
        """Return the task's messages."""
        self._task, self._response = task, None
        return task.messages

    async def step(self, message: Message) -> tuple[list[Message], bool]:
        """Keep the answer; the episode is over."""
        self._response = message
        return [], True

    def score(self) -> Reward:
        """Judge the answer. Raises ValueError before there is one."""
        if self._task is None or self._response is None:
            raise ValueError("score() before the answer: call reset(task) and step(message) first")
        return self._verifier.score(self._task, self._response)

    def close(self) -> None:
        """Forget the episode."""
        self._task = self._response = None


def prove(verifier: Verifier, name: str) -> None:
    """Check that a verifier gives every gold example 1 and every corrupted one 0; raise ValueError if not.

    A verifier that rejects its own reference would silently teach the opposite (issue 7: "every verifier proves
    itself on load").
    """
    num_examples = 0
    for task, gold, corrupted in verifier.examples():
        num_examples += 1
        for response, expected, word in ((gold, 1.0, "gold"), (corrupted, 0.0, "corrupted")):
            value = verifier.score(task, response).value
            if value != expected:
                raise ValueError(
                    f"verifier {name!r} gave its {word} answer to task {task.task_id!r} {value} instead of "
                    f"{expected}: {response.get('content')!r}; mend the verifier or its examples"
                )
    if num_examples == 0:
        raise ValueError(f"verifier {name!r} has no examples: yield at least one (task, gold, corrupted)")


def assistant(content: str, reasoning: str = "", **more: Any) -> Message:
    """Return an assistant message."""
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, **more}


def user(content: str) -> Message:
    """Return a user message."""
    return {"role": "user", "content": content}


def final_answer(response: Message) -> str:
    """Return what a response gives as its answer: the last boxed part of its content, or else all of the content.

    Reasoning is never looked at: an answer that was only thought was not given.
    """
    content = response.get("content") or ""
    boxed = BOXED.findall(content)
    return (boxed[-1] if boxed else content).strip()
