"""What to compute next: which sequences, how many tokens of each. Knows no tensors.

Continuous batching: every step first gives each decoding sequence its token (and its drafts), then spends what is
left of the token budget on prompts, in chunks. When blocks run out, the youngest sequence is preempted: its blocks
are given up and its tokens are computed again later.
"""

from collections import deque
from dataclasses import dataclass, field

from glm45.engine.blocks import BlockManager
from glm45.engine.request import FinishReason, Request, Sequence


@dataclass(slots=True)
class Plan:
    """One step's work."""

    work: list[tuple[Sequence, int]] = field(default_factory=list)
    """Sequences with the number of tokens to compute, drafts not counted; those that decode come first."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Blocks to copy (from, to) before anything is computed: copy-on-write of forked sequences."""


class FairQueue:
    """First come, first served within an owner; among owners, whoever has been given the fewest tokens is next.

    An owner who comes late starts at the level of those being served, so that idling earns no credit.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Sequence]] = {}
        self._served: dict[str, int] = {}
        self._level = 0

    def __len__(self) -> int:
        return sum(len(waiting) for waiting in self._waiting.values())

    def push(self, sequence: Sequence, front: bool = False) -> None:
        """Add a sequence at the end of its owner's line, or at its front."""
        owner = sequence.request.owner
        if owner not in self._waiting:
            self._waiting[owner] = deque()
            self._served[owner] = max(self._served.get(owner, 0), self._level)
        line = self._waiting[owner]
        (line.appendleft if front else line.append)(sequence)

    def peek(self) -> Sequence | None:
        """Return the next sequence, or None."""
        if not self._waiting:
            return None
        return self._waiting[min(self._waiting, key=self._served.__getitem__)][0]

    def pop(self) -> Sequence:
        """Take the sequence that `peek` shows."""
        sequence = self.peek()
        assert sequence is not None
        owner = sequence.request.owner
        self._level = max(self._level, self._served[owner])
        self._waiting[owner].popleft()
        self._forget(owner)
        return sequence

    def charge(self, owner: str, num_tokens: int) -> None:
        """Count tokens computed for an owner."""
        self._served[owner] = self._served.get(owner, self._level) + num_tokens

    def remove(self, request: Request) -> list[Sequence]:
        """Take out every sequence of a request."""
        line = self._waiting.get(request.owner, deque())
        removed = [sequence for sequence in line if sequence.request is request]
        for sequence in removed:
            line.remove(sequence)
        if removed:
            self._forget(request.owner)
        return removed

    def _forget(self, owner: str) -> None:
        if not self._waiting[owner]:
            del self._waiting[owner]
            if len(self._served) > 1024:  # owners come and go: keep those above the level, who still owe
                self._served = {
                    name: served
                    for name, served in self._served.items()
                    if served > self._level or name in self._waiting
                }


class Scheduler:
    """Holds every sequence from `add` to `finish`, and plans steps."""

    def __init__(
        self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int, lookahead: int = 0
    ) -> None:
        if max_num_batched_tokens < max_num_seqs * (1 + lookahead):
            raise ValueError(
                f"max_num_batched_tokens {max_num_batched_tokens} is too small for max_num_seqs {max_num_seqs}: each "
                f"decoding sequence needs {1 + lookahead} a step; raise the first or lower the second"
            )
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.lookahead = lookahead  # slots that drafting may write to, beyond the tokens of a step
        self.running: list[Sequence] = []
        self.waiting = FairQueue()
        self.num_preemptions = 0
        self._siblings: dict[str, list[Sequence]] = {}

    @property
    def has_work(self) -> bool:
        """Whether anything is waiting or running."""
        return bool(self.running) or len(self.waiting) > 0

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a place, siblings of an unfinished prefill included."""
        return len(self.waiting) + sum(len(siblings) for siblings in self._siblings.values())

    def add(self, sequences: list[Sequence]) -> None:
        """Queue the samples of one request: the first is prefilled, the others are forked from it."""
        first, *siblings = sequences
        self.waiting.push(first)
        if siblings:
            self._siblings[first.request.id] = siblings

    def schedule(self, admit: bool = True) -> Plan:
        """Plan a step and reserve its blocks. `admit=False` starts no new sequence."""
        plan = Plan()
        budget = self.max_num_batched_tokens
        num_preempted = self.num_preemptions
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running:
            (prefilling if sequence.num_pending_tokens > 1 else decoding).append(sequence)
        for sequence in decoding + prefilling:
            num_tokens = self._chunk(sequence, budget)
            # Whoever was preempted by an earlier one has no blocks any more.
            if num_tokens and sequence.table.blocks and self._reserve(sequence, num_tokens, plan):
                plan.work.append((sequence, num_tokens))
                budget -= num_tokens + len(sequence.drafts)
        if admit and self.num_preemptions == num_preempted:
            self._admit(plan, budget)
        for sequence, num_tokens in plan.work:
            self.waiting.charge(sequence.request.owner, num_tokens)
        return plan

    def fork(self, parent: Sequence) -> list[Sequence]:
        """Return the parent's siblings that start now, sharing its blocks: its prompt is computed.

        Siblings for which there is no place go to the front of the queue.
        """
        siblings = self._siblings.pop(parent.request.id, [])
        places = max(self.max_num_seqs - len(self.running), 0)
        for sibling in siblings[:places]:
            sibling.table = self.blocks.fork(parent.table)
            sibling.num_computed_tokens = parent.num_computed_tokens
            sibling.num_cached_tokens = parent.num_computed_tokens
            self.running.append(sibling)
        for sibling in reversed(siblings[places:]):
            self.waiting.push(sibling, front=True)
        return siblings[:places]

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Take a running sequence out and give up its blocks at once."""
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        self.running.remove(sequence)
        self.blocks.release(sequence.table)

    def abort(self, request: Request) -> list[Sequence]:
        """Take out every sequence of a request, wherever it is, and return them."""
        running = [sequence for sequence in self.running if sequence.request is request]
        for sequence in running:
            self.finish(sequence, "abort")
        others = self.waiting.remove(request) + self._siblings.pop(request.id, [])
        for sequence in others:
            sequence.finish_reason = "abort"
        return running + others

    def preempt(self, sequence: Sequence) -> None:
        """Put a running sequence back to the front of the queue; its tokens will be computed again."""
        self.num_preemptions += 1
        self.running.remove(sequence)
        self.blocks.release(sequence.table)
        sequence.num_computed_tokens = 0
        sequence.draft_state = None
        self.waiting.push(sequence, front=True)

    @staticmethod
    def _chunk(sequence: Sequence, budget: int) -> int:
        """How many pending tokens fit; the last of them only together with the drafts that are verified after it.

        Drafts are never given up, not even in preemption: with the same drafts a seed gives the same output.
        """
        num_pending = sequence.num_pending_tokens
        if num_pending + len(sequence.drafts) <= budget:
            return num_pending
        return min(num_pending - 1, max(budget, 0)) if num_pending <= budget else max(budget, 0)

    def _reserve(self, sequence: Sequence, num_tokens: int, plan: Plan) -> bool:
        """Make room for the sequence's next tokens, preempting the youngest others if need be."""
        first_new = sequence.num_computed_tokens
        num_total = first_new + num_tokens + len(sequence.drafts) + self.lookahead
        while True:
            copies = self.blocks.grow(sequence.table, num_total, first_new)
            if copies is not None:
                plan.copies += copies
                return True
            victim = self.running[-1]
            planned = next((i for i, (planned, _) in enumerate(plan.work) if planned is victim), None)
            if planned is not None:
                del plan.work[planned]
                # Its fresh copies may be handed out again in this very step: a stale copy must not overwrite them.
                plan.copies = [(source, target) for source, target in plan.copies if target not in victim.table.blocks]
            self.preempt(victim)
            if victim is sequence:
                return False

    def _admit(self, plan: Plan, budget: int) -> None:
        while budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting.peek()
            if sequence is None:
                return
            table = self.blocks.match([] if sequence.request.is_to_be_scored else sequence.token_ids)
            sequence.num_computed_tokens = len(table.blocks) * self.blocks.block_size
            num_tokens = self._chunk(sequence, budget)
            num_whole = len(sequence.token_ids) + len(sequence.drafts) + 1 + self.lookahead
            if not num_tokens or self.blocks.blocks_for(num_whole) - len(table.blocks) > self.blocks.num_available:
                self.blocks.release(table)
                sequence.num_computed_tokens = 0
                return
            self.waiting.pop()
            sequence.table = table
            if not sequence.num_output_tokens:
                sequence.num_cached_tokens = sequence.num_computed_tokens
            num_total = sequence.num_computed_tokens + num_tokens + len(sequence.drafts) + self.lookahead
            copies = self.blocks.grow(table, num_total, sequence.num_computed_tokens)
            assert copies == [], "a fresh sequence writes to no shared block"
            self.running.append(sequence)
            plan.work.append((sequence, num_tokens))
            budget -= num_tokens + len(sequence.drafts)
