"""From logits to tokens: shaping the distribution, drawing from it, and the log-probability of what was drawn.

N rows, V vocabulary. A draw depends on the request's seed and on the position alone, never on the batch: it inverts
the cumulative distribution at a number that a counter-based generator gives for (seed, position, stream).
"""

from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING

import numpy as np
import torch

from glm45.seeds import derive_seed

if TYPE_CHECKING:
    from glm45.engine.request import Sequence

TOKEN_STREAM, ACCEPT_STREAM, DRAFT_STREAM = 0, 1, 2
"""Purposes of random numbers at one position: the token itself, accepting a draft, drawing a draft."""


def sample_seed(seed: int, index: int) -> int:
    """Return the seed of sample `index` of a request; the first sample's is the request's own."""
    return seed if index == 0 else derive_seed(seed, "sample", index)


def uniforms(seeds_N: np.ndarray, positions_N: np.ndarray, stream: int) -> np.ndarray:
    """Return one number in [0, 1) for each (seed, position) of a stream: SplitMix64's finaliser, applied twice."""
    with np.errstate(over="ignore"):
        state_N = _mix(seeds_N.astype(np.uint64) ^ np.uint64(0x9E3779B97F4A7C15 * (stream + 1) % 2**64))
        state_N = _mix(state_N + positions_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (state_N >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state_N: np.ndarray) -> np.ndarray:
    state_N = (state_N ^ (state_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state_N = (state_N ^ (state_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state_N ^ (state_N >> np.uint64(31))


def shape_logits(logits_NV: torch.Tensor, sequences: Rows["Sequence"], drafted: Rows[int] | None = None) -> None:
    """Apply logit bias, repetition penalty and minimum length to the rows, in place.

    Row i continues `sequences[i]`, after its first `drafted[i]` drafts if given.
    """
    for row, sequence in enumerate(sequences):
        params = sequence.request.params
        num_drafted = drafted[row] if drafted else 0
        logits_V = logits_NV[row]
        for token, bias in params.logit_bias.items():
            logits_V[token] += bias
        if params.repetition_penalty != 1:
            seen = torch.tensor(sorted({*sequence.token_ids, *sequence.drafts[:num_drafted]}), device=logits_V.device)
            values = logits_V[seen]
            penalty = params.repetition_penalty
            logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if sequence.num_output_tokens + num_drafted < params.min_tokens:
            logits_V[list(sequence.request.stop_ids)] = float("-inf")


def distribution(logits_NV: torch.Tensor, sequences: Rows["Sequence"]) -> torch.Tensor:
    """Return the probabilities `[N, V]` that rows are drawn from: temperature, top-k, top-p, min-p, in this order.

    A greedy row is one at its largest logit. A row whose every logit is -inf comes out as NaN: see `is_dead`.
    """
    params = [sequence.request.params for sequence in sequences]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits_NV.device)[:, None]

    greedy_N = torch.tensor([p.temperature == 0 for p in params], device=logits_NV.device)
    scaled_NV = logits_NV / column([p.temperature or 1.0 for p in params])
    if any(p.top_p < 1 or p.top_k or p.min_p for p in params):
        top_k = column([float(p.top_k or logits_NV.shape[1]) for p in params])
        keep_NV = _kept(scaled_NV, top_k, column([p.top_p for p in params]), column([p.min_p for p in params]))
        scaled_NV = scaled_NV.masked_fill(~keep_NV, float("-inf"))
    best_N = logits_NV.argmax(-1)
    probs_NV = torch.softmax(scaled_NV, dim=-1)
    if bool(greedy_N.any()):
        probs_NV[greedy_N] = 0
        probs_NV[greedy_N, best_N[greedy_N]] = 1
    return probs_NV


def is_dead(logits_NV: torch.Tensor) -> list[bool]:
    """Return for each row whether every token is banned: by logit bias, grammar and minimum length together."""
    return torch.isneginf(logits_NV.amax(-1)).tolist()


def _kept(scaled_NV: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Return which tokens survive top-k, then top-p over what is left, then min-p against the most likely."""
    ordered_NV, order_NV = scaled_NV.sort(dim=-1, descending=True, stable=True)
    ranks_V = torch.arange(scaled_NV.shape[1], device=scaled_NV.device)
    keep_NV = ranks_V < top_k
    probs_NV = torch.softmax(ordered_NV.masked_fill(~keep_NV, float("-inf")), dim=-1)
    before_NV = probs_NV.double().cumsum(-1) - probs_NV
    keep_NV &= (before_NV < top_p) | (ranks_V == 0)
    keep_NV &= probs_NV >= min_p * probs_NV[:, :1]
    return torch.zeros_like(keep_NV).scatter(1, order_NV, keep_NV)


def draw(probs_NV: torch.Tensor, uniforms_N: np.ndarray) -> torch.Tensor:
    """Return token ids `[N]`: the first whose cumulative probability exceeds the row's uniform number.

    Rows need not be normalised. Tokens of probability 0 are never drawn.
    """
    cumulative_NV = probs_NV.double().cumsum(-1)
    points_N1 = torch.from_numpy(uniforms_N).to(probs_NV.device)[:, None] * cumulative_NV[:, -1:]
    ids_N = torch.searchsorted(cumulative_NV, points_N1, right=True).squeeze(1)
    # Rounding may push a point onto the total: the last token with any probability is meant.
    last_N = probs_NV.shape[1] - 1 - (probs_NV > 0).flip(-1).to(torch.int8).argmax(-1)
    return torch.minimum(ids_N, last_N)


def reported_logprobs(logits_NV: torch.Tensor, sequences: Rows["Sequence"]) -> torch.Tensor:
    """Return `log softmax(logits / temperature)` `[N, V]` of the model's own logits: what training computes.

    At temperature 0 the logits are not scaled. One sequence may stand for all rows.
    """
    temperatures = [sequence.request.params.temperature or 1.0 for sequence in sequences]
    return torch.log_softmax(logits_NV.float() / torch.tensor(temperatures, device=logits_NV.device)[:, None], dim=-1)


def top_logprobs(logprobs_V: torch.Tensor, count: int) -> dict[int, float]:
    """Return the `count` most likely tokens with their log-probabilities, most likely first."""
    values, tokens = logprobs_V.topk(min(count, logprobs_V.shape[0]))
    return dict(zip(tokens.tolist(), values.tolist(), strict=True))
