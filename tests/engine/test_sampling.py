"""Filters agree with transformers' logits processors; draws follow the distribution and only seed and position."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from glm45.engine.request import Request, SamplingParams, Sequence
from glm45.engine.sampling import distribution, draw, reported_logprobs, shape_logits, uniforms


def sequence_with(prompt=(1, 2, 3), output=(), **params):
    request = Request("r", list(prompt), SamplingParams(**params), stop_ids=frozenset({0}))
    sequence = Sequence.of(request, 0, 0)
    sequence.token_ids += output
    return sequence


@pytest.mark.slow  # transformers is slow to import
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
        {"repetition_penalty": 1.7, "temperature": 0.5, "top_p": 0.9},
    ],
)
def test_distribution_is_that_of_transformers(params):
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits_NV = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)) * 2
    theirs = LogitsProcessorList()
    if "repetition_penalty" in params:
        theirs.append(RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    theirs.append(TemperatureLogitsWarper(params.get("temperature", 1.0)))
    if "top_k" in params:
        theirs.append(TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        theirs.append(TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        theirs.append(MinPLogitsWarper(params["min_p"]))
    expected_NV = torch.softmax(theirs(torch.tensor([[1, 2, 3]] * 6), logits_NV.clone()), -1)
    sequences = [sequence_with(**params)] * 6
    shape_logits(logits_NV, sequences)
    torch.testing.assert_close(distribution(logits_NV, sequences), expected_NV)


def test_rows_of_different_requests_do_not_mix():
    logits_NV = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    several = [sequence_with(temperature=0), sequence_with(top_p=0.5), sequence_with(temperature=2.0)]
    together = distribution(logits_NV, several)
    for row, sequence in enumerate(several):
        torch.testing.assert_close(together[row : row + 1], distribution(logits_NV[row : row + 1], [sequence]))
    assert together[0].argmax() == logits_NV[0].argmax()
    assert together[0].max() == 1


def test_a_row_that_keeps_every_token_is_untouched_by_its_neighbours():
    """Bit for bit, also where rounding takes the sum of probabilities to 1 before the last token."""
    logits_NV = 4 * torch.randn(2, 50_000, generator=torch.Generator().manual_seed(2))
    plain, cut = sequence_with(temperature=0.9), sequence_with(top_p=0.5)
    assert torch.equal(distribution(logits_NV, [plain, cut])[:1], distribution(logits_NV[:1], [plain]))
    everything = distribution(logits_NV[:1], [sequence_with(top_k=50_000)])
    assert bool((everything > 0).all())


def test_bias_bans_and_minimum_length_hold():
    logits_NV = torch.zeros(2, 8)
    short = sequence_with(min_tokens=2, output=(5,), logit_bias={3: float("-inf"), 4: 1.0})
    long = sequence_with(min_tokens=2, output=(5, 5))
    shape_logits(logits_NV, [short, long])
    probs_NV = distribution(logits_NV, [short, long])
    assert probs_NV[0, 0] == probs_NV[0, 3] == 0  # the stop id too early, the banned token
    assert probs_NV[1, 0] > 0
    torch.testing.assert_close(probs_NV[0, 4] / probs_NV[0, 5], torch.tensor(1.0).exp())


def test_draws_follow_the_distribution():
    probs_V = torch.softmax(torch.randn(30, generator=torch.Generator().manual_seed(3)), 0)
    probs_V[7] = 0
    probs_V /= probs_V.sum()
    points = uniforms(np.full(40_000, 11, np.uint64), np.arange(40_000, dtype=np.uint64), 0)
    counts = torch.bincount(draw(probs_V.expand(40_000, -1), points), minlength=30).numpy()
    assert counts[7] == 0
    seen = np.arange(30) != 7
    assert chisquare(counts[seen], 40_000 * probs_V.double().numpy()[seen] / probs_V.double().sum()).pvalue > 1e-3


def test_random_numbers_are_uniform_and_streams_positions_and_seeds_independent():
    seeds, positions = np.arange(200, dtype=np.uint64).repeat(200), np.tile(np.arange(200, dtype=np.uint64), 200)
    streams = [uniforms(seeds, positions, stream) for stream in (0, 1, 2)]
    for stream in streams:
        assert chisquare(np.histogram(stream, 50, (0, 1))[0]).pvalue > 1e-3
        assert chisquare(np.histogram(stream[np.argsort(positions, kind="stable")][::7], 50, (0, 1))[0]).pvalue > 1e-3
    assert np.abs(np.corrcoef(streams) - np.eye(3)).max() < 0.02
    grid = streams[0].reshape(200, 200)
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.02


def test_rounding_never_draws_an_impossible_token():
    probs_NV = torch.tensor([[0.3, 0.7, 0.0], [0.0, 0.0, 1.0]])
    assert draw(probs_NV, np.array([1.0 - 2**-53, 0.0])).tolist() == [1, 2]


def test_reported_logprobs_ignore_filters_and_know_temperature():
    logits_NV = torch.randn(1, 20, generator=torch.Generator().manual_seed(4))
    reported = reported_logprobs(logits_NV, [sequence_with(temperature=0.5, top_p=0.1)])
    torch.testing.assert_close(reported, torch.log_softmax(logits_NV * 2, -1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("logit_bias", {1: float("inf")}),
        ("logit_bias", {1: float("nan")}),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("min_tokens", 999),
        ("stop", ("",)),
        ("repetition_penalty", 0),
    ],
)
def test_a_senseless_parameter_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})
