"""From logits to tokens: shaping the distribution, drawing from it, and the log-probability of what was drawn.

N rows, V vocabulary, S sequences. A draw depends on the request's seed and on the position alone, never on the batch:
it inverts the cumulative distribution at a number that a counter-based generator gives for (seed, position, stream).
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from glm45.seeds import derive_seed

if TYPE_CHECKING:
    from glm45.engine.request import Sequence

TOKEN_STREAM, ACCEPT_STREAM, DRAFT_STREAM = 0, 1, 2
"""Purposes of random numbers at one position: the token itself, accepting a draft, drawing a draft."""


@dataclass(frozen=True, slots=True)
class Draws:
    """What the next draws of some sequences depend on, besides the distribution."""

    temperatures_S: np.ndarray
    """In fp32."""
    seeds_S: np.ndarray
    """In uint64."""
    positions_S: np.ndarray
    """Output tokens so far, in uint64."""
    drafts: list[list[int]]
    """Tokens that are proposed for the next positions."""
    draft_probs: list[Any]
    """The distributions, tensors `[k, V]`, that the drafts were drawn from; None without drafts."""

    @classmethod
    def of(cls, sequences: Rows["Sequence"]) -> "Draws":
        """Collect them."""
        return cls(
            temperatures_S=np.array([sequence.request.params.temperature for sequence in sequences], np.float32),
            seeds_S=np.array([sequence.seed for sequence in sequences], np.uint64),
            positions_S=np.array([sequence.num_output_tokens for sequence in sequences], np.uint64),
            drafts=[sequence.drafts for sequence in sequences],
            draft_probs=[sequence.draft_probs if sequence.drafts else None for sequence in sequences],
        )

    @property
    def starts(self) -> np.ndarray:
        """First row of each sequence where it has one row more than drafts, and their total, in int32."""
        return np.array([0, *accumulate(len(drafts) + 1 for drafts in self.drafts)], np.int32)


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
    temperatures_N = np.array([p.temperature for p in params], np.float32)
    # Rows that keep every token stay as they are: what a row's distribution is must not depend on its neighbours.
    rows = [row for row, p in enumerate(params) if p.top_p < 1 or p.top_k or p.min_p]
    if rows:

        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=logits_NV.device)[:, None]

        cut = [params[row] for row in rows]
        top_k = column([float(p.top_k or logits_NV.shape[1]) for p in cut])
        cut_NV = logits_NV[rows]
        scaled_NV = tempered(cut_NV, temperatures_N[rows])
        keep_NV = _kept(scaled_NV, top_k, column([p.top_p for p in cut]), column([p.min_p for p in cut]))
        logits_NV = logits_NV.clone()
        logits_NV[rows] = cut_NV.masked_fill(~keep_NV, float("-inf"))
    return probabilities(logits_NV, temperatures_N)


def tempered(logits_NV: torch.Tensor, temperatures_N: np.ndarray) -> torch.Tensor:
    """Divide rows by their temperatures; at temperature 0 they stay as they are."""
    scales_N = np.where(temperatures_N == 0, 1, temperatures_N).astype(np.float32)
    return logits_NV / torch.from_numpy(scales_N).to(logits_NV.device)[:, None]


def probabilities(logits_NV: torch.Tensor, temperatures_N: np.ndarray) -> torch.Tensor:
    """Return softmax(logits / temperature); at temperature 0 a row is one at its largest logit."""
    probs_NV = torch.softmax(tempered(logits_NV, temperatures_N), dim=-1)
    greedy_N = torch.from_numpy(temperatures_N == 0).to(logits_NV.device)
    if bool(greedy_N.any()):
        probs_NV[greedy_N] = F.one_hot(logits_NV[greedy_N].argmax(-1), logits_NV.shape[1]).to(probs_NV)
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
    keep_NV &= (before_NV < top_p) | (ranks_V == 0) | (top_p == 1)  # rounding may take the sum past 1
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


def verify(probs_NV: torch.Tensor, draws: Draws) -> list[list[int]]:
    """Return the tokens that each sequence gets: accepted drafts, and one token drawn after them.

    `probs_NV` holds, for each sequence in turn, the distribution after its last token and after each of its drafts. A
    draft is accepted with probability min(1, target / draft); the first refused one is replaced by a draw from what
    the target has in excess of the draft (Leviathan et al. 2211.17192), so tokens are distributed as without drafts.
    """
    starts = draws.starts.tolist()
    counts = [len(drafts) for drafts in draws.drafts]
    kept = _accepted(probs_NV, draws, starts) if any(counts) else counts
    rows = [start + num for start, num in zip(starts, kept, strict=False)]
    final_SV = probs_NV[rows]
    for i, num in enumerate(kept):
        if num < counts[i]:
            excess_V = (final_SV[i] - draws.draft_probs[i][num]).clamp(min=0)
            # Rounding may leave nothing of equal distributions.
            final_SV[i] = torch.where(excess_V.sum() > 0, excess_V, final_SV[i])
    positions_S = draws.positions_S + np.array(kept, np.uint64)
    last = draw(final_SV, uniforms(draws.seeds_S, positions_S, TOKEN_STREAM)).tolist()
    return [[*drafts[:num], token] for drafts, num, token in zip(draws.drafts, kept, last, strict=True)]


def _accepted(probs_NV: torch.Tensor, draws: Draws, starts: list[int]) -> list[int]:
    """How many drafts of each sequence are kept: those before the first refused one."""
    owners = [(i, j) for i, drafts in enumerate(draws.drafts) for j in range(len(drafts))]
    sequences, ahead = np.array(owners).T
    rows, tokens = [starts[i] + j for i, j in owners], [draws.drafts[i][j] for i, j in owners]
    target = probs_NV[rows, tokens].double().cpu().numpy()
    proposed = np.array([float(draws.draft_probs[i][j, draws.drafts[i][j]]) for i, j in owners])
    points = uniforms(draws.seeds_S[sequences], draws.positions_S[sequences] + ahead.astype(np.uint64), ACCEPT_STREAM)
    kept = [len(drafts) for drafts in draws.drafts]
    for i, j in np.array(owners)[points * proposed >= target].tolist():
        kept[i] = min(kept[i], j)
    return kept


def reported_logprobs(logits_NV: torch.Tensor, sequences: Rows["Sequence"]) -> torch.Tensor:
    """Return `log softmax(logits / temperature)` `[N, V]` of the model's own logits: what training computes.

    At temperature 0 the logits are not scaled. One sequence may stand for all rows.
    """
    temperatures_N = np.array([sequence.request.params.temperature for sequence in sequences], np.float32)
    return torch.log_softmax(tempered(logits_NV.float(), temperatures_N), dim=-1)


def top_logprobs(logprobs_V: torch.Tensor, count: int) -> dict[int, float]:
    """Return the `count` most likely tokens with their log-probabilities, most likely first."""
    values, tokens = logprobs_V.topk(min(count, logprobs_V.shape[0]))
    return dict(zip(tokens.tolist(), values.tolist(), strict=True))
