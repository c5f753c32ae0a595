"""Losses and advantages against TRL (golden fixtures), hand-written formulas, and every way of cutting the batch."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glm45.rl.advantages import group_advantages, informative
from glm45.rl.losses import policy_loss, token_weights

GOLDEN = json.loads(Path(__file__).with_name("trl_golden.json").read_text())
OPTIONS = {
    "grpo": ("sequence", {}),
    "dapo": ("token", {}),
    "dapo, clip-higher": ("token", {"clip_high": 0.28}),
    "dr_grpo": ("constant", {}),
    "grpo, clip-higher": ("sequence", {"clip_low": 0.1, "clip_high": 0.3}),
    "gspo": ("sequence", {"clip_low": 0.05, "clip_high": 0.1}),
    "dapo, truncated importance": ("token", {"mismatch_cap": 1.5}),
}


@pytest.fixture
def tensors():
    return {name: torch.tensor(values) for name, values in GOLDEN["tensors"].items()}


def flat_arguments(tensors: dict, name: str, rows: list[int]) -> tuple[list, dict]:
    """The learnt tokens of some samples, flat, with weights made for all of them."""
    aggregation, options = OPTIONS[name]
    mask = tensors["mask"]
    weights = token_weights(
        mask.sum(1), ["code"] * len(mask), {"code": aggregation}, max_tokens=GOLDEN["max_tokens"]
    ).float()
    keep = mask[rows]
    spread = lambda values: values[rows][:, None].expand(keep.shape)[keep]  # noqa: E731
    arguments = [tensors[key][rows][keep] for key in ("logprobs", "old_logprobs")]
    arguments += [spread(tensors["advantages"]), spread(weights)]
    if "importance" in name:
        options = {**options, "rollout_logprobs_N": tensors["rollout_logprobs"][rows][keep]}
    if name == "gspo":
        options = {**options, "sample_ids_N": spread(torch.arange(len(mask)))}
    return arguments, options


@pytest.mark.parametrize("name", OPTIONS)
def test_losses_and_gradients_equal_trl(tensors, name):
    tensors["logprobs"].requires_grad_()
    arguments, options = flat_arguments(tensors, name, list(range(8)))
    loss = policy_loss(*arguments, **options).loss
    loss.backward()
    assert loss.item() == pytest.approx(GOLDEN["cases"][name]["loss"], rel=1e-5)
    torch.testing.assert_close(
        tensors["logprobs"].grad, torch.tensor(GOLDEN["cases"][name]["gradient"]), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sizes", [[1] * 8, [3, 5], [2, 2, 4]])
def test_micro_batches_and_ranks_in_any_order_add_up(tensors, name, sizes):
    """The parts may be micro-batches of one rank or the batches of several: only the sum over them counts."""
    order = random.Random(1).sample(range(8), 8)
    tensors["logprobs"].requires_grad_()
    whole, options = flat_arguments(tensors, name, list(range(8)))
    full_loss = policy_loss(*whole, **options)
    (expected,) = torch.autograd.grad(full_loss.loss, tensors["logprobs"])
    total, clipped = 0.0, 0.0
    for size in sizes:
        rows, order = order[:size], order[size:]
        arguments, options = flat_arguments(tensors, name, rows)
        part = policy_loss(*arguments, **options)
        part.loss.backward()
        total, clipped = total + part.loss.item(), clipped + part.sums["clipped_high"]
    torch.testing.assert_close(tensors["logprobs"].grad, expected, rtol=1e-6, atol=1e-8)
    assert total == pytest.approx(full_loss.loss.item(), rel=1e-5)
    assert clipped == full_loss.sums["clipped_high"]


def test_advantages_equal_trl():
    rewards, groups = torch.tensor(GOLDEN["rewards"]), torch.tensor(GOLDEN["group_ids"])
    for divide, key in ((True, "advantages_std"), (False, "advantages_mean")):
        ours = group_advantages(rewards, groups, divide_by_std=divide)
        torch.testing.assert_close(ours.float(), torch.tensor(GOLDEN[key]), rtol=1e-5, atol=1e-6)


def test_uneven_interleaved_groups_are_told_by_id():
    rewards = torch.tensor([1.0, 5.0, 0.0, 7.0, 1.0, 3.0])
    groups = torch.tensor([9, 4, 9, 4, 9, 1])
    advantages = group_advantages(rewards, groups, divide_by_std=False)
    torch.testing.assert_close(advantages, torch.tensor([1 / 3, -1, -2 / 3, 1, 1 / 3, 0], dtype=torch.float64))
    scaled = group_advantages(rewards, groups, divide_by_std=True)
    assert scaled[1].item() == pytest.approx(-1 / (2**0.5 + 1e-4))
    assert scaled[5] == 0


def test_groups_without_spread_are_not_informative():
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.0, 1.0, 0.3])
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    assert informative(rewards, groups).tolist() == [False, False, False, True, True, False]


def test_the_first_step_has_ratio_one_no_kl_and_the_policy_gradient():
    """With old = new, the gradient is that of -sum(weight * advantage * logprob), written by hand."""
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantages, weights = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.2, 0.3, 0.5])
    result = policy_loss(logprobs, logprobs.detach(), advantages, weights)
    result.loss.backward()
    torch.testing.assert_close(logprobs.grad, -advantages * weights)
    assert result.sums["kl"] == 0.0
    assert result.sums["ratio"] == 3.0
    assert result.sums["clipped_low"] == result.sums["clipped_high"] == 0.0


@pytest.mark.parametrize(
    "ratio,advantage,gradient",
    [(1.5, 1.0, 0.0), (1.5, -1.0, 1.5), (0.5, 1.0, -0.5), (0.5, -1.0, 0.0), (1.25, 1.0, -1.25), (1.25, -1.0, 1.25)],
)
def test_the_clipped_gradient_by_hand(ratio, advantage, gradient):
    """d/dlogp of -min(r A, clip(r, 0.8, 1.28) A) is -r A inside the trust region and 0 where the clip holds."""
    logprob = torch.tensor([0.0], requires_grad=True)
    old = -torch.tensor([ratio]).log()
    policy_loss(logprob, old, torch.tensor([advantage]), torch.ones(1), clip_high=0.28).loss.backward()
    assert logprob.grad.item() == pytest.approx(gradient)


def test_aggregations_by_hand_and_per_domain():
    lengths = torch.tensor([1, 3, 4, 2])
    assert token_weights(lengths, ["a"] * 4, {"a": "token"}).tolist() == [0.1] * 4
    assert token_weights(lengths, ["a"] * 4, {"a": "sequence"}).tolist() == pytest.approx(
        [1 / 4, 1 / 12, 1 / 16, 1 / 8]
    )
    assert token_weights(lengths, ["a"] * 4, {}, "constant", max_tokens=5).tolist() == [0.05] * 4
    mixed = token_weights(lengths, ["code", "science", "code", "science"], {"code": "token", "science": "sequence"})
    assert mixed.tolist() == pytest.approx([0.5 / 5, 1 / 12, 0.5 / 5, 1 / 8])
    assert (mixed * lengths).sum().item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="choose from token, sequence, constant"):
        token_weights(lengths, ["a"] * 4, {"a": "mean"})
    with pytest.raises(ValueError, match="max_tokens"):
        token_weights(lengths, ["a"] * 4, {"a": "constant"})


def test_losses_and_advantages_need_nothing_but_torch():
    program = (
        "import sys, glm45.rl.losses, glm45.rl.advantages\n"
        "print([m for m in sys.modules if m.startswith('glm45.') and m not in "
        "('glm45.rl', 'glm45.rl.losses', 'glm45.rl.advantages')])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result
