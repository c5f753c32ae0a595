"""The flat row of tokens that one step computes, for many sequences at once.

S sequences, N tokens (rows) of all of them, one sequence after the other, B blocks of all of them, M blocks of the
longest table.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from glm45.engine.request import Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens, where they stand, and where their keys and values go. Every array is int32."""

    tokens_N: np.ndarray
    """Token ids."""
    positions_N: np.ndarray
    """Position of each token in its sequence: what RoPE sees."""
    slots_N: np.ndarray
    """Place of each row's keys and values in its sequence's table. The rows of a sequence are consecutive slots, and
    a row attends to its own slot and to every earlier one."""
    starts_S1: np.ndarray
    """First row of each sequence, and N at the end."""
    blocks_B: np.ndarray
    """The blocks of every sequence, one table after the other."""
    block_starts_S1: np.ndarray
    """First entry of each sequence's table in `blocks_B`, and B at the end."""
    first_slot: int = 0
    """Slots before this one hold nothing: 0 for the main layers, 1 for the MTP layer (see `speculative`)."""

    @classmethod
    def of(
        cls,
        sequences: Iterable[Sequence],
        tokens: list[list[int]],
        first_slots: list[int],
        position_shift: int = 0,
        first_slot: int = 0,
    ) -> "Batch":
        """Lay out the given tokens of each sequence from its first slot on; positions are slots plus the shift."""
        blocks, block_counts = array("i"), [0]
        for sequence in sequences:
            blocks.extend(sequence.table.blocks)
            block_counts.append(len(blocks))
        counts = [len(row) for row in tokens]
        starts_S1 = np.array([0, *accumulate(counts)], np.int32)
        slots_N = np.array(first_slots, np.int32)
        if len(slots_N) != starts_S1[-1]:
            slots_N = np.repeat(slots_N - starts_S1[:-1], counts) + np.arange(starts_S1[-1], dtype=np.int32)
        return cls(
            tokens_N=np.array([token for row in tokens for token in row], np.int32),
            positions_N=slots_N + np.int32(position_shift) if position_shift else slots_N,
            slots_N=slots_N,
            starts_S1=starts_S1,
            blocks_B=np.frombuffer(blocks, np.int32),
            block_starts_S1=np.array(block_counts, np.int32),
            first_slot=first_slot,
        )

    def following(self, chosen: list[int], tokens: list[int]) -> "Batch":
        """Return one row more for some sequences: a token each, in the slot after its last one."""
        last = self.starts_S1[1:][chosen] - 1
        bounds = self.block_starts_S1
        tables = [self.blocks_B[bounds[i] : bounds[i + 1]] for i in chosen]
        return Batch(
            tokens_N=np.array(tokens, np.int32),
            positions_N=self.positions_N[last] + np.int32(1),
            slots_N=self.slots_N[last] + np.int32(1),
            starts_S1=np.arange(len(chosen) + 1, dtype=np.int32),
            blocks_B=np.concatenate(tables),
            block_starts_S1=np.array([0, *accumulate(map(len, tables))], np.int32),
            first_slot=self.first_slot,
        )

    @property
    def sequence_of_row(self) -> np.ndarray:
        """Index of each row's sequence."""
        counts_S = np.diff(self.starts_S1)
        return np.repeat(np.arange(len(counts_S), dtype=np.int32), counts_S)

    @property
    def tables(self) -> np.ndarray:
        """The tables as rows of one array, padded with block 0."""
        counts_S = np.diff(self.block_starts_S1)
        tables_SM = np.zeros((len(counts_S), int(counts_S.max())), np.int64)
        tables_SM[np.arange(tables_SM.shape[1]) < counts_S[:, None]] = self.blocks_B
        return tables_SM
