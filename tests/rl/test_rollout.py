"""Rollouts with a planted engine: groups, refills, failures, penalties, overlap, staleness."""

import asyncio
import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest

from glm45.engine.request import Completion
from glm45.environments.arithmetic import ArithmeticVerifier, arithmetic_tasks
from glm45.environments.protocol import Failure
from glm45.rl.batch import teaches
from glm45.rl.config import LossConfig, PenaltyConfig, RLEvaluationConfig, RolloutConfig
from glm45.rl.curriculum import PoolThresholds
from glm45.rl.evaluation import HeldOut
from glm45.rl.health import HealthConfig, alarms
from glm45.rl.metrics import accuracy, rollout_metrics
from glm45.rl.pool import Pool
from glm45.rl.pools import PoolsConfig, measure
from glm45.rl.rollout import Rollout, Sampling, penalise
from glm45.rl.sample import Sample

SAMPLING = Sampling(num_samples=4, max_tokens=8, temperature=1.0, seed=1)
TASKS = list(arithmetic_tasks(1, 12))


class PlantedEngine:
    """An engine client that answers `answer(prompt text, sample)` once `ready(prompt text)` is."""

    def __init__(self, tokenizer, answer, ready):
        self.tokenizer, self.answer, self.ready = tokenizer, answer, ready
        self.version, self.params = 0, []

    async def generate(self, prompt_ids, params):
        self.params.append(params)
        prompt = self.tokenizer.decode(prompt_ids)
        version = self.version
        await self.ready(prompt)
        return [self.completion(prompt, index, version) for index in range(params.n)]

    async def pause(self):
        self.waiting = len(self.params)

    async def resume(self):
        self.submitted_together = len(self.params) - self.waiting

    def completion(self, prompt, index, version):
        spelled = self.answer(prompt, index)
        think, end = (self.tokenizer.special_id(name) for name in ("<think>", "</think>"))
        ids = [*self.tokenizer.encode("\n"), think, *self.tokenizer.encode("so"), end]
        ids += self.tokenizer.encode(f"\n{spelled}")
        finish = "stop" if spelled is not None else "length"
        ids += [self.tokenizer.special_id("<|user|>")] if finish == "stop" else []
        return Completion(index, ids, [-0.5] * len(ids), [version] * len(ids), finish)


class DirectRewards:
    """Judges in this process; a content of "break" breaks the verifier."""

    def __init__(self):
        self.threads, self.judged = ThreadPoolExecutor(8), []

    def submit(self, task, response):
        return self.threads.submit(self._score, task, response)

    def _score(self, task, response):
        self.judged.append(task.task_id)
        if response.get("content") == "break":
            return Failure("error", "planted")
        return ArithmeticVerifier().score(task, response)


async def at_once(prompt):
    pass


def right_answer(prompt):
    expression = prompt.split("\n")[1].split("=?")[0]
    return str(eval(expression))


def question(prompt):
    return prompt.split("\n")[1].split("<")[0]


@pytest.fixture
def rollout(tokenizer):
    def make(answer, config=None, ready=at_once):
        return Rollout(PlantedEngine(tokenizer, answer, ready), tokenizer, DirectRewards(), config or RolloutConfig())

    return make


def test_a_group_is_the_prompt_with_each_sampled_answer(rollout, tokenizer):
    maker = rollout(lambda prompt, index: right_answer(prompt) if index < 3 else "7")
    group = asyncio.run(maker.make_group(5, TASKS[0], SAMPLING))
    assert [sample.reward for sample in group] == [1.0, 1.0, 1.0, 0.0]
    assert {(sample.group_id, sample.status) for sample in group} == {(5, "completed")}
    text = tokenizer.decode(group[0].tokens)
    assert text.startswith("[gMASK]<sop><|user|>\n" + TASKS[0].messages[0]["content"] + "<|assistant|>\n<think>so")
    learnt = [token for token, mask in zip(group[0].tokens, group[0].loss_mask, strict=True) if mask]
    assert tokenizer.decode(learnt) == f"\n<think>so</think>\n{TASKS[0].answer}<|user|>"
    assert group[0].response["reasoning_content"] == "so"


def test_order_and_seeds_do_not_depend_on_what_finishes_first(rollout):
    delays = {task.messages[0]["content"]: 0.05 - 0.004 * i for i, task in enumerate(TASKS)}
    maker = rollout(lambda prompt, index: "7", ready=lambda prompt: asyncio.sleep(delays[question(prompt)]))
    groups = asyncio.run(maker.make_groups(list(enumerate(TASKS)), SAMPLING))
    assert [group[0].task for group in groups] == TASKS
    assert maker.client.submitted_together == len(TASKS)
    seeds = [params.seed for params in maker.client.params]
    asyncio.run(maker.make_groups(list(enumerate(TASKS)), SAMPLING))
    assert [params.seed for params in maker.client.params] == seeds * 2
    assert len(set(seeds)) == len(TASKS)


def test_flat_groups_are_dropped_and_replaced_but_not_hidden_from_the_mean(rollout):
    """Only every second prompt teaches anything; the others are always answered rightly."""
    teaching = [task.messages[0]["content"] for task in TASKS[::2]]

    def answer(prompt, index):
        flat = question(prompt) not in teaching
        return right_answer(prompt) if flat or index == 0 else "7"

    pool = Pool(TASKS, seed=1)
    maker = rollout(answer, RolloutConfig(oversampling=1.0))
    made = asyncio.run(maker.fill(pool, 6, SAMPLING))
    assert pool.num_landed == 6
    assert pool.counts["dropped_uninformative"] == len(made) - 6 > 0
    assert all(group[0].task in TASKS[::2] for group in pool.take(6, 0))
    record = rollout_metrics(made, 0)
    assert record["reward"] == pytest.approx((6 * 0.25 + (len(made) - 6)) / len(made))
    assert record["informative_share"] == pytest.approx(6 / len(made))
    assert record["pass_at_4"] == 1.0
    assert record["pass_at_1"] == pytest.approx(record["reward"])
    assert accuracy(made) == pytest.approx(record["reward"])


def test_what_could_not_be_judged_counts_as_a_failure_and_as_nothing_else(groups):
    judged = rollout_metrics_of(groups)
    for group in groups:
        group.append(failed := Sample.from_dict(group[0].to_dict()))
        failed.reward, failed.reward_parts = None, {}
        failed.judge(Failure("crash", "planted"))
    with_failures = rollout_metrics_of(groups)
    samples = sum(map(len, groups))
    assert with_failures["failure_share"] == pytest.approx(len(groups) / samples)
    for name in ("reward", "informative_share", "pass_at_1"):
        assert with_failures[name] == judged[name], name
    nothing = rollout_metrics([[group[-1]] for group in groups], 0)
    assert nothing == {"failure_share": 1.0, "num_samples": len(groups), "failure/crash": len(groups)}
    assert alarms([nothing], HealthConfig()) == ["answers cannot be judged: failure_share 1, limit 0.05"]


def rollout_metrics_of(groups):
    for sample in (sample for group in groups for sample in group):
        sample.metadata |= {"faulty": False, "repetition_rate": 0.0, "language_mixing_rate": 0.0}
    return rollout_metrics(groups, 0)


def test_the_rounds_end_where_nothing_is_informative(rollout):
    pool = Pool(TASKS, seed=1)
    made = asyncio.run(rollout(lambda prompt, index: "7", RolloutConfig(max_rounds=3)).fill(pool, 4, SAMPLING))
    assert (len(made), pool.num_landed, pool.counts["dropped_uninformative"]) == (15, 0, 15)


def test_an_answer_that_cannot_be_judged_is_dropped_and_counted_not_zero(rollout):
    pool = Pool(TASKS, seed=1)
    maker = rollout(lambda prompt, index: ["break", "break", right_answer(prompt), "7"][index])
    made = asyncio.run(maker.fill(pool, 4, SAMPLING))
    taken = pool.take(4, 0)
    assert [[sample.reward for sample in group] for group in taken] == [[1.0, 0.0]] * 4
    assert pool.counts["failed_samples"] == 2 * len(made)
    assert rollout_metrics(made, 0)["failure_share"] == 0.5
    assert rollout_metrics(made, 0)["reward"] == 0.5


def test_groups_with_one_judged_sample_are_dropped_as_failed(rollout):
    pool = Pool(TASKS, seed=1)
    maker = rollout(lambda prompt, index: "break" if index else "7", RolloutConfig(max_rounds=1))
    asyncio.run(maker.fill(pool, 4, SAMPLING))
    assert pool.counts["dropped_failed"] == 5


def test_penalties_of_form_are_parts_of_the_reward(rollout):
    penalties = PenaltyConfig(language_mixing=0.25, repetition=0.5)
    maker = rollout(lambda prompt, index: "ответ" if index else "7", RolloutConfig(penalties=penalties))
    group = asyncio.run(maker.make_group(0, TASKS[0], SAMPLING))
    assert group[1].reward == -0.25
    assert group[1].reward_parts["language_mixing_penalty"] == -0.25
    assert "language_mixing_penalty" not in group[0].reward_parts


def test_a_cut_answer_is_truncated(rollout):
    group = asyncio.run(rollout(lambda prompt, index: None).make_group(0, TASKS[0], SAMPLING))
    assert {sample.status for sample in group} == {"truncated"}
    assert rollout_metrics([group], 0)["truncation"] == 1.0


def test_scoring_overlaps_with_generation(rollout):
    """Each prompt's answers come only when all of the one before it are judged: waiting for all would never end."""
    before = {after.messages[0]["content"]: task for task, after in itertools.pairwise(TASKS[:8])}

    async def judged_before(prompt):
        while (task := before.get(question(prompt))) and maker.rewards.judged.count(
            task.task_id
        ) < SAMPLING.num_samples:
            await asyncio.sleep(0.001)

    maker = rollout(lambda prompt, index: "7", ready=judged_before)
    asyncio.run(maker.make_groups(list(enumerate(TASKS[:8])), SAMPLING))
    assert maker.rewards.judged == [task.task_id for task in TASKS[:8] for _ in range(SAMPLING.num_samples)]


def test_a_slow_environment_beside_training_respects_the_bound_on_staleness(rollout):
    """The seam for asynchronous runs: groups stay in flight while weights move on, and land with their version."""
    pool = Pool(TASKS, seed=1, max_staleness=1)
    slow = TASKS[0].messages[0]["content"]

    async def after_three_updates(prompt):
        while slow in prompt and maker.client.version < 3:
            await asyncio.sleep(0.001)

    maker = rollout(lambda prompt, index: right_answer(prompt) if index else "7", ready=after_three_updates)

    async def run():
        learnt, flights = [], {}

        async def fly(group_id, task):
            maker._admit(pool, group_id, await maker.make_group(group_id, task, SAMPLING))

        for version in range(5):
            maker.client.version = version
            while pool.num_in_flight < 4:
                group_id, task = pool.begin()
                flights[group_id] = asyncio.create_task(fly(group_id, task))
            while pool.num_in_flight > (version < 3):  # all land before the update but for the slow one
                await asyncio.sleep(0.001)
            learnt += [(version, group[0].weight_version, group[0].task) for group in pool.take(4, version)]
        await asyncio.gather(*flights.values())
        return learnt

    learnt = asyncio.run(run())
    assert len(learnt) >= 12
    assert all(version - sampled <= 1 for version, sampled, _ in learnt)
    assert pool.counts["stale"] >= 1


def test_pools_sample_shallowly_then_deeply_and_count_what_could_not_be_judged(rollout):
    """One prompt always right, one half of the time, one once in the deep samples, one never, one never judged."""
    kinds = dict(
        zip((task.messages[0]["content"] for task in TASKS), ("easy", "half", "rare", "never", "broken"), strict=False)
    )

    def answer(prompt, index):
        right, kind = right_answer(prompt), kinds[question(prompt)]
        if kind == "broken":
            return "break"
        return right if kind == "easy" or (kind == "half" and index % 2) or (kind == "rare" and index == 20) else "no"

    maker = rollout(answer)
    config = PoolsConfig(thresholds=PoolThresholds(hard_k=64))
    rows = asyncio.run(measure(maker, list(enumerate(TASKS[:5])), config))
    assert [row["pool"] for row in rows] == ["easy", "moderate", "hard", "unsolved", "unsolved"]
    assert [row["num_samples"] for row in rows] == [16, 16, 64, 64, 16]
    assert [row["num_correct"] for row in rows] == [16, 8, 1, 0, 0]
    assert rows[4]["failures"] == ["error"] * 16
    assert [params.n for params in maker.client.params] == [16] * 5 + [48] * 2


def test_the_aborted_part_of_a_group_is_no_failure(rollout):
    pool, maker = Pool(TASKS, seed=1), rollout(lambda prompt, index: right_answer(prompt) if index else "7")
    group_id, task = pool.begin()
    group = asyncio.run(maker.make_group(group_id, task, SAMPLING))
    group[3].reward, group[3].status = None, "aborted"
    maker._admit(pool, group_id, group)
    assert pool.counts["landed"] == 1
    assert pool.counts["failed_samples"] == 0


@pytest.mark.parametrize(("policy", "teaching"), [("keep", True), ("zero", False), ("drop", False), ("mask", True)])
def test_a_group_that_truncation_makes_flat_takes_no_place(rollout, policy, teaching):
    """Only the truncated answer is right: what it teaches depends on what becomes of truncated ones."""
    maker = rollout(lambda prompt, index: right_answer(prompt) if index else "7")
    maker.loss = LossConfig(truncated=policy)
    group = asyncio.run(maker.make_group(0, TASKS[0], SAMPLING))
    for sample in group:
        sample.reward = float(sample.index == 0)
    group[0].status = "truncated"
    assert teaches(group, maker.loss) is teaching
    for sample in group:
        sample.status = "truncated"
    assert teaches(group, maker.loss) is (policy == "keep")


def test_every_penalty_of_form_is_a_part_and_takes_nothing_from_being_right(rollout):
    penalties = PenaltyConfig(format=0.25, repetition=0.5)
    maker = rollout(lambda prompt, index: right_answer(prompt), RolloutConfig(penalties=penalties))
    group = asyncio.run(maker.make_group(0, TASKS[0], SAMPLING))
    direct, repeating = group[0], group[1]
    direct.response["reasoning_content"] = ""
    repeating.response["reasoning_content"] = "so it goes on and " * 20
    for sample in (direct, repeating):
        penalise(sample, penalties)
    assert (direct.reward, direct.reward_parts["format_penalty"]) == (0.75, -0.25)
    assert (repeating.reward, repeating.reward_parts["repetition_penalty"]) == (0.5, -0.5)
    record = rollout_metrics([group], weight_version=3)
    assert record["faulty_share"] == 0.25
    assert record["staleness"] == 3.0
    assert record["reward/arithmetic"] == record["reward"] == pytest.approx((0.75 + 0.5 + 2) / 4)
    assert record["part/correct"] == record["pass_at_1"] == 1.0
    assert record["part/format_penalty"] == -0.25


def test_held_out_answers_that_cannot_be_judged_are_counted_and_not_wrong(rollout):
    broken = question("\n" + TASKS[0].messages[0]["content"])
    maker = rollout(lambda prompt, index: "break" if question(prompt) == broken else right_answer(prompt))
    held_out = HeldOut(maker, TASKS[:4], RLEvaluationConfig(num_tasks=4, num_samples=3, by="left"), seed=1)
    record = asyncio.run(held_out.evaluate(8, 8))
    assert record["held_out_greedy"] == record["held_out_full_cap"] == record["held_out_greedy/arithmetic"] == 1.0
    assert record["held_out_failure_share"] == 0.25
    assert record["held_out_full_cap_error"] == 0.0
    assert sum(name.startswith("held_out_by/") and not name.endswith("_error") for name in record) == 3
    nothing = HeldOut(rollout(lambda prompt, index: "break"), TASKS[:4], RLEvaluationConfig(), seed=1)
    with pytest.raises(ValueError, match="none of 4 answers could be judged"):
        asyncio.run(nothing.evaluate(8, 8))


def test_a_prompt_is_hard_only_if_somebody_vouches_for_its_answer(rollout):
    said = [{}, {"verified_answer": True}, {"expert_verified": True}, {"expert_verified": False}]
    tasks = [
        dataclasses.replace(task, verifier="mine:Mine", metadata={**task.metadata, **more})
        for task, more in zip(TASKS, said, strict=False)
    ]
    maker = rollout(lambda prompt, index: right_answer(prompt) if index == 20 else "7")
    config = PoolsConfig(thresholds=PoolThresholds(hard_k=64))
    rows = asyncio.run(measure(maker, list(enumerate([*tasks, TASKS[4]])), config))
    assert [row["pool"] for row in rows] == ["unverified", "hard", "hard", "unverified", "hard"]
    assert rows[0]["num_samples"] == 16
