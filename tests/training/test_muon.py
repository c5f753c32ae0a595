"""Muon against torch.optim.Muon on matrices, and against a loop over matrices on everything fused."""

import pytest
import torch

from glm45.training.muon import Muon, orthogonalize

SETTINGS = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}


def run(optimizer, parameters, gradients):
    for step_gradients in gradients:
        for parameter, gradient in zip(parameters, step_gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


def torch_muon(weights, gradients):
    """Train copies of the matrices with PyTorch's own Muon and return them."""
    parameters = [torch.nn.Parameter(weight.clone().contiguous()) for weight in weights]
    run(torch.optim.Muon(parameters, adjust_lr_fn="match_rms_adamw", **SETTINGS), parameters, gradients)
    return parameters


def assert_same_step(ours, theirs, start):
    """Their iteration rounds to bf16 and ours does not on a CPU: the steps taken agree to 1 %."""
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.01 * moved


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (40, 40), (16, 256)])
def test_equals_torch_muon_on_matrices(shape):
    torch.manual_seed(0)
    start = [torch.randn(shape) for _ in range(3)]
    gradients = [[torch.randn(shape) for _ in start] for _ in range(4)]
    ours = [torch.nn.Parameter(weight.clone()) for weight in start]
    run(Muon(ours, **SETTINGS), ours, gradients)
    for mine, theirs, weight in zip(ours, torch_muon(start, gradients), start, strict=True):
        assert_same_step(mine, theirs, weight)


def test_an_expert_stack_equals_a_loop_over_its_matrices():
    """Experts, and gate and up within them, are orthogonalised one by one."""
    torch.manual_seed(0)
    start = torch.randn(4, 2, 24, 16)
    gradients = [torch.randn_like(start) for _ in range(3)]
    ours = torch.nn.Parameter(start.clone())
    run(Muon([ours], **SETTINGS), [ours], [[gradient] for gradient in gradients])
    matrices = torch_muon(list(start.flatten(0, 1)), [list(gradient.flatten(0, 1)) for gradient in gradients])
    for mine, theirs, weight in zip(ours.flatten(0, 1), matrices, start.flatten(0, 1), strict=True):
        assert_same_step(mine, theirs, weight)


def test_fused_queries_keys_and_values_equal_three_separate_projections():
    torch.manual_seed(0)
    kv_heads, queries, size, hidden = 2, 3, 8, 32
    start = torch.randn(kv_heads, queries + 2, size, hidden)
    gradients = [torch.randn_like(start) for _ in range(3)]

    def separate(fused):
        parts = (fused[:, :queries], fused[:, queries], fused[:, queries + 1])
        return [part.reshape(-1, hidden) for part in parts]

    ours = torch.nn.Parameter(start.clone())
    run(Muon([{"params": [ours], "layout": "qkv"}], **SETTINGS), [ours], [[gradient] for gradient in gradients])
    projections = torch_muon(separate(start), [separate(gradient) for gradient in gradients])
    for mine, theirs, weight in zip(separate(ours.detach()), projections, separate(start), strict=True):
        assert_same_step(mine, theirs, weight)


def test_update_has_the_root_mean_square_of_the_report():
    """0.2, whatever the gradient's scale, for a matrix of full rank (report section 2.4)."""
    torch.manual_seed(0)
    for scale in (1e-3, 1e3):
        parameter = torch.nn.Parameter(torch.zeros(64, 128))
        run(Muon([parameter], lr=1.0), [parameter], [[scale * torch.randn(64, 128)]])
        assert parameter.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.15)


def test_singular_values_come_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(5, 32, 64)))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_wide_matrices_by_their_gram_matrix_equal_the_plain_iteration():
    torch.manual_seed(0)
    wide = torch.randn(3, 16, 256, dtype=torch.float64)
    x = wide / torch.linalg.matrix_norm(wide, keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    torch.testing.assert_close(orthogonalize(wide), x)


def test_a_zero_gradient_only_decays():
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    run(Muon([parameter], lr=0.1, weight_decay=0.5), [parameter], [[torch.zeros(4, 4)]])
    assert torch.equal(parameter, torch.full((4, 4), 1 - 0.1 * 0.5))


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\) is none"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
