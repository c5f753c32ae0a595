"""Speculative decoding: the MTP layer drafts, the model verifies, and rejection sampling keeps the distribution.

The MTP layer's row for the hidden state of position i and the token at i + 1 is stored at slot i + 1 of the sequence's
blocks, so that a full block's contents depend on the tokens up to its end and nothing else, and prefix caching holds
for it too. Slot 0 stays empty. The report trains one MTP layer (section 2.1); how many drafts it makes is a choice at
inference, and beyond the first it is applied to its own output.

S sequences, R rows, V vocabulary, k drafts.
"""

from dataclasses import dataclass

import numpy as np
import torch

from glm45.engine.backend import Backend
from glm45.engine.batch import Batch
from glm45.engine.request import Sequence
from glm45.engine.sampling import (
    ACCEPT_STREAM,
    DRAFT_STREAM,
    TOKEN_STREAM,
    distribution,
    draw,
    shape_logits,
    uniforms,
)


@dataclass(slots=True)
class DraftState:
    """How far the MTP layer's cache has followed a sequence."""

    next_slot: int
    """First slot of the MTP layer that is not written yet."""
    carried: torch.Tensor | None = None
    """Hidden state of the token before `next_slot`, if its row is still to be run."""


class Drafter:
    """Keeps the MTP layer's cache in step with the model's and proposes the next tokens."""

    def __init__(
        self, backend: Backend, num_drafts: int, *, num_blocks: int, block_size: int, hidden_size: int
    ) -> None:
        self.num_drafts = num_drafts
        self._backend = backend
        self._block_size = block_size
        # The state of each block's last token: where a prefix is taken from the cache, the MTP layer goes on from it.
        self._block_ends = torch.zeros(num_blocks, hidden_size)

    def begin(self, sequences: list[Sequence], batch: Batch, hidden: torch.Tensor) -> None:
        """Take note of a forward pass, before its tokens are sampled."""
        ends = np.flatnonzero((batch.slots_N + 1) % self._block_size == 0)
        if len(ends):
            sequence_of_end = batch.sequence_of_row[ends]
            places = batch.block_starts_S1[sequence_of_end] + batch.slots_N[ends] // self._block_size
            self._block_ends[batch.blocks_B[places].astype(np.int64)] = hidden[ends].float().cpu()
        for sequence, row in zip(sequences, batch.starts_S1[:-1].tolist(), strict=True):
            first = int(batch.slots_N[row])
            if sequence.draft_state is None:
                carried = self._block_ends[sequence.table.blocks[first // self._block_size - 1]] if first else None
                sequence.draft_state = DraftState(first if first else 1, carried)

    def follow(self, sequence: Sequence, hidden_D: torch.Tensor) -> None:
        """Start a forked sequence: its prompt is computed and ended with this hidden state."""
        sequence.draft_state = DraftState(sequence.num_computed_tokens, hidden_D.clone())

    def draft(self, spans: list[tuple[Sequence, int, int]], hidden: torch.Tensor) -> None:
        """Run the MTP layer over what each sequence has computed, then propose drafts to those that decode.

        A span is a sequence, its first row of `hidden` and how many of its rows hold.
        """
        tokens, first_slots, states = [], [], []
        for sequence, row, count in spans:
            state: DraftState = sequence.draft_state
            rows = hidden[row : row + count]
            if state.carried is not None:
                rows = torch.cat([state.carried[None].to(rows), rows])
                state.carried = None
            first_slots.append(state.next_slot)
            tokens.append(sequence.token_ids[state.next_slot : state.next_slot + len(rows)])
            state.next_slot += len(rows)
            assert len(tokens[-1]) == len(rows), "a hidden state has no next token yet"
            states.append(rows)
        sequences = [sequence for sequence, _, _ in spans]
        batch = Batch.of(sequences, tokens, first_slots, position_shift=-1, first_slot=1)
        drafted = self._backend.draft(batch, torch.cat(states))
        last = (batch.starts_S1[1:] - 1).tolist()
        chosen = [(s, row) for s, row in zip(sequences, last, strict=True) if self._may_draft(s)]
        if chosen:
            self._propose([s for s, _ in chosen], drafted[[row for _, row in chosen]].clone())

    def _may_draft(self, sequence: Sequence) -> bool:
        remaining = sequence.request.params.max_tokens - sequence.num_output_tokens
        # Not the first token: forked samples start there without a draft, and all samples shall be treated alike. Not
        # under a grammar: it would have to be asked, and rolled back, for every draft.
        started = sequence.num_output_tokens > 1 and sequence.num_pending_tokens == 1 and not sequence.drafts
        return started and sequence.matcher is None and remaining > 1

    def _propose(self, sequences: list[Sequence], hidden: torch.Tensor) -> None:
        probs = []
        for step in range(self.num_drafts):
            logits_SV = self._backend.logits(hidden).clone()
            shape_logits(logits_SV, sequences, [step] * len(sequences))
            probs_SV = distribution(logits_SV, sequences)
            seeds_S, counters_S = counters(sequences, [step] * len(sequences))
            tokens_S = draw(probs_SV, uniforms(seeds_S, counters_S, DRAFT_STREAM)).tolist()
            probs.append(probs_SV)
            for sequence, token in zip(sequences, tokens_S, strict=True):
                sequence.drafts.append(token)
            if step + 1 < self.num_drafts:
                slots = [len(sequence.token_ids) + step for sequence in sequences]
                batch = Batch.of(sequences, [[token] for token in tokens_S], slots, position_shift=-1, first_slot=1)
                hidden = self._backend.draft(batch, hidden).clone()
        for i, sequence in enumerate(sequences):
            sequence.draft_probs = torch.stack([probs_SV[i] for probs_SV in probs])


def counters(sequences: list[Sequence], ahead: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return seeds and positions for `uniforms`: `ahead` counts from each sequence's next token."""
    seeds = np.array([sequence.seed for sequence in sequences], np.uint64)
    positions = [sequence.num_output_tokens + i for sequence, i in zip(sequences, ahead, strict=True)]
    return seeds, np.array(positions, np.uint64)


def verify(sequences: list[Sequence], probs_RV: torch.Tensor) -> list[list[int]]:
    """Return the tokens that each sequence gets: accepted drafts, and one token drawn after them.

    `probs_RV` holds, for each sequence in turn, the distribution after its last token and after each of its drafts. A
    draft is accepted with probability min(1, target / draft); the first refused one is replaced by a draw from what
    the target has in excess of the draft (Leviathan et al. 2211.17192), so tokens are distributed as without drafts.
    """
    counts = [len(sequence.drafts) for sequence in sequences]
    first_rows = np.cumsum([0, *[count + 1 for count in counts]])[:-1].tolist()
    owners = [s for s, count in zip(sequences, counts, strict=True) for _ in range(count)]
    ahead = [i for count in counts for i in range(count)]
    drafts = torch.tensor([token for sequence in sequences for token in sequence.drafts], device=probs_RV.device)
    rows = [first + i for first, count in zip(first_rows, counts, strict=True) for i in range(count)]
    draft_probs = torch.cat([sequence.draft_probs for sequence in sequences])
    target = probs_RV[rows].gather(1, drafts[:, None])[:, 0].double().cpu().numpy()
    proposed = draft_probs.gather(1, drafts[:, None])[:, 0].double().cpu().numpy()
    accepted = iter((uniforms(*counters(owners, ahead), ACCEPT_STREAM) * proposed < target).tolist())

    kept, final_rows = [], []
    offset = 0
    for first, count in zip(first_rows, counts, strict=True):
        flags = [next(accepted) for _ in range(count)]
        num_kept = flags.index(False) if False in flags else count
        row = probs_RV[first + num_kept]
        if num_kept < count:
            excess = (row - draft_probs[offset + num_kept]).clamp(min=0)
            row = torch.where(excess.sum() > 0, excess, row)  # rounding may leave nothing of equal distributions
        kept.append(num_kept)
        final_rows.append(row)
        offset += count
    last = draw(torch.stack(final_rows), uniforms(*counters(sequences, kept), TOKEN_STREAM)).tolist()
    return [[*s.drafts[:num], token] for s, num, token in zip(sequences, kept, last, strict=True)]
