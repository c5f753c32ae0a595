"""SFT data: JSONL, the balance of modes, what is learnt, packing without cutting."""

import json

import pytest
import torch

from glm45.data.loader import Loader
from glm45.environments.protocol import assistant, user
from glm45.posttraining.conversations import (
    Conversation,
    ModeBalance,
    balance_modes,
    encode,
    read_conversations,
    sft_data,
    write_conversations,
)
from glm45.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["47+85=? 7+5=12 4+8+1=13 the weather in Rome is fine"] * 4, vocab_size=312)


def conversation(number: int, thinking: bool) -> Conversation:
    answer = assistant(str(number), f"{number}+0" if thinking else "")
    return Conversation(messages=[user(f"{number}+0=?"), answer], thinking=thinking)


def test_the_loss_is_on_the_assistant_and_the_token_that_ends_its_turn(tokenizer):
    for thinking, learnt in ((True, "\n<think>7+0</think>\n7<|user|>"), (False, "\n7<|user|>")):
        ids, mask = encode(conversation(7, thinking), tokenizer)
        produced = tokenizer.decode([token for token, is_learnt in zip(ids, mask, strict=True) if is_learnt])
        assert produced == learnt
        assert ("/nothink" in tokenizer.decode(ids)) is not thinking


def test_modes_are_balanced_by_cutting_the_larger_kind():
    many = [conversation(i, i % 4 == 0) for i in range(100)]
    half = balance_modes(many, ModeBalance(thinking_share=0.5), seed=1)
    assert [sum(each.thinking is kind for each in half) for kind in (True, False)] == [25, 25]
    quarter = balance_modes(many, ModeBalance(thinking_share=0.25), seed=1)
    assert len(quarter) == 100
    assert balance_modes(many, ModeBalance(thinking_share=0.5), seed=1) == half
    with pytest.raises(ValueError, match="no direct conversations"):
        balance_modes(many[:1], ModeBalance(), seed=1)


def test_json_lines_round_trip_and_bad_lines_are_named(tmp_path):
    path = tmp_path / "data.jsonl"
    conversations = [conversation(i, True) for i in range(3)]
    assert write_conversations(path, conversations) == 3
    assert list(read_conversations(path)) == conversations
    path.write_text(json.dumps({"messages": [user("?")]}) + "\n")
    with pytest.raises(ValueError, match="line 1: ends with a user message"):
        list(read_conversations(path))
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1: not a conversation"):
        list(read_conversations(path))


def test_packed_rows_hold_whole_conversations_and_their_masks(tokenizer):
    conversations = [conversation(i, i % 2 == 0) for i in range(60)]
    folder, counts = sft_data([*conversations, conversation(10**90, True)], tokenizer, max_tokens=64)
    assert counts["too_long"] == 1
    assert counts["conversations"] == 60
    assert counts["thinking"] == 30
    loader = Loader(folder, {"sft.all": 1.0}, 64, packing="best_fit")
    expected = {tuple(encode(each, tokenizer)[0]): encode(each, tokenizer)[1] for each in conversations}
    batch, seen = loader.batch(0, 8), 0
    for row in range(8):
        ids = batch.document_ids_BT[row]
        for document in range(int(ids.max()) + 1):
            tokens = tuple(batch.tokens_BT[row][ids == document].tolist())
            assert batch.loss_mask_BT[row][ids == document].tolist() == expected[tokens]
            seen += 1
    assert seen > 8
    assert not (batch.loss_mask_BT & (batch.document_ids_BT < 0)).any()
    assert torch.equal(loader.batch(0, 8).tokens_BT, batch.tokens_BT)
