"""Speculative decoding: the MTP layer drafts, the model verifies, and rejection sampling keeps the distribution.

The MTP layer's row for the hidden state of position i and the token at i + 1 is stored at slot i + 1 of the sequence's
blocks, so that a full block's contents depend on the tokens up to its end and nothing else, and prefix caching holds
for it too. Slot 0 stays empty. The report trains one MTP layer (section 2.1); how many drafts it makes is a choice at
inference, and beyond the first it is applied to its own output. Temperature alone shapes the distribution of drafts:
what else a request asks for is seen to when they are verified.
"""

from dataclasses import dataclass

import numpy as np
import torch

from glm45.engine.backend import Backend
from glm45.engine.batch import Batch
from glm45.engine.request import Sequence
from glm45.engine.sampling import Draws


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
        tokens, first_slots, rows = [], [], []
        carried: list[torch.Tensor] = []
        for sequence, row, count in spans:
            state: DraftState = sequence.draft_state
            held = list(range(row, row + count))
            if state.carried is not None:
                held.insert(0, len(hidden) + len(carried))
                carried.append(state.carried.to(hidden))
                state.carried = None
            rows += held
            first_slots.append(state.next_slot)
            tokens.append(sequence.token_ids[state.next_slot : state.next_slot + len(held)])
            state.next_slot += len(held)
            assert len(tokens[-1]) == len(held), "a hidden state has no next token yet"
        sequences = [sequence for sequence, _, _ in spans]
        batch = Batch.of(sequences, tokens, first_slots, position_shift=-1, first_slot=1)
        states = pick(torch.cat([hidden, torch.stack(carried)]) if carried else hidden, rows)
        chosen = [i for i, sequence in enumerate(sequences) if _may_draft(sequence)]
        drafting = [sequences[i] for i in chosen]
        drafts, probs = self._backend.draft(batch, states, chosen, Draws.of(drafting), self.num_drafts)
        for i, sequence in enumerate(drafting):
            sequence.drafts, sequence.draft_probs = drafts[i], probs[i]


def pick(hidden: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Return some rows, without a copy where all of them are wanted in order (decoding)."""
    return hidden if len(rows) == len(hidden) and rows == list(range(len(hidden))) else hidden[rows]


def _may_draft(sequence: Sequence) -> bool:
    remaining = sequence.request.params.max_tokens - sequence.num_output_tokens
    # Not the first token: forked samples start there without a draft, and all samples shall be treated alike. Not
    # under a grammar: it would have to be asked, and rolled back, for every draft.
    started = sequence.num_output_tokens > 1 and sequence.num_pending_tokens == 1 and not sequence.drafts
    return started and sequence.matcher is None and remaining > 1
