"""Mixtures: shares as written, kept at every prefix, and what cannot be meant is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45.config import from_dict, to_dict
from glm45.data.mixture import Interleaver, Mixture, epochs, shares

TOKENS = {"web.high": 100, "web.medium": 300, "web.low": 400, "code.high": 50, "code.medium": 150, "web.heldout": 40}


def test_the_quality_recipe():
    """Natural rate, the top bucket 3.2 times, the lowest never: 320 + 300 + 160 + 150 of 930 tokens."""
    mixture = Mixture(repeats={"*.high": 3.2, "*.low": 0})
    share = shares(mixture, TOKENS)
    assert share == pytest.approx(
        {"web.high": 320 / 930, "web.medium": 300 / 930, "code.high": 160 / 930, "code.medium": 150 / 930}
    )
    assert epochs(mixture, TOKENS, 930) == pytest.approx(
        {"web.high": 3.2, "web.medium": 1, "code.high": 3.2, "code.medium": 1}
    )


def test_weights_divide_by_tokens_within_a_pattern():
    share = shares({"code.*": 3, "web.high": 1}, TOKENS)
    assert share == pytest.approx({"code.high": 0.75 / 4, "code.medium": 0.75 * 3 / 4, "web.high": 0.25})


def test_a_dataset_belongs_to_its_first_pattern():
    share = shares({"code.*": 0.5, "*.high": 0.5}, TOKENS)
    assert share == pytest.approx({"code.high": 0.125, "code.medium": 0.375, "web.high": 0.5})


@pytest.mark.parametrize(
    "mixture, message",
    [
        ({"web.hihg": 1}, "no dataset matches 'web.hihg'; did you mean 'web.high'"),
        ({"books.*": 1}, "no dataset matches 'books.*'"),
        (Mixture(repeats={"*.best": 2}), "no dataset matches '\\*.best'"),
        ({"web.heldout": 1}, "held out for evaluation"),
        ({"web.high|web.heldout": 1}, "held out for evaluation"),
        ({"*": 1, "web.high": 1}, "put the narrower pattern first"),
        (Mixture(weights={"web.low": 1}, repeats={"*.low": 0}), "repeats discards web.low"),
    ],
)
def test_a_mixture_that_cannot_be_meant_is_refused(mixture, message):
    with pytest.raises(ValueError, match=message):
        shares(mixture, TOKENS)


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match=r"code\.high has no tokens"):
        shares({"*": 1}, TOKENS | {"code.high": 0})


@pytest.mark.parametrize("values", [{"weights": {"a": -1}}, {"weights": {"a": 0}}, {"repeats": {"a": float("nan")}}])
def test_impossible_numbers_are_refused(values):
    with pytest.raises(ValueError, match=r"at least 0|all zero"):
        Mixture(**values)


def test_too_many_epochs_are_refused():
    mixture = Mixture(repeats={"*.high": 3.2}, max_epochs=4)
    assert epochs(mixture, TOKENS, 1_660)["code.high"] == pytest.approx(3.99, abs=0.01)
    with pytest.raises(ValueError, match=r"max_epochs = 4, and 1670 tokens read .*code\.high': '4\.02"):
        epochs(mixture, TOKENS, 1_670)


def test_a_mixture_survives_json():
    mixture = Mixture(weights={"code.*": 0.5, "*": 0.5}, repeats={"*.high": 3.2}, max_epochs=4)
    assert from_dict(Mixture, to_dict(mixture)) == mixture


weights = st.lists(st.floats(1e-3, 1), min_size=1, max_size=12)


@given(weights, st.integers(0, 3), st.integers(1, 500))
def test_every_prefix_keeps_the_shares_within_3_rows(weights, seed, rows):
    share_D = np.array(weights) / sum(weights)
    dataset_R, _ = Interleaver(list(share_D), seed).assign(0, rows)
    counts_RD = np.cumsum(dataset_R[:, None] == np.arange(len(share_D)), axis=0)
    expected_RD = share_D * np.arange(1, rows + 1)[:, None]
    assert np.abs(counts_RD - expected_RD).max() < 3


@given(weights, st.integers(0, 3), st.integers(0, 1 << 32), st.integers(1, 200))
def test_any_stretch_numbers_each_datasets_rows_without_gap(weights, seed, first, rows):
    """Random access agrees with the closed-form count of everything before."""
    interleaver = Interleaver(weights, seed)
    dataset_R, number_R = interleaver.assign(first, first + rows)
    before, after = interleaver.counts(first), interleaver.counts(first + rows)
    for dataset in range(len(weights)):
        assert number_R[dataset_R == dataset].tolist() == list(range(before[dataset], after[dataset]))
