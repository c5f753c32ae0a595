"""A task in tokens: the prompt that a policy reads and the message that it wrote, alike in training and evaluation."""

from collections.abc import Sequence

from glm45.environments.protocol import Message, Task
from glm45.text.chat import render_tokens
from glm45.text.parsing import parse_ids
from glm45.text.tokenizer import Tokenizer


def prompt_ids(task: Task, tokenizer: Tokenizer) -> list[int]:
    """Return the prompt of a task, in its mode, up to where the assistant begins."""
    return render_tokens(
        task.messages,
        tokenizer,
        tools=task.tools or None,
        enable_thinking=None if task.thinking else False,
        add_generation_prompt=True,
    ).ids


def read_answer(token_ids: Sequence[int], task: Task, tokenizer: Tokenizer) -> Message:
    """Return what sampled tokens say; `faults` lists what was malformed, if that leaves doubt about what was meant."""
    message, status = parse_ids(token_ids, tokenizer, task.tools or None)
    if not status.well_formed:
        message["faults"] = [str(problem) for problem in status.problems]
    return message
