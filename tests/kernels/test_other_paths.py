"""Paths that are taken where the native kernels are not: grouped products, packed attention on a GPU, fallbacks."""

import pytest
import torch

from glm45.kernels import attention, experts, linear, logprobs, native, norm, probe, products, rope, swiglu

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine")


def _experts_inputs(dtype, device="cpu"):
    inputs = [torch.randn(60, 32), torch.randn(6, 2, 16, 32) / 6, torch.randn(6, 32, 16) / 4, torch.rand(60, 2)]
    ids = torch.rand(60, 6).topk(2).indices
    ids[ids == 3] = 4  # an expert without tokens
    cast = [x.to(device, dtype if x is inputs[0] else torch.float32).requires_grad_() for x in inputs]
    return cast, ids.to(device)


def _outputs_and_gradients(operator, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = operator(*leaves)
    output.backward(torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output).to(output.dtype))
    return [output.detach().double(), *(leaf.grad.double() for leaf in leaves)]


def _close(measured, expected, tolerance):
    for a, b in zip(measured, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_grouped_products_equal_the_loop_over_experts(device, dtype, tolerance):
    if experts.grouped_products() is None:
        pytest.skip("this torch has no grouped_mm")
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("not taken: on a GPU grouped products serve bf16")
    (x, gate_up, down, weights), ids = _experts_inputs(dtype, device)

    def run(operator):
        return _outputs_and_gradients(
            lambda x, gate_up, down, weights: operator(x, gate_up, down, ids, weights), (x, gate_up, down, weights)
        )

    _close(run(experts._grouped_experts), run(experts._routed_experts_reference), tolerance)


def test_document_starts_count_rows_and_documents():
    """By hand: documents of 2 and 1 tokens, then a row that begins with the number that the last one ended on."""
    ids = torch.tensor([[0, 0, 1], [1, 1, -1]])
    assert attention.document_starts(ids).tolist() == [0, 2, 3, 5, 6]


@needs_cuda
@pytest.mark.parametrize("documents", [None, [[0] * 50 + [1] * 3 + [2] * 75, [5] * 1 + [1] * 100 + [-1] * 27]])
def test_attention_on_gpu_equals_the_reference(documents):
    ids = None if documents is None else torch.tensor(documents, device="cuda")
    q, k, v = (torch.randn(2, 128, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    measured = _outputs_and_gradients(lambda *x: attention.attention(*x, 0.125, ids), (q, k, v))
    wide = [x.double().cpu() for x in (q, k, v)]
    cpu_ids = None if ids is None else ids.cpu()
    expected = _outputs_and_gradients(lambda *x: attention._attention_reference(*x, 0.125, cpu_ids), wide)
    _close([x.cpu() for x in measured], expected, 3e-2)


@needs_cuda
def test_every_operator_runs_on_gpu_and_agrees_with_cpu():
    hidden, weight = torch.randn(70, 32), torch.randn(100, 32)
    targets, weights = torch.randint(0, 100, (70,)), torch.rand(70)

    def loss(hidden, weight):
        place = hidden.device
        return logprobs.linear_cross_entropy(hidden, weight, targets.to(place), weights.to(place))

    def layer(x, scale, matrix):
        _, normed = norm.add_rms_norm(x, x, scale, 1e-5, torch.float32)
        return linear.linear(swiglu.swiglu(normed), matrix)

    for operator, inputs in ((loss, (hidden, weight)), (layer, (hidden, torch.rand(32), torch.randn(8, 16)))):
        expected = _outputs_and_gradients(operator, inputs)
        measured = _outputs_and_gradients(operator, [x.cuda() for x in inputs])
        _close([x.cpu() for x in measured], expected, 2e-3)


def test_operators_without_a_library_take_their_reference(monkeypatch):
    """Without a compiler everything still runs, in fp32 and bf16, forward and backward."""
    monkeypatch.setattr(native, "library", lambda: None)
    products.bf16_unit.cache_clear()
    cos, sin = rope.rotary_tables(torch.arange(6)[None], 8, 1e4)
    for dtype in (torch.float32, torch.bfloat16):
        qkv = torch.randn(1, 6, 2, 4, 16, dtype=dtype, requires_grad=True)
        mixed = attention.attention(*rope.split_qkv(qkv, cos, sin, torch.ones(16), torch.ones(16)), 0.25)
        _, normed = norm.add_rms_norm(torch.randn(1, 6, 64), mixed.flatten(2), torch.ones(64), 1e-5, dtype)
        hidden = linear.linear(swiglu.swiglu(normed), torch.randn(32, 32))
        logprobs.linear_cross_entropy(hidden[0], torch.randn(50, 32), torch.arange(6), torch.ones(6)).backward()
        assert qkv.grad.isfinite().all()
        assert qkv.grad.abs().max() > 0
    products.bf16_unit.cache_clear()


def test_report_names_every_operator_and_its_reason():
    text = probe.report()
    for word in ("attention", "experts", "cross-entropy", "bf16 products", torch.__version__):
        assert word in text
    assert all(choice.chosen and choice.reason for choice in probe.choices())


def test_preferred_dtype_is_exact_where_bf16_does_not_pay(monkeypatch):
    monkeypatch.setattr(products, "bf16_unit", lambda: "torch")
    monkeypatch.setattr(products, "rates", lambda: {"torch": 2.3e11, "torch fp32": 8.6e10})
    monkeypatch.setattr(native, "library", object)
    assert probe.preferred_compute_dtype(512) == torch.bfloat16
    assert probe.preferred_compute_dtype(128) == torch.float32
    monkeypatch.setattr(products, "rates", lambda: {"torch": 8.0e10, "torch fp32": 1.6e11})
    assert probe.preferred_compute_dtype(512) == torch.float32
    assert probe.preferred_compute_dtype(128, "cuda") == torch.bfloat16
