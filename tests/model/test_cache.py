"""Decoding with a cache gives the numbers of the full forward pass."""

import pytest
import torch

from glm45.model.cache import KVCache


@pytest.mark.parametrize("chunk", [1, 7, 20])
@pytest.mark.parametrize("changes", [{}, {"use_qk_norm": False, "num_key_value_heads": 1}], ids=str)
def test_cached_forward_equals_the_full_one_at_all_positions(make_model, chunk, changes):
    model = make_model(**changes).eval()
    tokens = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    full = model(tokens)
    cache = KVCache(model.config, batch_size=2, max_length=20)
    logits, hidden = [], []
    for start in range(0, 20, chunk):
        part = tokens[:, start : start + chunk]
        positions = torch.arange(start, start + part.shape[1])[None]
        output = model(part, positions=positions, cache=cache)
        logits.append(output.logits_BTV)
        hidden.append(output.hidden_BTD)
    torch.testing.assert_close(torch.cat(logits, 1), full.logits_BTV, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(hidden, 1), full.hidden_BTD, rtol=1e-5, atol=1e-5)


def test_drafting_with_its_own_cache_equals_drafting_over_everything(make_model):
    model = make_model().eval()
    tokens = torch.randint(0, 96, (1, 13), generator=torch.Generator().manual_seed(2))
    hidden = model(tokens[:, :-1]).hidden_BTD
    full, _ = model.draft(tokens[:, 1:], hidden, torch.arange(12)[None], None)
    cache = KVCache(model.config, batch_size=1, max_length=12)
    for start, end in ((0, 5), (5, 6), (6, 12)):
        positions = torch.arange(start, end)[None]
        part, _ = model.draft(tokens[:, start + 1 : end + 1], hidden[:, start:end], positions, cache)
        torch.testing.assert_close(part, full[:, start:end], rtol=1e-5, atol=1e-5)


def test_truncation_forgets_rejected_tokens(make_model):
    model = make_model().eval()
    tokens = torch.randint(0, 96, (1, 9), generator=torch.Generator().manual_seed(3))
    cache = KVCache(model.config, batch_size=1, max_length=12)
    model(tokens[:, :6], positions=torch.arange(6)[None], cache=cache)
    model(torch.zeros(1, 3, dtype=torch.long), positions=torch.arange(6, 9)[None], cache=cache)
    cache.truncate(6)
    again = model(tokens[:, 6:], positions=torch.arange(6, 9)[None], cache=cache).logits_BTV
    torch.testing.assert_close(again, model(tokens).logits_BTV[:, 6:], rtol=1e-5, atol=1e-5)


def test_a_full_cache_says_so(make_model):
    model = make_model().eval()
    cache = KVCache(model.config, batch_size=1, max_length=3)
    with pytest.raises(ValueError, match="cache of 3 tokens is full"):
        model(torch.zeros(1, 4, dtype=torch.long), positions=torch.arange(4)[None], cache=cache)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens_BT": torch.zeros(3, dtype=torch.long)}, "must be"),
        ({"tokens_BT": torch.zeros(1, 0, dtype=torch.long)}, "not empty"),
        ({"cache": "any"}, "give positions"),
        ({"cache": "any", "positions": torch.zeros(1, 2), "document_ids": torch.zeros(1, 2)}, "exclude each other"),
        ({"cache": "any", "positions": torch.zeros(1, 2), "mtp": True}, "draft"),
    ],
)
def test_contradicting_arguments_are_refused(make_model, arguments, message):
    arguments = {"tokens_BT": torch.zeros(1, 2, dtype=torch.long), **arguments}
    with pytest.raises(ValueError, match=message):
        make_model()(**arguments)


def test_asking_a_model_without_mtp_for_it_is_refused(make_model):
    model = make_model(num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="no MTP layer"):
        model(torch.zeros(1, 2, dtype=torch.long), mtp=True)
    with pytest.raises(ValueError, match="cannot draft"):
        model.draft(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, 48), torch.zeros(1, 1), None)
