"""Routing, loss-free balance and router health."""

import pytest
import torch

from glm45.model.moe import RouterHealth, count_loads, sequence_balance_loss, update_bias


def train_router(rate, steps=200, num_experts=8, num_tokens=512, skew=2.0):
    """Route random tokens with a planted preference for the first experts, updating the bias; return last MaxVio."""
    generator = torch.Generator().manual_seed(0)
    bias = torch.zeros(num_experts)
    preference = torch.linspace(skew, -skew, num_experts)
    for _ in range(steps):
        logits = torch.randn(num_tokens, num_experts, generator=generator) + preference
        chosen = (logits.sigmoid() + bias).topk(2).indices
        load = torch.bincount(chosen.flatten(), minlength=num_experts).float()
        update_bias(bias, load, rate)
    return RouterHealth.of(load[None])


def test_a_planted_imbalance_is_recovered_by_the_bias_update_and_not_without_it():
    balanced, left_alone = train_router(rate=0.01), train_router(rate=0.0)
    assert balanced.max_violation_L.item() < 0.3
    assert left_alone.max_violation_L.item() > 1.0
    assert balanced.busiest_share_L.item() < 0.4 < left_alone.busiest_share_L.item()
    assert balanced.entropy_L.item() > 0.98 > left_alone.entropy_L.item()


def test_a_models_planted_imbalance_is_recovered(make_model):
    """The same through the model: the bias of every layer answers the loads that the forward pass returned."""

    def max_violation(rate):
        model = make_model()
        model.moe_layers()[0].gate.e_score_correction_bias[0] = 1.5  # the planted fault: everything goes to expert 0
        tokens = torch.randint(0, 96, (8, 24), generator=torch.Generator().manual_seed(1))
        for _ in range(120):
            loads = model(tokens, output="hidden", mtp=True).router.loads_LE
            model.update_router_bias(loads, rate)
        return RouterHealth.of(loads).max_violation_L

    with torch.no_grad():
        assert max_violation(0.02)[0] < 0.5
        assert max_violation(0.0)[0] > 2.5


def test_the_bias_update_is_the_rule_of_the_report():
    bias = torch.tensor([0.0, 0.5, -0.5, 0.1])
    update_bias(bias, torch.tensor([4.0, 0.0, 2.0, 2.0]), 0.25)
    torch.testing.assert_close(bias, torch.tensor([-0.25, 0.75, -0.5, 0.1]))


def test_the_bias_moves_the_selection_and_not_the_weights(make_model):
    router = make_model().moe_layers()[0].gate
    x = torch.randn(5, 48)
    router.e_score_correction_bias.zero_()
    scores, _, _ = router(x)
    router.e_score_correction_bias[3] = 10.0
    _, chosen, weights = router(x)
    assert (chosen == 3).any(-1).all()
    expected = scores.gather(1, chosen)
    torch.testing.assert_close(weights, 2.5 * expected / expected.sum(-1, keepdim=True))


def test_loads_are_counted_once_under_activation_checkpointing(make_model):
    model = make_model().train()
    tokens = torch.randint(0, 96, (2, 10), generator=torch.Generator().manual_seed(2))
    plain = model(tokens, mtp=True)
    recomputed = model(tokens, mtp=True, checkpoint=True)
    loss = recomputed.logits_BTV.square().mean() + recomputed.mtp_logits_BTV.square().mean()
    loss.backward()
    assert torch.equal(plain.router.loads_LE, recomputed.router.loads_LE)
    assert recomputed.router.loads_LE.sum(-1).tolist() == [2 * 10 * 2] * 4


def test_checkpointing_changes_no_gradient(make_model):
    gradients = []
    for checkpoint in (False, True):
        model = make_model().train()
        output = model(torch.arange(12)[None], mtp=True, checkpoint=checkpoint)
        (output.logits_BTV.square().mean() + output.router.balance_loss).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_routing_is_not_changed_by_a_forward_pass(make_model):
    model = make_model().train()
    before = [layer.gate.e_score_correction_bias.clone() for layer in model.moe_layers()]
    model(torch.arange(12)[None], mtp=True).logits_BTV.sum().backward()
    after = [layer.gate.e_score_correction_bias for layer in model.moe_layers()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_padding_is_not_counted():
    chosen = torch.tensor([[0, 1], [0, 2], [3, 1], [3, 2]])  # two sequences of two tokens
    valid = torch.tensor([[True, False], [True, True]])
    expected = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 2]])
    assert torch.equal(count_loads(chosen, valid, 4), expected)


def test_the_balance_loss_equals_its_formula():
    """DeepSeek-V3 eq. 17-20 by hand, for sequences of different lengths."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(2 * 5, 4, generator=generator, requires_grad=True)
    chosen = scores.topk(2).indices
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, 3:] = False
    loss = sequence_balance_loss(scores, count_loads(chosen, valid, 4), valid)
    expected = 0.0
    for row, length in ((0, 5), (1, 3)):
        s = scores.view(2, 5, 4)[row, :length]
        picked = chosen.view(2, 5, 2)[row, :length]
        for i in range(4):
            f = 4 / (2 * length) * (picked == i).any(-1).sum()
            expected = expected + f * (s / s.sum(-1, keepdim=True))[:, i].mean() / 2
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert scores.grad.view(2, 5, 4)[1, 3:].abs().max() == 0


def test_perfect_balance_gives_a_balance_loss_of_one():
    scores = torch.full((8, 4), 0.5)
    chosen = torch.tensor([[0, 1], [2, 3]] * 4)
    valid = torch.ones(2, 4, dtype=torch.bool)
    assert sequence_balance_loss(scores, count_loads(chosen, valid, 4), valid).item() == pytest.approx(1.0)


def test_the_balance_loss_is_zero_in_evaluation(make_model):
    assert make_model().eval()(torch.arange(9)[None]).router.balance_loss.item() == 0


def test_replayed_routing_gives_the_same_output(make_model):
    model = make_model().eval()
    tokens = torch.arange(12)[None]
    first = model(tokens, mtp=True)
    for layer in model.moe_layers():
        layer.gate.e_score_correction_bias += torch.randn(8)
    replayed = model(tokens, mtp=True, expert_ids=first.router.expert_ids)
    assert torch.equal(first.mtp_logits_BTV, replayed.mtp_logits_BTV)
    assert not torch.equal(first.logits_BTV, model(tokens).logits_BTV)


def test_health_of_a_collapsed_router():
    health = RouterHealth.of(torch.tensor([[100.0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]))
    assert health.max_violation_L.item() == pytest.approx(9)
    assert health.busiest_share_L.item() == 1
    assert health.entropy_L.item() == 0
    assert health.dead_experts_L.item() == 9


def test_the_models_balance_loss_is_the_sum_over_its_layers(make_model):
    """As Megatron and DeepSeek-V3 add it: once a layer, with the same weight."""
    model = make_model().train()
    seen = []
    for layer in model.moe_layers():
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output[1].balance_loss))
    total = model(torch.arange(9)[None], mtp=True).router.balance_loss
    assert len(seen) == 4
    torch.testing.assert_close(total, sum(seen))
