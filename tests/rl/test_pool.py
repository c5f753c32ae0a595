"""The pool: order by seed alone, every group's fate counted, staleness bounded, and all of it in the checkpoint."""

import json

import pytest

from glm45.environments.arithmetic import arithmetic_tasks
from glm45.environments.protocol import Reward, assistant
from glm45.rl.pool import Pool
from glm45.rl.sample import Sample

TASKS = list(arithmetic_tasks(1, 10))


def make_group(group_id, task, version=0):
    group = []
    for index in range(2):
        sample = Sample(task=task, group_id=group_id, index=index)
        sample.append_context([1], task.messages)
        sample.append_generated([2], [-1.0], assistant("3"), version, truncated=False)
        sample.judge(Reward(float(index)))
        group.append(sample)
    return group


def test_every_epoch_has_every_prompt_once_and_depends_on_the_seed_alone():
    first, second, other = Pool(TASKS, 5), Pool(TASKS[::-1], 5), Pool(TASKS, 6)
    order = [first.begin()[1].task_id for _ in range(20)]
    assert [second.begin()[1].task_id for _ in range(20)] == order
    assert [other.begin()[1].task_id for _ in range(20)] != order
    assert sorted(order[:10]) == sorted(order[10:]) == sorted(task.task_id for task in TASKS)
    assert order[:10] != order[10:]


def test_groups_leave_flight_once_and_are_counted():
    pool = Pool(TASKS, 5)
    groups = [pool.begin() for _ in range(3)]
    pool.land(make_group(*groups[0]))
    pool.drop(groups[1][0], "uninformative")
    pool.give_back(groups[2][0])
    assert pool.num_in_flight == 0
    with pytest.raises(ValueError, match="not in flight"):
        pool.drop(groups[0][0], "failed")
    assert pool.begin()[1] == groups[2][1]
    assert pool.counts == {"begun": 4, "landed": 1, "dropped_uninformative": 1, "given_back": 1}


def test_stale_groups_are_not_learnt_from_and_their_prompts_come_again():
    pool = Pool(TASKS, 5, max_staleness=1)
    (old_id, old), (new_id, new) = pool.begin(), pool.begin()
    pool.land(make_group(old_id, old, version=3))
    pool.land(make_group(new_id, new, version=4))
    taken = pool.take(2, weight_version=5)
    assert [group[0].group_id for group in taken] == [new_id]
    assert pool.counts["stale"] == 1
    assert pool.begin()[1] == old


def test_groups_that_are_too_old_are_not_counted_on():
    """Or an update would be short of as many groups as the last step made too many."""
    pool = Pool(TASKS, 5)
    for group_id, task in (pool.begin(), pool.begin(), pool.begin()):
        pool.land(make_group(group_id, task, version=0))
    assert len(pool.take(2, weight_version=0)) == 2
    assert pool.num_landed == 1
    pool.expire(weight_version=1)
    assert pool.num_landed == 0
    assert pool.counts["stale"] == 1


def test_what_is_not_taken_waits():
    pool = Pool(TASKS, 5)
    for _ in range(3):
        pool.land(make_group(*pool.begin()))
    assert [group[0].group_id for group in pool.take(2, 0)] == [0, 1]
    assert pool.num_landed == 1


def test_a_restored_pool_goes_on_as_if_nothing_had_happened():
    pool = Pool(TASKS, 5)
    pool.land(make_group(*pool.begin()))
    waiting = pool.begin()[1]  # in flight when the run is killed
    state = json.loads(json.dumps(pool.state_dict()))
    again = Pool(TASKS, 5)
    again.load_state_dict(state)
    assert again.begin()[1] == waiting
    later = [pool.begin()[1].task_id for _ in range(15)]
    assert [again.begin()[1].task_id for _ in range(15)] == later
    assert again.take(1, 0) == pool.take(1, 0)
    with pytest.raises(ValueError, match="prompts that are not here"):
        Pool(TASKS[:1], 5).load_state_dict({**state, "waiting": [TASKS[5].task_id]})


def test_a_pool_needs_distinct_tasks():
    with pytest.raises(ValueError, match="ids of their own"):
        Pool([*TASKS, TASKS[0]], 5)


def test_the_next_stage_has_other_prompts_and_goes_on_counting():
    pool = Pool(TASKS[:5], 5)
    pool.land(make_group(*pool.begin()))
    pool.drop(pool.begin()[0], "uninformative")
    pool.enter_stage(TASKS[5:], 6)
    assert pool.num_landed == 0
    begun = [pool.begin() for _ in range(5)]
    assert [group_id for group_id, _ in begun] == [2, 3, 4, 5, 6]
    fresh = Pool(TASKS[5:], 6)
    assert [task for _, task in begun] == [fresh.begin()[1] for _ in range(5)]
    assert pool.counts == {"begun": 7, "landed": 1, "dropped_uninformative": 1, "dropped_stage": 1}
