"""Samples: lengths stay aligned, states follow one another, a failure is not a zero, JSON brings everything back."""

import json

import pytest

from glm45.corpus.arithmetic import Problem
from glm45.environments.arithmetic import arithmetic_task
from glm45.environments.protocol import Failure, Reward, assistant, user
from glm45.rl.metrics import is_correct
from glm45.rl.sample import Sample


@pytest.fixture
def sample():
    sample = Sample(task=arithmetic_task(Problem("add", 1, 2)), group_id=4, index=1)
    sample.append_context([1, 2, 3], [user("1+2=?")])
    return sample


def test_tokens_masks_and_logprobs_stay_aligned_over_turns(sample):
    sample.append_generated([7, 8], [-0.5, -0.25], assistant("3"), weight_version=6, truncated=False)
    sample.append_turn([9], [user("sure?")])
    sample.append_generated([7], [-0.125], assistant("yes"), weight_version=5, truncated=True)
    assert sample.tokens == [1, 2, 3, 7, 8, 9, 7]
    assert sample.loss_mask == [False, False, False, True, True, False, True]
    assert sample.rollout_logprobs == [0, 0, 0, -0.5, -0.25, 0, -0.125]
    assert (sample.num_generated, sample.weight_version, sample.status) == (3, 5, "truncated")
    assert sample.response["content"] == "yes"


def test_what_does_not_fit_is_refused(sample):
    with pytest.raises(ValueError, match="2 tokens, 1 logprobs"):
        sample.append_generated([1, 2], [-1.0], assistant(""), 0, truncated=False)
    sample.append_generated([1], [-1.0], assistant(""), 0, truncated=True)
    with pytest.raises(ValueError, match="is truncated: it takes no generated tokens"):
        sample.append_generated([1], [-1.0], assistant(""), 0, truncated=False)
    with pytest.raises(ValueError, match="takes no another turn"):
        sample.append_turn([1], [])


def test_a_failure_leaves_no_reward(sample):
    sample.append_generated([1], [-1.0], assistant("3"), 0, truncated=False)
    sample.judge(Failure("timeout", "slow"))
    assert sample.status == "failed"
    assert sample.reward is None


def test_json_round_trip(sample):
    sample.append_generated([1], [-1.0], assistant("3"), 0, truncated=False)
    sample.judge(Reward(1.0, {"correct": 1.0}))
    sample.add_penalty("format", -0.5)
    again = Sample.from_dict(json.loads(json.dumps(sample.to_dict())))
    assert again == sample
    assert again.reward == 0.5


def test_a_right_answer_stays_right_under_penalties(sample):
    sample.append_generated([1], [-1.0], assistant("3"), 0, truncated=False)
    sample.judge(Reward(1.0, {"num_words": 1.0}))
    sample.add_penalty("format", -0.5)
    assert sample.reward == 0.5
    assert is_correct(sample)
