"""Every fast path against its plain reference in fp64: outputs and the gradient of every differentiable input."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from glm45.kernels import attention, experts, logprobs, norm, orthogonalize, rope, swiglu


@dataclass(frozen=True)
class Case:
    """One operator at one size: the fast path and the reference take the same tensors."""

    fast: Callable[..., object]
    reference: Callable[..., object]
    inputs: Callable[[], list[torch.Tensor]]
    """Tensors to differentiate, in fp64; those whose name the operator wants in fp32 are cast with the rest."""
    wide: tuple[int, ...] = ()
    """Positions of the inputs that stay in fp32 when the others are bf16."""


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _norm_cases() -> dict[str, Case]:
    def reference(x, delta, weight, dtype):
        total = x + delta.to(x.dtype)
        return total, norm._rms_norm_reference(total, weight, 1e-5, dtype)

    return {
        f"add_rms_norm-{rows}x{size}": Case(
            fast=lambda x, delta, weight: norm.add_rms_norm(x, delta, weight, 1e-5, delta.dtype),
            reference=lambda x, delta, weight: reference(x, delta, weight, delta.dtype),
            inputs=lambda rows=rows, size=size: [_normal(rows, size), _normal(rows, size), _normal(size)],
            wide=(0, 2),
        )
        for rows, size in ((1, 16), (7, 48), (300, 128))
    } | {
        "rms_norm": Case(
            fast=lambda x, weight: norm.rms_norm(x, weight, 1e-5),
            reference=lambda x, weight: norm._rms_norm_reference(x, weight, 1e-5, x.dtype),
            inputs=lambda: [_normal(2, 5, 32), _normal(32)],
            wide=(0, 1),
        )
    }


def _swiglu_cases() -> dict[str, Case]:
    return {
        f"swiglu-{rows}x{size}": Case(
            fast=swiglu.swiglu,
            reference=swiglu._swiglu_reference,
            inputs=lambda rows=rows, size=size: [10 * _normal(rows, 2 * size)],
        )
        for rows, size in ((1, 16), (9, 80), (400, 64))
    }


def _rope_cases() -> dict[str, Case]:
    def case(batch, tokens, kv_heads, group, head_dim, rotary_dim, normed, shared_table) -> Case:
        positions = torch.arange(tokens)[None] if shared_table else torch.randint(0, 50, (batch, tokens))
        cos, sin = rope.rotary_tables(positions, rotary_dim, 1e4)

        def run(operator, qkv, *weights):
            dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
            return operator(qkv, cos.to(dtype), sin.to(dtype), *(weights or (None, None)), 1e-5)

        weights = [_normal(head_dim), _normal(head_dim)] if normed else []
        return Case(
            fast=lambda *tensors: run(rope.split_qkv, *tensors),
            reference=lambda *tensors: run(rope._split_qkv_reference, *tensors),
            inputs=lambda: [_normal(batch, tokens, kv_heads, group + 2, head_dim), *weights],
            wide=(1, 2),
        )

    return {
        "split_qkv": case(2, 5, 2, 2, 32, 16, normed=False, shared_table=True),
        "split_qkv-normed": case(2, 5, 2, 3, 32, 16, normed=True, shared_table=True),
        "split_qkv-normed-positions": case(3, 70, 1, 2, 64, 64, normed=True, shared_table=False),
    }


def _attention_cases() -> dict[str, Case]:
    def case(batch, tokens, heads, kv_heads, head_dim, documents=None, branches=None) -> Case:
        ids = [None if numbers is None else torch.tensor(numbers) for numbers in (documents, branches)]
        return Case(
            fast=lambda q, k, v: attention.attention(q, k, v, 0.3, *ids),
            reference=lambda q, k, v: attention._attention_reference(q, k, v, 0.3, *ids),
            inputs=lambda: [
                _normal(batch, tokens, heads, head_dim),
                _normal(batch, tokens, kv_heads, head_dim),
                _normal(batch, tokens, kv_heads, head_dim),
            ],
        )

    packed = [[0] * 50 + [1] * 3 + [2] * 77, [0] * 1 + [1] * 65 + [7] * 30 + [-1] * 34]
    # A document alone, a trunk with branches of 1, 70 and 9, a trunk of 100 with one branch; branches at once.
    grown = [[0] * 11 + [1] * 93 + [2] * 124, [4] * 228]
    branches = [
        [0] * 11 + [0] * 13 + [1] + [2] * 70 + [3] * 9 + [0] * 100 + [1] * 24,
        [1] * 30 + [2] * 198,
    ]
    return {
        "attention-1": case(1, 1, 1, 1, 16),
        "attention-5": case(2, 5, 4, 2, 32),
        "attention-64": case(1, 64, 6, 2, 16),
        "attention-131": case(2, 131, 2, 1, 48),
        "attention-packed": case(2, 130, 4, 2, 32, packed),
        "attention-branches": case(2, 228, 4, 2, 32, grown, branches),
        "attention-whole-panels": case(1, 128, 2, 1, 16, [[0] * 64 + [1] * 64], [[0] * 16 + [1] * 48 + [0] * 64]),
    }


def _experts_cases() -> dict[str, Case]:
    def case(tokens, num_experts, choices, size, width, used=None) -> Case:
        scores = torch.rand(tokens, num_experts)
        scores[:, used or num_experts :] = -1.0
        ids = scores.topk(choices, dim=-1).indices
        return Case(
            fast=lambda x, gate_up, down, weights: experts.routed_experts(x, gate_up, down, ids, weights),
            reference=lambda x, gate_up, down, weights: experts._routed_experts_reference(
                x, gate_up, down, ids, weights
            ),
            inputs=lambda: [
                _normal(tokens, size),
                _normal(num_experts, 2, width, size) / size**0.5,
                _normal(num_experts, size, width) / width**0.5,
                torch.rand(tokens, choices, dtype=torch.float64),
            ],
            wide=(1, 2, 3),
        )

    return {
        "experts": case(50, 8, 2, 32, 16),
        "experts-one-token": case(1, 4, 2, 16, 32),
        "experts-idle": case(40, 6, 3, 32, 48, used=4),
    }


def _loss_cases() -> dict[str, Case]:
    targets = torch.randint(0, 80, (100,))
    weights = torch.rand(100)
    weights[::3] = 0.0
    ignored = torch.where(weights == 0, -100, targets)

    def reference_loss(hidden, weight):
        kept, _ = logprobs._linear_logprobs_reference(hidden, weight, targets)
        return -(kept * weights.to(kept.dtype)).sum()

    return {
        "linear_cross_entropy": Case(
            fast=lambda hidden, weight: logprobs.linear_cross_entropy(hidden, weight, ignored, weights),
            reference=reference_loss,
            inputs=lambda: [_normal(100, 32), 0.3 * _normal(80, 32)],
            wide=(1,),
        ),
        "linear_logprobs": Case(
            fast=lambda hidden, weight: logprobs.linear_logprobs(hidden, weight, targets, 0.7),
            reference=lambda hidden, weight: logprobs._linear_logprobs_reference(hidden, weight, targets, 0.7),
            inputs=lambda: [_normal(100, 32), 0.3 * _normal(80, 32)],
            wide=(1,),
        ),
    }


CASES = _norm_cases() | _swiglu_cases() | _rope_cases() | _attention_cases() | _experts_cases() | _loss_cases()


def _run(operator: Callable[..., object], inputs: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return outputs, and gradients under fixed random output gradients, all in fp64."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = operator(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(1)
    differentiable = [output for output in outputs if output.requires_grad]
    gradients = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in differentiable]
    torch.autograd.backward(differentiable, gradients)
    return [o.detach().double() for o in outputs], [leaf.grad.double() for leaf in leaves]


def _distance(measured: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((measured - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_fast_path_equals_its_reference(needs_native, monkeypatch, name, dtype, tolerance, threads):
    """Outputs and all gradients agree with the fp64 reference, within fp32 or bf16 rounding, for any threads."""
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 0)
    monkeypatch.setattr("glm45.kernels.native.threads_for", lambda elements: threads)
    case = CASES[name]
    inputs = [tensor.to(torch.float32 if i in case.wide else dtype).double() for i, tensor in enumerate(case.inputs())]
    expected_outputs, expected_gradients = _run(case.reference, inputs)
    narrow = [tensor.to(torch.float32 if i in case.wide else dtype) for i, tensor in enumerate(inputs)]
    outputs, gradients = _run(case.fast, narrow)
    for measured, expected in zip(outputs + gradients, expected_outputs + expected_gradients, strict=True):
        assert _distance(measured, expected) < tolerance


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 33, 16), (3, 40, 40), (2, 64, 300), (1, 48, 1030)])
def test_orthogonalizing_equals_its_reference(needs_native, monkeypatch, shape, threads):
    """Small singular values lose digits in a Gram matrix: within 2e-4, where bf16, which is usual, gives 1e-2."""
    monkeypatch.setattr("glm45.kernels.native.threads_for", lambda elements: threads)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = orthogonalize._orthogonalize_reference(x if shape[1] <= shape[2] else x.mT, 5)
    found = orthogonalize.orthogonalize(x.float())
    assert _distance(found if shape[1] <= shape[2] else found.mT, expected) < 2e-4
    assert not orthogonalize.orthogonalize(torch.zeros(shape)).any()
