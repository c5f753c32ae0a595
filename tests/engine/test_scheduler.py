"""Every request ends, budgets hold, owners are served fairly, and siblings share one prefill."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45.engine.blocks import BlockManager
from glm45.engine.request import Request, SamplingParams, Sequence
from glm45.engine.scheduler import FairQueue, Scheduler


def sequences_of(name, prompt, n=1, max_tokens=4, owner=""):
    params = SamplingParams(n=n, max_tokens=max_tokens)
    request = Request(name, prompt, params, owner=owner)
    return [Sequence.of(request, i, 0) for i in range(n)]


def run_step(scheduler, plan):
    """Do what the engine does after a step, with token 1 for every answer."""
    ended = []
    for sequence, count in plan.work:
        sequence.num_computed_tokens += count
        scheduler.blocks.commit(sequence.table, sequence.token_ids, sequence.num_computed_tokens)
    for sequence, _ in list(plan.work):
        if sequence.num_pending_tokens == 0:
            children = [] if sequence.num_output_tokens else scheduler.fork(sequence)
            for one in [sequence, *children]:
                one.token_ids.append(1)
                if one.num_output_tokens == one.request.params.max_tokens:
                    ended.append(one)
    for sequence in ended:
        scheduler.finish(sequence, "length")


request_shapes = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 5), st.integers(1, 9), st.sampled_from("abc")), min_size=1, max_size=9
)


@settings(max_examples=80, deadline=None)
@given(request_shapes, st.integers(11, 24), st.integers(1, 5), st.integers(5, 16), st.sampled_from([1, 2, 4]))
def test_every_request_ends_within_budget_and_leaves_no_block(shapes, num_blocks, max_seqs, budget, block_size):
    blocks = BlockManager(num_blocks * 4 // block_size, block_size)
    scheduler = Scheduler(blocks, max_num_seqs=max_seqs, max_num_batched_tokens=budget)
    everything = []
    for i, (length, n, max_tokens, owner) in enumerate(shapes):
        everything += (samples := sequences_of(str(i), [i % 2] * length, n, max_tokens, owner))
        scheduler.add(samples)
    for _ in range(3000):
        if not scheduler.has_work:
            break
        plan = scheduler.schedule()
        assert plan.work, "work is waiting and nothing was planned"
        assert sum(count for _, count in plan.work) <= budget
        assert len({id(sequence) for sequence, _ in plan.work}) == len(plan.work) <= max_seqs
        run_step(scheduler, plan)
        blocks.check([sequence.table for sequence in everything])
    assert [s.finish_reason for s in everything] == ["length"] * len(everything)
    assert blocks.num_in_use == 0


def test_decoding_goes_before_prompts_and_prompts_come_in_chunks():
    scheduler = Scheduler(BlockManager(64, 4), max_num_seqs=4, max_num_batched_tokens=8)
    scheduler.add(sequences_of("a", [0] * 3))
    run_step(scheduler, scheduler.schedule())
    scheduler.add(sequences_of("b", [2] * 20))
    counts = []
    for _ in range(3):
        plan = scheduler.schedule()
        counts.append([(sequence.request.id, count) for sequence, count in plan.work])
        run_step(scheduler, plan)
    assert counts == [[("a", 1), ("b", 7)], [("a", 1), ("b", 7)], [("a", 1), ("b", 6)]]


def test_samples_of_a_prompt_are_one_prefill_and_forks():
    scheduler = Scheduler(BlockManager(64, 4), max_num_seqs=8, max_num_batched_tokens=64)
    scheduler.add(sequences_of("a", [0] * 10, n=4))
    plan = scheduler.schedule()
    assert [count for _, count in plan.work] == [10]
    run_step(scheduler, plan)
    assert [count for _, count in scheduler.schedule().work] == [1, 1, 1, 1]
    assert scheduler.blocks.num_in_use == 2 + 4  # two full blocks shared, a last one for each


def test_the_youngest_is_preempted_and_comes_back():
    blocks = BlockManager(4, 2)
    scheduler = Scheduler(blocks, max_num_seqs=2, max_num_batched_tokens=16)
    old, young = sequences_of("a", [0, 1], max_tokens=5) + sequences_of("b", [2, 3], max_tokens=5)
    scheduler.add([old])
    scheduler.add([young])
    while scheduler.has_work:
        run_step(scheduler, scheduler.schedule())
        assert old.finish_reason or old in scheduler.running
    assert scheduler.num_preemptions >= 1
    assert young.num_output_tokens == 5


def test_owners_share_by_tokens_and_idling_earns_no_credit():
    queue = FairQueue()
    for i in range(3):
        for sequence in sequences_of(f"a{i}", [0], owner="a"):
            queue.push(sequence)
    order = []
    for _ in range(2):
        order.append(queue.pop().request.id)
        queue.charge("a", 100)
    for i in range(3):
        queue.push(sequences_of(f"b{i}", [0], owner="b")[0])
    while len(queue):
        sequence = queue.pop()
        order.append(sequence.request.id)
        queue.charge(sequence.request.owner, 60)
    assert order == ["a0", "a1", "b0", "b1", "a2", "b2"]


def test_abort_reaches_running_waiting_and_unforked_samples():
    scheduler = Scheduler(BlockManager(64, 4), max_num_seqs=1, max_num_batched_tokens=4)
    running, waiting = sequences_of("a", [0] * 9, n=3), sequences_of("b", [1])
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.schedule()
    assert {s.index for s in scheduler.abort(running[0].request)} == {0, 1, 2}
    assert scheduler.abort(waiting[0].request) == waiting
    assert not scheduler.has_work
    assert scheduler.num_waiting == scheduler.blocks.num_in_use == 0


@pytest.mark.parametrize(
    ("room", "unknown"), [("scheduler", ("torch", "numpy")), ("native", ("glm45.text", "tokenizers"))]
)
def test_the_scheduler_knows_no_tensors_and_the_cache_no_text(room, unknown):
    """Whatever a room imports, at any remove."""
    program = f"import sys, glm45.engine.{room}; sys.exit(any(m.startswith({unknown}) for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_budget_below_one_token_a_sequence_is_refused():
    with pytest.raises(ValueError, match="max_num_batched_tokens 4 is too small for max_num_seqs 5"):
        Scheduler(BlockManager(8, 4), max_num_seqs=5, max_num_batched_tokens=4)
