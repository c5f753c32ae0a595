"""One step: a plan becomes a flat batch, the batch hidden states, hidden states tokens.

N rows, R rows to sample from, V vocabulary.
"""

from dataclasses import dataclass, field

import torch

from glm45.engine.backend import Backend
from glm45.engine.batch import Batch
from glm45.engine.constraints import mask_logits
from glm45.engine.request import Sequence
from glm45.engine.sampling import (
    Draws,
    distribution,
    is_dead,
    reported_logprobs,
    shape_logits,
    top_logprobs,
    verify,
)
from glm45.engine.scheduler import Plan
from glm45.engine.speculative import Drafter, pick


@dataclass(slots=True)
class Sampled:
    """What a step gave one sequence."""

    sequence: Sequence
    token_ids: list[int]
    """One token, or accepted drafts and one more; none where every token is banned."""
    logprobs: list[float]
    top_logprobs: list[dict[int, float]] = field(default_factory=list)


class Runner:
    """Computes plans with a backend, drafts included."""

    def __init__(self, backend: Backend, drafter: Drafter | None) -> None:
        self.backend = backend
        self.drafter = drafter
        self._spans: list[tuple[Sequence, int, int]] = []
        self._hidden: torch.Tensor | None = None

    def compute(self, plan: Plan) -> tuple[torch.Tensor, list[int]]:
        """Run the model over a plan's tokens; return hidden states and the first row of each sequence."""
        if plan.copies:
            self.backend.copy_blocks(plan.copies)
        sequences = [sequence for sequence, _ in plan.work]
        starts = [sequence.num_computed_tokens for sequence in sequences]
        tokens = [_step_tokens(sequence, count) for sequence, count in plan.work]
        batch = Batch.of(sequences, tokens, starts)
        hidden = self.backend.forward(batch)
        if self.drafter is not None:
            self.drafter.begin(sequences, batch, hidden)
        first_rows = batch.starts_S1[:-1].tolist()
        for (sequence, count), row in zip(plan.work, first_rows, strict=True):
            if sequence.request.params.prompt_logprobs:
                self._score_prompt(sequence, hidden[row : row + count])
            sequence.num_computed_tokens += count
        self._hidden = hidden
        self._spans = list(zip(sequences, first_rows, starts, strict=True))
        return hidden, first_rows

    def sample(self, hidden: torch.Tensor, rows: list[tuple[Sequence, int]]) -> list[Sampled]:
        """Draw the next tokens of sequences whose last computed row is given; drafts follow that row."""
        plain = [pair for pair in rows if _is_plain(pair[0])]
        shaped = [pair for pair in rows if not _is_plain(pair[0])] if len(plain) < len(rows) else []
        sampled = self._sample_plain(hidden, plain) if plain else []
        return sampled + (self._sample_shaped(hidden, shaped) if shaped else [])

    def draft(self) -> None:
        """Propose drafts to the sequences of the last step that go on."""
        assert self.drafter is not None
        assert self._hidden is not None
        # What a sequence has computed in this step includes the drafts that were accepted: their rows follow.
        spans = [
            (sequence, row, sequence.num_computed_tokens - before)
            for sequence, row, before in self._spans
            if sequence.finish_reason is None
        ]
        if spans:
            self.drafter.draft(spans, self._hidden)

    def _sample_plain(self, hidden: torch.Tensor, rows: list[tuple[Sequence, int]]) -> list[Sampled]:
        sequences = [sequence for sequence, _ in rows]
        logits_RV = self.backend.logits(pick(hidden, _rows_to_sample(rows)))
        tokens, logprobs = self.backend.sample(logits_RV, Draws.of(sequences))
        return [Sampled(s, t, p) for s, t, p in zip(sequences, tokens, logprobs, strict=True)]

    def _sample_shaped(self, hidden: torch.Tensor, rows: list[tuple[Sequence, int]]) -> list[Sampled]:
        owners = [sequence for sequence, _ in rows for _ in range(len(sequence.drafts) + 1)]
        drafted = [i for sequence, _ in rows for i in range(len(sequence.drafts) + 1)]
        logits_RV = self.backend.logits(pick(hidden, _rows_to_sample(rows))).clone()
        logprobs_RV = reported_logprobs(logits_RV, owners)
        mask_logits(logits_RV, owners)
        shape_logits(logits_RV, owners, drafted)
        dead = {owner for owner, banned in zip(owners, is_dead(logits_RV), strict=True) if banned}
        if dead:
            alive = [pair for pair in rows if pair[0] not in dead]
            ended = [Sampled(sequence, [], []) for sequence, _ in rows if sequence in dead]
            return ended + (self._sample_shaped(hidden, alive) if alive else [])
        sequences = [sequence for sequence, _ in rows]
        tokens = verify(distribution(logits_RV, owners), Draws.of(sequences))
        sampled, first = [], 0
        for sequence, new in zip(sequences, tokens, strict=True):
            chosen = logprobs_RV[range(first, first + len(new)), new].tolist()
            count = sequence.request.params.top_logprobs
            tops = [top_logprobs(logprobs_RV[first + i], count) for i in range(len(new))] if count else []
            sampled.append(Sampled(sequence, new, chosen, tops))
            first += len(sequence.drafts) + 1
        return sampled

    def _score_prompt(self, sequence: Sequence, hidden: torch.Tensor) -> None:
        """Add the log-probabilities of the prompt tokens that these rows predict."""
        request = sequence.request
        if request.prompt_logprobs is None:
            request.prompt_logprobs = [None]
        start = sequence.num_computed_tokens + 1  # the first row predicts this token
        known = len(request.prompt_logprobs)  # more than `start` when a preempted sample is computed again
        targets = request.prompt_ids[known : start + len(hidden)]
        if targets and known >= start:
            scores = reported_logprobs(self.backend.logits(hidden[known - start :][: len(targets)]), [sequence])
            request.prompt_logprobs += scores[range(len(targets)), targets].tolist()


def _step_tokens(sequence: Sequence, count: int) -> list[int]:
    start = sequence.num_computed_tokens
    drafts = sequence.drafts if count == sequence.num_pending_tokens else []
    return sequence.token_ids[start : start + count] + drafts


def _is_plain(sequence: Sequence) -> bool:
    params = sequence.request.params
    return params.is_plain and sequence.num_output_tokens >= params.min_tokens


def _rows_to_sample(rows: list[tuple[Sequence, int]]) -> list[int]:
    """The given row of each sequence, and one for each of its drafts."""
    return [row + i for sequence, row in rows for i in range(len(sequence.drafts) + 1)]
