"""The loss mask, token by token: what the assistant wrote and the role token that ends its turn, nothing else."""

import pytest

from glm45.text.chat import render_tokens

USER = {"role": "user", "content": "2+2?"}
THINKS = {"role": "assistant", "content": "4", "reasoning_content": "two and two"}
DIRECT = {"role": "assistant", "content": "4"}
CALLS = {
    "role": "assistant",
    "content": "Look.",
    "reasoning_content": "both",
    "tool_calls": [
        {"id": "a", "function": {"name": "now", "arguments": "{}"}},
        {"id": "b", "function": {"name": "f", "arguments": {"k": "v"}}},
    ],
}
RESULTS = [{"role": "tool", "tool_call_id": "a", "content": "1"}, {"role": "tool", "tool_call_id": "b", "content": "2"}]

CALLS_TEXT = (
    "\n<think>both</think>\nLook.\n<tool_call>now\n</tool_call>\n<tool_call>f\n"
    "<arg_key>k</arg_key>\n<arg_value>v</arg_value>\n</tool_call>"
)
RESULTS_TEXT = "\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|assistant|>"
PROMPT = "[gMASK]<sop><|user|>\n2+2?<|assistant|>"

# Conversation, options, and the text in alternating runs: not produced, produced, not produced ...
MASKS = {
    "prompt alone": ([USER], {"add_generation_prompt": True}, [PROMPT]),
    "thinking": ([USER, THINKS], {"end_turn": True}, [PROMPT, "\n<think>two and two</think>\n4<|user|>"]),
    "direct, by choice": ([USER, DIRECT], {"end_turn": True}, [PROMPT, "\n<think></think>\n4<|user|>"]),
    "direct, as asked": (
        [USER, DIRECT],
        {"end_turn": True, "enable_thinking": False},
        ["[gMASK]<sop><|user|>\n2+2?/nothink<|assistant|>\n<think></think>", "\n4<|user|>"],
    ),
    "truncated": ([USER, THINKS], {}, [PROMPT, "\n<think>two and two</think>\n4"]),
    "parallel calls": ([USER, CALLS], {"end_turn": True}, [PROMPT, CALLS_TEXT + "<|observation|>"]),
    "tools and an answer": (
        [USER, CALLS, *RESULTS, THINKS],
        {"end_turn": True},
        [PROMPT, CALLS_TEXT + "<|observation|>", RESULTS_TEXT, "\n<think>two and two</think>\n4<|user|>"],
    ),
    "reasoning of an earlier turn is blanked, and its empty tags are not learnt": (
        [USER, THINKS, USER, DIRECT],
        {},
        [PROMPT + "\n<think></think>", "\n4<|user|>", "\n2+2?<|assistant|>", "\n<think></think>\n4"],
    ),
    "reasoning of an earlier turn is kept": (
        [USER, THINKS, USER, DIRECT],
        {"clear_thinking": False},
        [PROMPT, "\n<think>two and two</think>\n4<|user|>", "\n2+2?<|assistant|>", "\n<think></think>\n4"],
    ),
    "thinking by turn": (
        [{**USER, "enable_thinking": False}, DIRECT, USER, THINKS],
        {},
        [
            "[gMASK]<sop><|user|>\n2+2?/nothink<|assistant|>\n<think></think>",
            "\n4<|user|>",
            "\n2+2?<|assistant|>",
            "\n<think>two and two</think>\n4",
        ],
    ),
    "a system message ends the turn": (
        [USER, DIRECT, {"role": "system", "content": "S"}],
        {},
        [PROMPT, "\n<think></think>\n4<|system|>", "\nS"],
    ),
    "4.7, thinking": (
        [USER, CALLS, *RESULTS],
        {"dialect": "glm-4.7"},
        [
            "[gMASK]<sop><|user|>2+2?<|assistant|><think>",
            "both</think>Look.<tool_call>now</tool_call><tool_call>f<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>"
            "<|observation|>",
            "<tool_response>1</tool_response><tool_response>2</tool_response>",
        ],
    ),
    "4.7, direct": (
        [USER, DIRECT],
        {"dialect": "glm-4.7", "enable_thinking": False},
        ["[gMASK]<sop><|user|>2+2?<|assistant|></think>", "4"],
    ),
}


def runs(tokenizer, rendered):
    """The text of a rendering cut wherever the mask changes, the first run not produced."""
    texts, last = [""], False
    for index, produced in zip(rendered.ids, rendered.loss_mask, strict=True):
        if produced != last:
            texts.append("")
            last = produced
        texts[-1] += tokenizer.decode([index])
    return texts


@pytest.mark.parametrize("name", MASKS)
def test_mask(name, tokenizer):
    messages, options, wanted = MASKS[name]
    assert runs(tokenizer, render_tokens(messages, tokenizer, **options)) == wanted


def test_what_is_produced_is_what_follows_the_generation_prompt(tokenizer):
    """The prompt that an engine would be given is exactly what the mask leaves out before the last turn."""
    for dialect in ("glm-4.5", "glm-4.7"):
        for thinking, message in ((None, THINKS), (None, CALLS), (False, DIRECT)):
            options = {"dialect": dialect, "enable_thinking": thinking}
            prompt = render_tokens([USER], tokenizer, add_generation_prompt=True, **options).ids
            whole = render_tokens([USER, message], tokenizer, end_turn=True, **options)
            assert whole.ids[: len(prompt)] == prompt
            assert whole.loss_mask == [False] * len(prompt) + [True] * (len(whole.ids) - len(prompt))


def test_a_turn_that_is_not_the_assistants_cannot_be_ended(tokenizer):
    with pytest.raises(ValueError, match="does not end in an assistant turn"):
        render_tokens([USER], tokenizer, end_turn=True)
