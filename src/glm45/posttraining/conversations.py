"""Supervised fine-tuning data: OpenAI-style JSONL in, packed documents with a loss mask out.

A line is `{"messages": [...], "tools": [...], "thinking": true, "metadata": {...}}`; everything but `messages` may
be left out. The loss is on what the assistant produced, the role token that ends its turn included, and on nothing
else (`glm45.text.chat.render_tokens` decides).
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from glm45.config import configuration
from glm45.data.folder import DataFolder
from glm45.data.shards import MemoryDocuments
from glm45.environments.protocol import Message, Task
from glm45.seeds import derive_seed
from glm45.text.chat import render_tokens
from glm45.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One training example."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool = True
    """False renders the prompt with `/nothink`: the model answers directly."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Where it came from: `source`, `task_id`, `domain` and whatever else its maker knows."""


def answered(task: Task, response: Message, **metadata: Any) -> Conversation:
    """Return a task with an answer to it as a training example."""
    kept = {key: value for key, value in response.items() if key != "faults" and value}
    kept.setdefault("content", "")
    return Conversation(
        messages=[*task.messages, kept],
        tools=task.tools,
        thinking=task.thinking,
        metadata={"task_id": task.task_id, "domain": task.verifier, **metadata},
    )


def read_conversations(path: str | Path) -> Iterator[Conversation]:
    """Read JSONL. Raises ValueError with the line's number for what is not a conversation that ends in an answer."""
    with open(path, encoding="utf-8") as source:
        for number, line in enumerate(source, start=1):
            try:
                conversation = Conversation(**json.loads(line))
                last = conversation.messages[-1]["role"]
            except (TypeError, KeyError, IndexError, json.JSONDecodeError) as error:
                raise ValueError(f"{path}, line {number}: not a conversation: {error}") from None
            if last != "assistant":
                raise ValueError(f"{path}, line {number}: ends with a {last} message, so there is nothing to learn")
            yield conversation


def write_conversations(path: str | Path, conversations: Iterable[Conversation]) -> int:
    """Write JSONL and return the number of lines."""
    count = 0
    with open(path, "w", encoding="utf-8") as sink:
        for conversation in conversations:
            sink.write(json.dumps(asdict(conversation), ensure_ascii=False) + "\n")
            count += 1
    return count


@configuration
class ModeBalance:
    """How much of the data thinks before it answers. The report balances both and does not say how."""

    thinking_share: float = 0.5
    """Share of conversations that reason; the larger kind is cut down to it. Not in the report."""

    def __post_init__(self) -> None:
        if not 0 <= self.thinking_share <= 1:
            raise ValueError(f"thinking_share = {self.thinking_share}: a share lies between 0 and 1")


def balance_modes(conversations: Sequence[Conversation], balance: ModeBalance, seed: int) -> list[Conversation]:
    """Return the largest random part of `conversations` that has the wanted share of thinking ones, in their order.

    Raises ValueError where a kind that is asked for is missing.
    """
    kinds = {kind: [i for i, each in enumerate(conversations) if each.thinking is kind] for kind in (True, False)}
    shares = {True: balance.thinking_share, False: 1 - balance.thinking_share}
    for kind, share in shares.items():
        if share > 0 and not kinds[kind]:
            word = "thinking" if kind else "direct"
            raise ValueError(f"thinking_share = {balance.thinking_share}, but there are no {word} conversations")
    total = min(len(kinds[kind]) / share for kind, share in shares.items() if share > 0)
    source = random.Random(derive_seed(seed, "balance modes"))
    kept = {index for kind, share in shares.items() for index in source.sample(kinds[kind], round(total * share))}
    return [conversation for index, conversation in enumerate(conversations) if index in kept]


def encode(conversation: Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Return a conversation's token ids and which of them are learnt."""
    rendered = render_tokens(
        conversation.messages,
        tokenizer,
        tools=conversation.tools or None,
        enable_thinking=None if conversation.thinking else False,
        end_turn=True,
    )
    return rendered.ids, rendered.loss_mask


def sft_data(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, max_tokens: int, held_out_every: int = 20
) -> tuple[DataFolder, dict[str, int]]:
    """Return the datasets `sft.all` and `sft.heldout` (every so-many-th) for the training loop, and counts.

    Conversations longer than `max_tokens` are left out, since a cut answer teaches to stop early, and counted as
    `too_long`. Raises ValueError if nothing is left.
    """
    encoded = [(*encode(conversation, tokenizer), conversation.thinking) for conversation in conversations]
    kept = [each for each in encoded if len(each[0]) <= max_tokens]
    fitting = [(ids, mask) for ids, mask, _ in kept]
    sets = {
        "sft.all": [pair for index, pair in enumerate(fitting) if index % held_out_every],
        "sft.heldout": fitting[::held_out_every],
    }
    if not all(sets.values()):
        raise ValueError(
            f"{len(conversations)} conversations, {len(fitting)} of at most {max_tokens} tokens: too few to train on"
        )
    documents = {name: MemoryDocuments(*map(list, zip(*pairs, strict=True))) for name, pairs in sets.items()}
    counts = {
        "conversations": len(fitting),
        "too_long": len(encoded) - len(fitting),
        "tokens": sum(len(ids) for ids, _ in fitting),
        "learnt_tokens": sum(sum(mask) for _, mask in fitting),
        "thinking": sum(thinking for _, _, thinking in kept),
    }
    return DataFolder(documents), counts
