"""The engine without threads: what one step does, and what requests and weights go through between steps.

One thread owns a core (see `engine`), so that nothing here needs a lock.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from glm45.engine.blocks import BlockManager
from glm45.engine.request import Completion, Delta, FinishReason, Request, Sequence
from glm45.engine.runner import Runner, Sampled
from glm45.engine.scheduler import Scheduler

Result = list[Completion] | BaseException


@dataclass(eq=False, slots=True)
class Job:
    """A request with whoever waits for it."""

    request: Request
    sequences: list[Sequence]
    done: Callable[[Result], None]
    """Called once, with every completion or with what went wrong."""
    deltas: Callable[[Delta], None] | None = None
    """Called with each piece, for a stream."""
    num_finished: int = 0


@dataclass(slots=True)
class Totals:
    """Counted since the start."""

    steps: int = 0
    requests: int = 0
    aborted_requests: int = 0
    prompt_tokens: int = 0
    """Of prompts computed or found in the prefix cache, once for all samples of a request."""
    cached_tokens: int = 0
    """Of those, found in the prefix cache."""
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    """Drafts that verification kept."""
    errors: int = 0
    """Steps that failed; their requests got the exception."""


class Core:
    """Sequences, blocks and the runner, and the steps that move them on."""

    def __init__(self, scheduler: Scheduler, runner: Runner, max_length: int) -> None:
        self.scheduler = scheduler
        self.blocks: BlockManager = scheduler.blocks
        self.runner = runner
        self.max_length = max_length
        self.weight_version = 0
        self.jobs: dict[str, Job] = {}
        self.totals = Totals()

    def add(self, job: Job) -> None:
        """Queue a request."""
        self.jobs[job.request.id] = job
        self.scheduler.add(job.sequences)
        self.totals.requests += 1

    def abort(self, request_id: str) -> None:
        """End a request where it stands; its samples finish with reason `abort`."""
        job = self.jobs.get(request_id)
        if job is not None:
            self.totals.aborted_requests += 1
            for sequence in self.scheduler.abort(job.request):
                self._report(sequence)

    def recompute(self) -> None:
        """Give up the keys and values of everything that runs; it goes on once they are computed anew."""
        for sequence in reversed(self.scheduler.running[:]):
            self.scheduler.preempt(sequence)

    def new_weights(self, version: int) -> None:
        """The model's weights have changed: forget the prefixes and mark tokens with this version from now on."""
        self.weight_version = version
        self.runner.backend.refresh()
        self.blocks.new_version(version)

    def step(self, admit: bool = True) -> None:
        """Compute one batch. If that fails, every request gets the exception: nobody may wait for ever."""
        self.totals.steps += 1
        try:
            self._step(admit)
        except Exception as error:
            self.totals.errors += 1
            for job in list(self.jobs.values()):
                self.scheduler.abort(job.request)
                self._end(job, error)

    def _step(self, admit: bool) -> None:
        plan = self.scheduler.schedule(admit)
        hidden, first_rows = self.runner.compute(plan)
        ready: list[tuple[Sequence, int]] = []
        for (sequence, count), row in zip(plan.work, first_rows, strict=True):
            if not sequence.num_pending_tokens:
                last = row + count - 1
                ready.append((sequence, last))
                if not sequence.num_output_tokens:
                    ready += [(child, last) for child in self._fork(sequence, hidden[last])]
        for sampled in self.runner.sample(hidden, ready) if ready else []:
            if sampled.sequence.finish_reason is None:  # a sibling that failed just now took the whole request with it
                self._accept(sampled)
        if self.runner.drafter is not None:
            self.runner.draft()
        for sequence, _ in plan.work:
            if sequence.finish_reason is None:
                self._commit(sequence)
        for sequence, _ in ready:
            self._report(sequence)

    def _fork(self, parent: Sequence, hidden_D: torch.Tensor) -> list[Sequence]:
        """A prompt is computed: its other samples start from there."""
        if parent.index == 0:  # a sibling that had to wait computes the prompt once more
            self.totals.prompt_tokens += parent.num_prompt_tokens
            self.totals.cached_tokens += parent.num_cached_tokens
        children = self.scheduler.fork(parent)
        if self.runner.drafter is not None:
            for child in children:
                self.runner.drafter.follow(child, hidden_D)
        return children

    def _accept(self, sampled: Sampled) -> None:
        """Append new tokens, up to the first that ends the sample."""
        sequence = sampled.sequence
        if not sampled.token_ids:
            self._fail(sequence.request, "logit_bias, constraint and min_tokens together ban every token")
            return
        if any(logprob != logprob for logprob in sampled.logprobs):
            raise ArithmeticError("the model's logits are not finite: its weights have diverged or were never set")
        num_accepted = len(sampled.token_ids) - 1
        self.totals.drafted_tokens += len(sequence.drafts)
        self.totals.accepted_tokens += num_accepted
        sequence.drafts = []
        sequence.num_computed_tokens += num_accepted
        for i, token in enumerate(sampled.token_ids):
            sequence.token_ids.append(token)
            sequence.logprobs.append(sampled.logprobs[i])
            sequence.weight_versions.append(self.weight_version)
            if sampled.top_logprobs:
                sequence.top_logprobs.append(sampled.top_logprobs[i])
            self.totals.generated_tokens += 1
            if self._ends(sequence, token):
                return

    def _ends(self, sequence: Sequence, token: int) -> bool:
        """Finish the sequence if its newest token ends it."""
        params = sequence.request.params
        num_output = sequence.num_output_tokens
        long_enough = num_output >= params.min_tokens
        if sequence.matcher is not None:
            sequence.matcher.accept(token)
        if token in sequence.request.stop_ids and long_enough:
            self._finish(sequence, "stop", token)
        elif sequence.text is not None and sequence.text.append(token, long_enough):
            self._finish(sequence, "stop", sequence.text.stopped_by)
        elif num_output >= params.max_tokens or len(sequence.token_ids) >= self.max_length:
            self._finish(sequence, "length", None)
        return sequence.finish_reason is not None

    def _finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None) -> None:
        self._commit(sequence)
        self.scheduler.finish(sequence, reason, stop_reason)

    def _commit(self, sequence: Sequence) -> None:
        """Let others share what is computed, as far as the MTP layer has followed."""
        num_computed = min(sequence.num_computed_tokens, len(sequence.token_ids))
        if sequence.draft_state is not None:
            num_computed = min(num_computed, sequence.draft_state.next_slot)
        self.blocks.commit(sequence.table, sequence.token_ids, num_computed)

    def _fail(self, request: Request, reason: str) -> None:
        """End a request that cannot go on, and no other."""
        job = self.jobs.get(request.id)
        if job is not None:
            self.scheduler.abort(request)
            self._end(job, ValueError(f"request {request.id}: {reason}"))

    def _report(self, sequence: Sequence) -> None:
        """Hand new tokens to the stream, and the result to whoever waits once every sample has ended."""
        job = self.jobs.get(sequence.request.id)
        finished = sequence.finish_reason is not None
        if job is None or not (finished or job.deltas):
            return
        if finished and sequence.text is not None:
            sequence.text.finish()
        if job.deltas is not None:
            job.deltas(_delta(sequence))
        if finished:
            job.num_finished += 1
            if job.num_finished == len(job.sequences):
                self._end(job, [_completion(one) for one in job.sequences])

    def _end(self, job: Job, result: Result) -> None:
        del self.jobs[job.request.id]
        job.done(result)


def _completion(sequence: Sequence) -> Completion:
    assert sequence.finish_reason is not None
    return Completion(
        index=sequence.index,
        token_ids=sequence.output_ids,
        logprobs=sequence.logprobs,
        weight_versions=sequence.weight_versions,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        text=None if sequence.text is None else sequence.text.text,
        top_logprobs=sequence.top_logprobs,
        prompt_logprobs=sequence.request.prompt_logprobs,
        num_cached_tokens=sequence.num_cached_tokens,
    )


def _delta(sequence: Sequence) -> Delta:
    start, sequence.num_reported = sequence.num_reported, sequence.num_output_tokens
    return Delta(
        index=sequence.index,
        token_ids=sequence.token_ids[sequence.num_prompt_tokens + start :],
        logprobs=sequence.logprobs[start:],
        weight_versions=sequence.weight_versions[start:],
        text=None if sequence.text is None else sequence.text.take(final=sequence.finish_reason is not None),
        top_logprobs=sequence.top_logprobs[start:],
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        prompt_logprobs=sequence.request.prompt_logprobs if start == 0 else None,
        num_cached_tokens=sequence.num_cached_tokens,
    )
