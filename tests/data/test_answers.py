"""The loss mask read off role tokens is the renderer's, but for what a prompt may end with."""

import numpy as np
import torch

from glm45.data.answers import AnswersOnly
from glm45.data.loader import Loader
from glm45.data.shards import MemoryDocuments
from glm45.text.chat import render_tokens
from glm45.text.tokenizer import Tokenizer

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
CHATS = [
    [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2", "reasoning_content": "one, two"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "You are welcome."},
    ],
]


def test_chats_are_learnt_from_what_the_assistant_says_and_texts_whole():
    tokenizer = Tokenizer.train(["hello one two three you are welcome be brief"] * 3, 300)
    rendered = [render_tokens(chat, tokenizer, tools=TOOLS, end_turn=True) for chat in CHATS]
    text = tokenizer.encode("no roles in here")
    documents = MemoryDocuments(
        [*(each.ids for each in rendered), text], [*([True] * len(each.ids) for each in rendered), [True] * len(text)]
    )
    loader = Loader({"sft.all": documents}, {"sft.all": 1.0}, 2048, "best_fit")
    batch = AnswersOnly(tokenizer)(loader.rows(0, 1))
    roles = {tokenizer.special_id(role) for role in ("<|system|>", "<|user|>", "<|observation|>", "<|assistant|>")}
    found = {}
    for number in range(3):
        inside = batch.document_ids_BT[0] == number
        ids, mask = batch.tokens_BT[0][inside].tolist(), batch.loss_mask_BT[0][inside].tolist()
        found[tuple(ids)] = mask
    assert found[tuple(text)] == [True] * len(text)
    for each in rendered:
        first_role = next(i for i, token in enumerate(each.ids) if token in roles)
        # The prefix before the first role is learnt here, which the renderer's mask leaves out.
        assert found[tuple(each.ids)][first_role + 1 :] == each.loss_mask[first_role + 1 :]


def test_padding_stays_out():
    tokenizer = Tokenizer.train(["hello"] * 3, 300)
    chat = render_tokens(CHATS[0], tokenizer, end_turn=True)
    documents = MemoryDocuments([chat.ids], [[True] * len(chat.ids)])
    batch = AnswersOnly(tokenizer)(Loader({"a.b": documents}, {"a.b": 1.0}, 256, "best_fit").rows(0, 1))
    padding = batch.document_ids_BT == -1
    assert padding.any()
    assert not torch.any(batch.loss_mask_BT & padding)
    assert np.count_nonzero(batch.loss_mask_BT) < len(chat.ids)
