"""Synthetic reasoning: verified question, reasoning and answer, from procedures and from a teacher model."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from datatrove.data import Document

from glm45.corpus.arithmetic import generate_documents

PROMPT = "Think step by step, then give the final answer alone on the last line after 'Answer:'.\n\n"
TIMEOUT_SECONDS = 120.0
_OF_HUNDRED = re.compile(r"(?<=\d)\s*(?:/|out of)\s*100\b")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")


def arithmetic_documents(source: str, seed: int, count: int) -> Iterator[Document]:
    """Yield worked arithmetic whose answers are right by recomputation; the question decides what is held out.

    Raises ValueError for a worked answer that is wrong: the generator is at fault, not the data.
    """
    seen = set()
    for index, item in enumerate(generate_documents(seed, count)):
        metadata = item["metadata"]
        left, right = metadata["left"], metadata["right"]
        truth = {"add": left + right, "subtract": left - right, "multiply": left * right}[metadata["operation"]]
        if item["text"].split()[-1] != str(truth):
            raise ValueError(
                f"worked arithmetic ends in {item['text'].split()[-1]}, true answer {truth}: {item['text']}"
            )
        if item["prompt"] not in seen:
            seen.add(item["prompt"])
            kept = {
                "kind": "reasoning",
                "language": "en",
                "license": "generated",
                "package": "arithmetic",
                "version": "",
            }
            details = {"source": source, "prompt": item["prompt"], "answer": item["answer"], "path": str(index)}
            details["question"] = metadata["question"]
            yield Document(item["text"], f"{source}/arithmetic/{index}", metadata=kept | details)


def teach(
    tasks: list[dict[str, str]],
    verify: Callable[[str, str], bool],
    *,
    url: str,
    model: str,
    samples: int = 4,
    client: httpx.Client | None = None,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Ask an OpenAI-style teacher for worked answers and keep those that `verify(answer, reference)` accepts.

    Each task has `prompt` and `answer`. Returns one record of a `jsonl` source for every task of which a sample was
    right, the shortest, and counts of what came of the samples. Raises OSError if the teacher is not reachable.
    """
    counts = {"accepted": 0, "wrong": 0, "no answer": 0}
    records = []
    client = client or httpx.Client(timeout=TIMEOUT_SECONDS)
    for task in tasks:
        accepted = []
        for reply in _ask(client, url, model, PROMPT + task["prompt"], samples):
            reasoning, marker, answer = reply.rpartition("Answer:")
            outcome = "no answer" if not marker else "accepted" if verify(answer.strip(), task["answer"]) else "wrong"
            counts[outcome] += 1
            if outcome == "accepted":
                accepted.append(f"{task['prompt']}\n\n{reasoning.strip()}\n\nAnswer: {answer.strip()}\n")
        if accepted:
            worked = {"text": min(accepted, key=len), "prompt": task["prompt"], "answer": task["answer"]}
            records.append(worked | {"kind": "reasoning"})
    return records, counts


class UnreadableScoreError(ValueError):
    """A judge's reply that does not hold one number from 0 to 100, such as a refusal."""


def ask_score(text: str, question: str, *, url: str, model: str, client: httpx.Client | None = None) -> float:
    """Return a score between 0 and 1 of a text, as an OpenAI-style endpoint judges it.

    Raises UnreadableScoreError for a reply without one number, OSError if the endpoint is not reachable.
    """
    client = client or httpx.Client(timeout=TIMEOUT_SECONDS)
    prompt = f"{question} Reply with a number from 0 to 100 only.\n\n{text[:4000]}"
    return read_score(next(iter(_ask(client, url, model, prompt, 1)), ""))


def read_score(reply: str) -> float:
    """Return the only number of a reply as a share of 100: of "80", "80 %", "80/100" and "I'd say 80." it is 0.8."""
    numbers = _NUMBER.findall(_OF_HUNDRED.sub("", reply))
    if len(numbers) != 1 or not 0 <= float(numbers[0]) <= 100:
        raise UnreadableScoreError(f"the reply {reply[:80]!r} is not one number from 0 to 100, which was asked for")
    return float(numbers[0]) / 100


def _ask(client: httpx.Client, url: str, model: str, prompt: str, samples: int) -> list[str]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "n": samples,
        "temperature": 0.8 if samples > 1 else 0.0,
    }
    try:
        response = client.post(f"{url.rstrip('/')}/chat/completions", json=body)
        response.raise_for_status()
        return [choice["message"]["content"] or "" for choice in response.json()["choices"]]
    except httpx.HTTPError as error:
        raise OSError(f"{url}: {error}") from None
    except (ValueError, KeyError, TypeError):
        raise OSError(f"{url} did not answer as an OpenAI-style endpoint: {response.text[:80]!r}") from None
