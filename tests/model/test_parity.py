"""The model gives the numbers of an independent implementation: transformers' Glm4MoeForCausalLM, fp32."""

import pytest
import torch
import torch.nn.functional as F

GRID = [
    {},
    {"use_qk_norm": False},
    {"attention_bias": False},
    {"use_qk_norm": False, "attention_bias": False, "routed_scaling_factor": 1.0},
    {"head_dim": 8, "num_attention_heads": 10},  # heads times head_dim is not the hidden size
    {"num_key_value_heads": 1, "head_dim": 32},
    {"first_k_dense_replace": 0},
    {"first_k_dense_replace": 3},
    {"n_shared_experts": 2},
    {"n_group": 2, "topk_group": 1},
    {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "n_shared_experts": 2},
    {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    {"partial_rotary_factor": 1.0},
]


def largest_relative_difference(ours, theirs):
    """Largest difference, relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()


def next_token_loss(logits, tokens):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("changes", GRID, ids=str)
def test_logits_and_every_gradient_equal_the_peers(changes, make_model, peer_of, peer_tensors):
    model = make_model(num_nextn_predict_layers=0, **changes)
    peer = peer_of(model)
    tokens = torch.randint(0, 96, (3, 21), generator=torch.Generator().manual_seed(5))
    ours, theirs = model(tokens).logits_BTV, peer(tokens, use_cache=False).logits
    assert largest_relative_difference(ours, theirs) < 1e-5
    next_token_loss(ours, tokens).backward()
    next_token_loss(theirs, tokens).backward()
    expected = peer_tensors(peer, model, of=lambda tensor: tensor.grad)
    for name, parameter in model.named_parameters():
        assert largest_relative_difference(parameter.grad, expected[name]) < 1e-5, name


def test_packed_documents_equal_the_peers_packed_documents(make_model, peer_of):
    model = make_model(num_nextn_predict_layers=0)
    peer = peer_of(model)
    tokens = torch.randint(0, 96, (1, 24), generator=torch.Generator().manual_seed(6))
    lengths = [5, 1, 11, 7]
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ours = model(tokens, document_ids=documents).logits_BTV
    theirs = peer(tokens, position_ids=positions, use_cache=False).logits
    assert largest_relative_difference(ours, theirs) < 1e-5


def test_packed_documents_equal_each_document_alone_mtp_included(make_model):
    model = make_model()
    tokens = torch.randint(0, 96, (1, 24), generator=torch.Generator().manual_seed(7))
    lengths = [5, 1, 11, 7]
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    packed = model(tokens, document_ids=documents, mtp=True)
    start = 0
    for length in lengths:
        alone = model(tokens[:, start : start + length], mtp=True)
        here = slice(start, start + length)
        torch.testing.assert_close(packed.logits_BTV[:, here], alone.logits_BTV, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed.mtp_logits_BTV[:, here], alone.mtp_logits_BTV, rtol=1e-5, atol=1e-5)
        start += length


def test_mtp_drafts_equal_the_peers_mtp_layer(make_model, peer_of, tmp_path):
    """transformers' own MTP module, loaded from our checkpoint, drafts the same logits from the same hidden states."""
    from transformers.modeling_layers import MtpModel

    model = make_model()
    peer = peer_of(model, "with-mtp")
    peer._keys_to_ignore_on_load_unexpected = [r"model\.layers\.4.*"]
    peer.config.name_or_path = str(tmp_path / "with-mtp")
    drafter = MtpModel.from_pretrained(peer)
    tokens = torch.randint(0, 96, (1, 12), generator=torch.Generator().manual_seed(8))
    hidden = model(tokens[:, :-1], output="hidden").hidden_BTD
    positions = torch.arange(11)[None]
    ours, _ = model.draft(tokens[:, 1:], hidden, positions, None)
    _, theirs, _ = drafter(
        input_ids=tokens[:, 1:],
        last_hidden_states=hidden,
        attention_mask=torch.ones(1, 11),
        position_ids=positions + 1,
        mtp_cache=None,
    )
    assert largest_relative_difference(ours[:, -1:], theirs) < 1e-5


def test_training_mtp_logits_equal_drafting_ones(make_model):
    """What training optimises is what drafting uses: position i of the MTP pass sees token i + 1."""
    model = make_model()
    tokens = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(9))
    trained = model(tokens, mtp=True)
    drafted, _ = model.draft(tokens[:, 1:], trained.hidden_BTD[:, :-1], torch.arange(8)[None], None)
    torch.testing.assert_close(trained.mtp_logits_BTV[:, :-1], drafted, rtol=1e-5, atol=1e-5)
