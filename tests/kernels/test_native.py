"""Compiling, caching and refusing: the native library's life."""

import re
import threading

import pytest
import torch

from glm45.kernels import attention, experts, logprobs, native, norm

SOURCE = 'extern "C" long answer() { return 42; }'


@pytest.fixture
def small_source(monkeypatch, tmp_path):
    """A library of one function, so that a compilation takes a tenth of a second."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.cpp").write_text(SOURCE)
    monkeypatch.setattr(native, "SOURCES", folder)
    return folder


def test_compiled_once_for_many_at_once_and_again_when_a_source_changes(needs_native, small_source, tmp_path):
    cache, paths = tmp_path / "cache", []
    workers = [threading.Thread(target=lambda: paths.append(native.build(cache))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(set(paths)) == 1
    assert len(paths) == 4
    assert sorted(p.name for p in cache.iterdir()) == sorted([paths[0].name, "lock"]), "nothing partial is left"
    (small_source / "answer.cpp").write_text(SOURCE.replace("42", "43"))
    assert native.build(cache) != paths[0]


@pytest.mark.parametrize(
    "compiler, message", [("", "no C\\+\\+ compiler"), ("false", "failed with status 1"), ("/no/such", "No such file")]
)
def test_without_a_working_compiler_the_reason_is_reported(monkeypatch, tmp_path, caplog, compiler, message):
    monkeypatch.setenv("GLM45_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("PATH", "/nowhere" if not compiler else "/usr/bin:/bin")
    status = native.status.__wrapped__()
    assert status.library is None
    assert re.search(message, status.reason)
    assert "PyTorch's own run instead" in caplog.text


def test_a_broken_source_says_what_the_compiler_said(needs_native, small_source, tmp_path):
    (small_source / "answer.cpp").write_text("nonsense;")
    with pytest.raises(RuntimeError, match="nonsense"):
        native.build(tmp_path)


def test_switched_off_by_the_environment(monkeypatch):
    monkeypatch.setenv("GLM45_NATIVE", "0")
    status = native.status.__wrapped__()
    assert (status.library, status.reason) == (None, "switched off by GLM45_NATIVE=0")


def test_only_plain_cpu_tensors_of_a_known_dtype_are_taken(needs_native):
    assert native.supports(torch.ones(2), None, torch.ones(2))
    assert not native.supports(torch.ones(2), torch.ones(2).bfloat16())
    assert not native.supports(torch.ones(2, dtype=torch.float64))
    assert not native.supports(torch.ones(2, device="meta"))


def test_ids_out_of_range_are_refused_before_memory_is_touched(needs_native):
    x, gate_up, down = torch.randn(4, 16), torch.randn(3, 2, 16, 16), torch.randn(3, 16, 16)
    with pytest.raises(IndexError, match=r"expert ids must lie in 0..2, got 0..3"):
        experts.routed_experts(x, gate_up, down, torch.tensor([[0], [1], [3], [2]]), torch.ones(4, 1))
    with pytest.raises(IndexError, match=r"targets must lie in 0..31"):
        logprobs.linear_logprobs(torch.randn(4, 16), torch.randn(32, 16), torch.tensor([0, 1, 32, 2]))


def test_a_spoilt_value_shows_and_stays_in_its_document(needs_native):
    """A NaN reaches what depends on it and nothing else."""
    q, k, v = (torch.randn(1, 12, 2, 16) for _ in range(3))
    k[0, 5] = float("nan")
    ids = torch.tensor([[0] * 4 + [1] * 4 + [2] * 4])
    out = attention.attention(q, k, v, 0.25, ids)
    assert out[0, 5:8].isnan().all()
    assert out[0, [0, 1, 2, 3, 4, 8, 9, 10, 11]].isfinite().all()
    v[0, 5], k[0, 5] = float("nan"), 0.0
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    for gradient in torch.autograd.grad(attention.attention(q, k, v, 0.25, ids).sum(), (q, k, v)):
        assert gradient[0, [0, 1, 2, 3, 8, 9, 10, 11]].isfinite().all()
    spoilt = torch.randn(3, 16)
    spoilt[1, 2] = float("nan")
    assert norm.rms_norm(spoilt, torch.ones(16), 1e-5).isnan().any(dim=1).tolist() == [False, True, False]


def test_branches_without_documents_are_refused():
    x = torch.randn(1, 4, 1, 16)
    with pytest.raises(ValueError, match="branch_ids need document_ids"):
        attention.attention(x, x, x, 0.25, None, torch.zeros(1, 4))


def test_large_logits_do_not_overflow(needs_native):
    """Logits of 10^4 give the same log-probabilities as PyTorch's own."""
    logits = 1e4 * torch.randn(20, 48)
    targets = torch.randint(0, 48, (20,))
    expected = torch.log_softmax(logits.double(), -1)[torch.arange(20), targets]
    measured, _ = logprobs.log_softmax_in_place(logits.clone(), targets, None)
    torch.testing.assert_close(measured.double(), expected, rtol=1e-5, atol=1e-2)


def test_loss_gradient_sums_to_zero_over_the_vocabulary(needs_native):
    """Softmax minus one-hot: an invariant that holds whatever the logits."""
    logits = torch.randn(30, 64)
    logprobs.log_softmax_in_place(logits, torch.randint(0, 64, (30,)), torch.rand(30), 0.5)
    assert logits.sum(-1).abs().max() < 1e-5


def test_results_repeat_bit_for_bit(needs_native):
    q, k, v = (torch.randn(2, 70, 2, 32, requires_grad=True) for _ in range(3))

    def run():
        return torch.autograd.grad(attention.attention(q, k, v, 0.2).square().sum(), (q, k, v))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_the_loss_has_one_backward_pass():
    """Its gradients are scaled in place; a second pass would scale them twice, so it is refused."""
    hidden = torch.randn(5, 16, requires_grad=True)
    loss = logprobs.linear_cross_entropy(hidden, torch.randn(32, 16), torch.arange(5), torch.ones(5))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()
