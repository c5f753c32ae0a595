"""Rejection sampling, prompt selection and response scaling on planted samples."""

import asyncio

import pytest

from glm45.environments.protocol import Failure, Reward, Task, assistant, user
from glm45.posttraining.experts import TrajectoryConfig
from glm45.posttraining.rejection import RejectionConfig, reject
from glm45.posttraining.selection import drop_shorter_prompts, scale_responses
from glm45.posttraining.steps import collect_answers
from glm45.rl.rollout import Sampling
from glm45.rl.sample import Sample


def make_sample(
    task_id="t", response=None, reward=1.0, num_tokens=5, truncated=False, tools=(), domain="arithmetic", first=1
):
    task = Task(task_id=task_id, verifier=domain, messages=[user("?")], answer="4", tools=list(tools))
    sample = Sample(task=task, group_id=0, index=0)
    sample.append_context([1], task.messages)
    tokens = list(range(first, first + num_tokens))
    sample.append_generated(tokens, [-1.0] * num_tokens, response or assistant("4", "2+2"), 0, truncated)
    if isinstance(reward, Failure):
        sample.judge(reward)
    elif reward is not None:
        sample.judge(Reward(reward))
    return sample


TOOL = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def test_every_filter_drops_its_planted_case_and_counts_it():
    planted = {
        "kept": make_sample(),
        "truncated": make_sample(truncated=True),
        "too short": make_sample(num_tokens=1),
        "repetitive": make_sample(response=assistant("4", "two and two make four so " * 9)),
        "format": make_sample(response=assistant("4")),
        "incorrect": make_sample(reward=0.0),
        "not judged": make_sample(reward=Failure("timeout", "")),
        "tool protocol": make_sample(response=assistant("", "so", faults=["unclosed call"]), tools=TOOL),
        "wrong terminal state": make_sample(reward=0.0, tools=TOOL),
    }
    report = reject(planted.values(), RejectionConfig())
    assert report.counts == dict.fromkeys(planted, 1)
    assert report.kept == [planted["kept"]]
    assert set(report.examples) == set(planted) - {"kept"}


def test_subjective_answers_need_a_judge():
    samples = [make_sample(reward=None, num_tokens=5), make_sample(reward=None, num_tokens=9)]
    with pytest.raises(ValueError, match="give a judge"):
        reject(samples, RejectionConfig())
    report = reject(samples, RejectionConfig(), judge=lambda sample: sample.num_generated / 10)
    assert report.counts == {"kept": 2}
    report = reject(samples, RejectionConfig(min_judgement=0.6), judge=lambda sample: sample.num_generated / 10)
    assert report.counts == {"kept": 1, "judged poor": 1}


def test_examples_are_bounded():
    report = reject([make_sample(reward=0.0)] * 10, RejectionConfig(num_examples=2))
    assert len(report.examples["incorrect"]) == 2


def test_the_half_of_the_prompts_with_shorter_responses_goes_by_domain():
    lengths = {"a": (3, 5), "b": (9,), "c": (4, 4), "d": (20, 2)}
    samples = [make_sample(name, num_tokens=n) for name, group in lengths.items() for n in group]
    samples += [make_sample("x", domain="tools", num_tokens=2), make_sample("y", domain="tools", num_tokens=3)]
    kept = drop_shorter_prompts(samples)
    assert {sample.task.task_id for sample in kept} == {"b", "d", "y"}
    assert len(kept) == 4
    with pytest.raises(ValueError, match="share = 1"):
        drop_shorter_prompts(samples, 1)


def test_hard_prompts_keep_four_different_responses_and_others_one():
    samples = [make_sample("hard", first=10 * (i % 6)) for i in range(8)] + [
        make_sample("easy", first=i) for i in (1, 2)
    ]
    kept = scale_responses(samples, hard={"hard"})
    assert kept == [*samples[:4], samples[8]]


def test_hard_prompts_are_sampled_further_and_part_of_a_reward_is_not_right():
    """Two of four would make a prompt easy; one has them, one has a near miss beside one right answer."""
    rewards = {"easy": (1.0, 1.0, 0.0, 0.0), "hard": (1.0, 0.01, 0.0, -0.5)}
    asked = []

    class Planted:
        async def make_groups(self, prompts, sampling):
            asked.append(([task.task_id for _, task in prompts], sampling.num_samples, sampling.seed))
            first = len(asked) == 1
            return [
                [
                    make_sample(
                        task.task_id, reward=rewards[task.task_id][i] if first else 1.0, first=100 * len(asked) + i
                    )
                    for i in range(sampling.num_samples)
                ]
                for _, task in prompts
            ]

    prompts = [make_sample(name).task for name in rewards]
    sampling, collect = Sampling(4, 8, 1.0, seed=1), TrajectoryConfig(hard_samples=6)
    groups, hard = asyncio.run(collect_answers(Planted(), prompts, sampling, collect))
    assert hard == {"hard"}
    assert [each[:2] for each in asked] == [(["easy", "hard"], 4), (["hard"], 6)]
    assert asked[0][2] != asked[1][2]
    report = reject([sample for group in groups for sample in group], collect.rejection)
    kept = scale_responses(report.kept, hard, collect.hard_responses)
    assert [sample.task.task_id for sample in kept] == ["easy", *["hard"] * 4]
