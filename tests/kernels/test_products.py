"""Native matrix products against fp64, for every unit, layout and type."""

import itertools

import pytest
import torch

from glm45.kernels import native, products
from glm45.kernels.linear import linear


@pytest.fixture(params=["fp32", "fp16"])
def unit(request, monkeypatch, needs_native):
    if request.param == "fp16" and not native.has("has_fp16"):
        pytest.skip("this processor has no AVX512-FP16")
    monkeypatch.setattr(products, "bf16_unit", lambda: request.param)
    return request.param


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 17, 5), (64, 64, 64), (37, 100, 1100), (130, 33, 70), (16, 200, 31)])
@pytest.mark.parametrize("threads", [1, 3])
def test_products_of_any_layout_and_type_equal_fp64(monkeypatch, unit, sizes, threads):
    monkeypatch.setattr(native, "threads_for", lambda elements: threads)
    rows, columns, terms = sizes
    types = (torch.float32, torch.bfloat16)
    for left, right, out_type, transposed in itertools.product(types, types, types, (False, True)):
        if torch.bfloat16 not in (left, right, out_type):
            continue
        a = torch.randn(terms, rows).to(left).T if transposed else torch.randn(rows, terms).to(left)
        b = torch.randn(columns, terms).to(right).T if transposed else torch.randn(terms, columns).to(right)
        bias, start = torch.randn(columns), torch.randn(rows, columns).to(out_type)
        exact = a.double() @ b.double()
        magnitude = (a.double().square() @ b.double().square()).sqrt()
        limit = {"fp32": 5e-6, "fp16": 1.2e-2}[unit] * magnitude + (1e-6 if out_type == torch.float32 else 1e-2)
        measured = products.product(a, b, bias_N=bias, dtype=out_type)
        rounding = 8e-3 * (exact + bias).abs() if out_type == torch.bfloat16 else 0
        assert ((measured.double() - exact - bias).abs() <= limit + rounding).all()
        added = products.product(a, b, out_MN=start.clone(), add=True)
        rounding = 8e-3 * (exact + start).abs() if out_type == torch.bfloat16 else 0
        assert ((added.double() - exact - start.double()).abs() <= limit + rounding).all()


def test_rows_and_columns_of_any_magnitude_keep_their_precision(unit):
    """fp16 holds five decades; rows and columns here span forty, and each product is as exact as between ones."""
    rows = 10.0 ** torch.linspace(-20, 15, 24)[:, None]
    columns = 10.0 ** torch.linspace(-15, 18, 40)[None, :]
    a, b = torch.randn(24, 64) * rows, torch.randn(64, 40) * columns
    measured = products.product(a.bfloat16(), b)
    exact = a.bfloat16().double() @ b.double()
    scale = rows.double() * columns.double() * 8
    assert ((products.product(a.bfloat16(), b, dtype=torch.float32) - exact).abs() <= 5e-3 * scale).all()
    assert measured.dtype == torch.bfloat16


def test_products_are_closer_than_torchs_bf16(unit):
    a, b = torch.randn(200, 300), torch.randn(300, 100)
    exact = a.double() @ b.double()
    ours = products.product(a.bfloat16(), b.bfloat16(), dtype=torch.float32).double()
    theirs = (a.bfloat16() @ b.bfloat16()).double()
    assert (ours - exact).square().mean() <= (theirs - exact).square().mean()


def test_what_is_not_a_number_or_infinite_shows(unit):
    a = torch.ones(9, 20, dtype=torch.bfloat16)
    a[2, 3], a[4, 5] = float("nan"), float("inf")
    out = products.product(a, torch.ones(20, 18), dtype=torch.float32)
    assert out[2].isnan().all()
    assert not out[4].isfinite().any()
    assert (out[[0, 1, 3, 5, 6, 7, 8]] == 20).all()


def test_a_bf16_layer_takes_the_unit_where_it_has_enough_rows(unit):
    """Weights in bf16 too: values and gradients as in fp64; few rows go to torch, which does not pack."""
    weight = torch.randn(48, 32).bfloat16().requires_grad_()
    for rows in (3, 70):
        x = torch.randn(2, rows, 32).bfloat16().requires_grad_()
        assert products.beats_torch(x, weight) == (2 * rows >= products.MIN_ROWS)
        linear(x, weight).float().square().sum().backward()
        wide, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
        (wide @ wide_weight.T).square().sum().backward()
        for ours, exact in ((x.grad, wide.grad), (weight.grad, wide_weight.grad)):
            assert (ours - exact).abs().max() < 0.02 * exact.abs().max()
        weight.grad = None


def test_empty_products_are_zero(unit):
    assert products.product(torch.ones(0, 4).bfloat16(), torch.ones(4, 3)).shape == (0, 3)
    assert (products.product(torch.ones(2, 0).bfloat16(), torch.ones(0, 3)) == 0).all()


def test_the_choice_is_measured_once_and_kept(needs_native, monkeypatch, tmp_path):
    path = tmp_path / "products.json"
    monkeypatch.setattr(native, "cached_file", lambda name: path)
    measured = products.rates()
    assert set(measured) >= {"torch", "torch fp32", "fp32"}
    monkeypatch.setattr(products, "_measure", lambda: pytest.fail("measured twice"))
    assert products.rates() == measured


def test_an_unknown_unit_is_refused(monkeypatch):
    monkeypatch.setenv("GLM45_PRODUCTS", "fp8")
    products.bf16_unit.cache_clear()
    with pytest.raises(ValueError, match="GLM45_PRODUCTS='fp8' is none of torch, fp32, fp16"):
        products.bf16_unit()
    products.bf16_unit.cache_clear()
