"""The update: against a naive loop over unpacked samples, and the same however rows, ranks and minibatches are cut."""

import copy
from types import SimpleNamespace

import pytest
import torch

from glm45.rl.advantages import group_advantages
from glm45.rl.batch import policy_rows
from glm45.rl.config import LossConfig
from glm45.rl.health import HealthConfig, alarms
from glm45.rl.update import PolicyTrainer
from glm45.training.optimizers import set_learning_rate


def gradient_of(trainer, groups, gradients, max_tokens=16):
    """The gradient that `update` applies, caught before the optimiser's step."""
    caught = {}
    original = trainer.optimizers[0].step
    trainer.optimizers[0].step = lambda: caught.update(gradients(trainer.model))
    record = trainer.update(groups, max_tokens)
    trainer.optimizers[0].step = original
    return caught, record


def naive_loss(model, groups, config):
    """GRPO with ratio 1 by the textbook: whole logits, one sample at a time, no packing, no chunks."""
    samples = [sample for group in groups for sample in group]
    total = sum(sample.num_generated for sample in samples)
    loss = 0.0
    for group in groups:
        rewards = torch.tensor([sample.reward for sample in group])
        advantages = group_advantages(rewards, torch.zeros(len(group)), config.divide_by_std)
        for sample, advantage in zip(group, advantages, strict=True):
            logits = model(torch.tensor([sample.tokens])).logits_BTV[0, :-1] / sample.metadata["temperature"]
            logprobs = torch.log_softmax(logits, -1).gather(-1, torch.tensor(sample.tokens)[1:, None])[:, 0]
            learnt = torch.tensor(sample.loss_mask)[1:]
            ratio = (logprobs - logprobs.detach()).exp()
            correction = (logprobs.detach() - torch.tensor(sample.rollout_logprobs)[1:]).exp().clamp(max=2.0)
            weight = 1 / total if config.default_aggregation == "token" else 1 / (len(samples) * sample.num_generated)
            loss = loss - weight * (ratio * correction * advantage)[learnt].sum()
    return loss


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_the_update_is_the_textbook_gradient(make_model, world, groups, gradients, aggregation):
    config = LossConfig(default_aggregation=aggregation, micro_batch_tokens=24, clip_norm=1e9)
    model = make_model()
    caught, record = gradient_of(PolicyTrainer(model, config, world), groups, gradients)
    reference = make_model()
    loss = naive_loss(reference, groups, config)
    loss.backward()
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    for name, gradient in gradients(reference).items():
        if not name.startswith("mtp."):
            torch.testing.assert_close(caught[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("changes", [{}, {"ratio": "sequence"}, {"truncated": "mask"}, {"mtp_weight": 0.1}])
def test_packing_changes_nothing(make_model, world, groups, gradients, changes):
    """Rows of one sample, of a few, and of all of them, in another order."""
    results = []
    for tokens, order in ((2, 1), (24, -1), (4096, 1)):
        config = LossConfig(micro_batch_tokens=tokens, clip_norm=1e9, **changes)
        shuffled = [group[::order] for group in groups[::order]]
        results.append(gradient_of(PolicyTrainer(make_model(), config, world), shuffled, gradients))
    for caught, record in results[1:]:
        for name, gradient in results[0][0].items():
            torch.testing.assert_close(caught[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
        assert record == pytest.approx(results[0][1], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("changes", [{}, {"ratio": "sequence"}, {"num_minibatches": 2}, {"routing_replay": True}])
def test_sharing_prompts_changes_nothing(make_model, world, groups, gradients, changes):
    """Samples of one prompt beside each other in a row, in rows of two, and each with a prompt of its own."""
    for group in groups:
        for sample in group:
            sample.tokens[:5] = group[0].tokens[:5]
    results, sizes = [], []
    for tokens, share in ((4096, False), (4096, True), (24, True)):
        config = LossConfig(micro_batch_tokens=tokens, clip_norm=1e9, share_prompts=share, **changes)
        rows = policy_rows([sample for group in groups for sample in group], config, 16)
        sizes.append(sum(row.tokens_1T.numel() for row in rows))
        results.append(gradient_of(PolicyTrainer(make_model(), config, world), groups, gradients))
    assert sizes[1] < sizes[2] < sizes[0]
    for caught, record in results[1:]:
        for name, gradient in results[0][0].items():
            torch.testing.assert_close(caught[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
        assert record == pytest.approx(results[0][1], rel=1e-4, abs=1e-5)


def test_what_one_answer_holds_does_not_reach_another(make_model, groups):
    """Every token of another answer to the same prompt may change: this one's log-probabilities stay bit-equal."""
    first, second, *_ = groups[0]
    second.tokens[:5] = first.tokens[:5]
    first.reward, second.reward = 1.0, 0.0
    hidden = []
    for shift in (0, 7):
        second.tokens[5:] = [(token + shift) % 300 for token in second.tokens[5:]]
        [row] = policy_rows([first, second], LossConfig(), 16)
        assert row.branch_ids_1T is not None
        ids = {"document_ids": row.document_ids_1T, "branch_ids": row.branch_ids_1T}
        output = make_model()(row.tokens_1T, positions=row.positions_1T, **ids).hidden_BTD[0]
        hidden.append(output[row.predicted_at_N[row.sample_ids_N == 0]])
    assert torch.equal(hidden[0], hidden[1])


def test_two_ranks_add_up_to_one(make_model, world, groups, gradients):
    """Each rank takes every second row; the sum of their gradients is that of one rank. (gloo: test_ranks.py.)"""
    config = LossConfig(micro_batch_tokens=24, clip_norm=1e9)
    whole, _ = gradient_of(PolicyTrainer(make_model(), config, world), groups, gradients)
    parts = []
    for rank in range(2):
        trainer = PolicyTrainer(make_model(), config, world)
        trainer.world = SimpleNamespace(data_rank=rank, num_data_ranks=2)
        object.__setattr__(
            trainer,
            "_apply",
            lambda sums, largest: {**sums, **dict.fromkeys(("max_mismatch", "grad_norm", "skipped_updates"), 0.0)},
        )
        trainer.update(groups, 16)
        parts.append(gradients(trainer.model))
    for name, gradient in whole.items():
        total = sum(part[name] for part in parts if name in part)
        torch.testing.assert_close(total, gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_the_first_step_has_ratio_one_and_no_kl(make_model, world, groups):
    for changes in ({}, {"num_minibatches": 4}, {"routing_replay": True}):
        trainer = PolicyTrainer(make_model(), LossConfig(lr=1e-12, **changes), world)
        record = trainer.update(groups, 16)
        assert record["ratio"] == pytest.approx(1.0, abs=1e-6)
        assert record["kl"] == pytest.approx(0.0, abs=1e-9)
        assert record["clipped_low"] == record["clipped_high"] == 0.0


def test_later_minibatches_see_a_moved_policy(make_model, world, groups):
    record = PolicyTrainer(make_model(), LossConfig(lr=1e-2, num_minibatches=4), world).update(groups, 16)
    assert record["kl"] > 1e-4


def test_the_mismatch_is_measured_against_the_rollout(make_model, world, groups):
    """Rollout log-probabilities copied from the training forward leave no mismatch."""
    trainer = PolicyTrainer(make_model(), LossConfig(lr=1e-12), world)
    assert trainer.update(groups, 16)["mismatch"] > 0.1
    for group in groups:
        for sample in group:
            with torch.no_grad():
                logits = trainer.model(torch.tensor([sample.tokens])).logits_BTV[0, :-1]
            scaled = torch.log_softmax(logits / sample.metadata["temperature"], -1)
            exact = scaled.gather(-1, torch.tensor(sample.tokens)[1:, None])[:, 0].tolist()
            sample.rollout_logprobs = [0.0, *exact]
    assert trainer.update(groups, 16)["max_mismatch"] < 1e-4


def test_router_bias_and_frozen_mtp_do_not_move(make_model, world, groups):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    PolicyTrainer(model, LossConfig(lr=1e-2), world).update(groups, 16)
    after = model.state_dict()
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    for name in before:
        if name.startswith("mtp.") or "e_score_correction_bias" in name:
            assert torch.equal(before[name], after[name]), name


def test_the_mtp_layer_learns_when_asked_and_needs_to_be_there(make_model, world, groups):
    model = make_model()
    before = model.state_dict()["mtp.eh_proj.weight"].clone()
    record = PolicyTrainer(model, LossConfig(mtp_weight=0.1), world).update(groups, 16)
    assert record["mtp_loss"] > 0
    assert not torch.equal(before, model.state_dict()["mtp.eh_proj.weight"])
    with pytest.raises(ValueError, match="has no MTP layer"):
        PolicyTrainer(make_model(num_nextn_predict_layers=0), LossConfig(mtp_weight=0.1), world)


def test_truncated_samples_are_treated_as_named(groups):
    """`mask` keeps them in the mean but not in the loss; `zero` takes their reward; `drop` removes them."""
    for number, sample in enumerate(sample for group in groups for sample in group):
        sample.reward = float(number**2)  # no advantage is 0
    learnt = {}
    for policy in ("keep", "mask", "zero", "drop"):
        rows = policy_rows([sample for group in groups for sample in group], LossConfig(truncated=policy), 16)
        learnt[policy] = sum(len(torch.unique(row.sample_ids_N)) for row in rows)
    assert learnt == {"keep": 14, "zero": 14, "mask": 10, "drop": 10}


def test_routing_replay_repeats_the_old_choices(make_model, world, groups):
    """After the router has changed, replayed rows still go to the experts of the first pass."""
    trainer = PolicyTrainer(make_model(), LossConfig(routing_replay=True), world)
    row = policy_rows([sample for group in groups for sample in group], trainer.config, 16)[0]
    before = trainer._forward(row)
    with torch.no_grad():
        for layer in trainer.model.moe_layers():
            layer.gate.weight.neg_()
    free, replayed = trainer._forward(row), trainer._forward(row, before.expert_ids)
    assert not torch.equal(free.expert_ids[0], before.expert_ids[0])
    assert torch.equal(replayed.expert_ids[0], before.expert_ids[0])


def test_an_empty_or_flat_batch_changes_nothing(make_model, world, groups):
    trainer = PolicyTrainer(make_model(), LossConfig(), world)
    set_learning_rate(trainer.optimizers, 1.0, trainer.optimizer_config)
    before = copy.deepcopy(trainer.model.state_dict())
    assert trainer.update([], 16) == {"learnt_tokens": 0.0}
    for sample in groups[0]:
        sample.reward = 1.0
    assert trainer.update(groups[:1], 16) == {"learnt_tokens": 0.0}
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_a_gradient_that_is_not_finite_is_not_applied(make_model, world, groups):
    trainer = PolicyTrainer(make_model(), LossConfig(num_minibatches=2), world)
    before = copy.deepcopy(trainer.model.state_dict())
    for sample in groups[0]:
        sample.rollout_logprobs[-1] = float("nan")
    record = trainer.update(groups, 16)
    assert record["skipped_updates"] == 1.0
    assert all(torch.isfinite(each).all() for each in trainer.model.state_dict().values())
    assert any(not torch.equal(each, before[name]) for name, each in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert any("not finite" in alarm for alarm in alarms([record], HealthConfig()))
