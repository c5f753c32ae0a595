"""The driver: a run killed again and again writes the metrics of one that never was; wrong runs are refused clearly."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from glm45.config import to_dict
from glm45.environments.protocol import Failure, Task, user
from glm45.environments.tasks import write_tasks
from glm45.model import hub
from glm45.rl.config import LossConfig, RLConfig, RLEvaluationConfig, RolloutConfig
from glm45.rl.curriculum import CurriculumStage, LengthSchedule, PoolThresholds
from glm45.rl.driver import run_rl
from glm45.rl.metrics import require_judgement
from glm45.rl.pools import PoolsConfig, measure_pools
from glm45.rl.state import open_run, pool_members, read_task_files
from glm45.rl.temperature import TemperatureConfig
from glm45.training.metrics import read_record
from glm45.training.run import exclusive

# Runs the driver once for each "FOLDER PART NUMBER" argument, in a child that ends by SIGKILL the so-many-th time that
# part of a step is reached. One process imports everything and forks: imports take longer than the runs.
WORKER = textwrap.dedent(
    """
    import json, os, signal, sys, traceback
    import torch
    from glm45.config import from_dict
    from glm45.rl import driver, rollout, update
    from glm45.rl.config import RLConfig

    torch.set_num_threads(1)
    PLACES = {
        "rollout": (rollout.Rollout, "_sample"),
        "scoring": (rollout.Rollout, "_judge"),
        "training": (update.PolicyTrainer, "_forward"),
        "hand-over": (driver.InProcessClient, "update_weights"),
        "checkpoint": (driver.Checkpoints, "_write"),
    }

    def mine(owner, name, number):
        original, reached = getattr(owner, name), [0]
        def function(*arguments, **named):
            reached[0] += 1
            if reached[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **named)
        setattr(owner, name, function)

    for job in sys.argv[2:]:
        folder, part, number = job.split()
        pid = os.fork()
        if pid == 0:
            try:
                if part != "never":
                    mine(*PLACES[part], int(number))
                driver.run_rl(from_dict(RLConfig, json.load(open(sys.argv[1]))), folder)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    """
)


def word_tasks(first: int, count: int) -> list[Task]:
    """Prompts that random text answers rightly about half of the time."""
    return [
        Task(
            task_id=str(number),
            verifier="instructions",
            messages=[user(f"{number}?")],
            answer=None,
            metadata={"constraints": {"excludes": "7", "max_words": 3}},
        )
        for number in range(first, first + count)
    ]


@pytest.fixture
def config(tmp_path, make_model, tokenizer):
    hub.save(make_model(), tmp_path / "policy")
    tokenizer.save(tmp_path / "policy")
    write_tasks(tmp_path / "train.jsonl", word_tasks(0, 20))
    write_tasks(tmp_path / "held_out.jsonl", word_tasks(100, 6))
    return RLConfig(
        name="test",
        policy=str(tmp_path / "policy"),
        tasks=str(tmp_path / "train.jsonl"),
        held_out=str(tmp_path / "held_out.jsonl"),
        steps=6,
        stages=(
            CurriculumStage(prompts_per_step=3, samples_per_prompt=4, until_step=3),
            CurriculumStage(prompts_per_step=2, samples_per_prompt=6),
        ),
        lengths=LengthSchedule(caps=((0, 12), (2, 16))),
        temperature=TemperatureConfig(candidates=(0.8, 1.2), plateau_window=1, plateau_gain=1.0),
        loss=LossConfig(lr=1e-3, num_minibatches=2),
        rollout=RolloutConfig(max_staleness=1),
        evaluation=RLEvaluationConfig(every=3, num_tasks=6, num_samples=2),
        checkpoint_every=2,
    )


@pytest.mark.slow
def test_killed_in_every_part_of_a_step_the_run_ends_the_same(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    parts = ("rollout 60", "scoring 150", "training 13", "hand-over 3", "checkpoint 1", "never 0")
    jobs = [f"{tmp_path / 'whole'} never 0", *(f"{tmp_path / 'killed'} {part}" for part in parts)]
    result = subprocess.run(
        [sys.executable, "-c", WORKER, str(tmp_path / "config.json"), *jobs],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    ends = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("ended")]
    assert ends == ["0", "-9", "-9", "-9", "-9", "-9", "0"], result.stdout + result.stderr
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    for one, other in zip(*lines, strict=True):
        assert one == other
    rows = [json.loads(line) for line in lines[0]]
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["stage"] for row in rows[1:]] == [0, 0, 0, 1, 1, 1]
    assert [row["cap"] for row in rows[1:]] == [12, 12, 16, 16, 16, 16]
    assert "temperature_choice" in rows[2]
    assert rows[1]["max_mismatch"] < 1e-4
    weights = [(tmp_path / name / "policy" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    assert board(tmp_path / "killed", "reward") == {row["step"]: pytest.approx(row["reward"]) for row in rows[1:]}
    assert set(board(tmp_path / "killed", "held_out_greedy")) == {0, 3, 6}
    for name in ("response_length", "entropy", "grad_norm", "generated_tokens_per_second"):
        assert set(board(tmp_path / "killed", name)) == {1, 2, 3, 4, 5, 6}, name


def board(folder, name: str) -> dict[int, float]:
    """Return what TensorBoard shows of a run under a name: steps that were done again are there once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def test_a_folder_of_another_run_is_refused(config, tmp_path):
    open_run(tmp_path / "run", config)
    open_run(tmp_path / "run", dataclasses.replace(config, steps=12))
    with pytest.raises(ValueError, match="other values of seed"):
        open_run(tmp_path / "run", dataclasses.replace(config, seed=5))


def test_a_run_and_its_files_may_move_but_not_change(config, tmp_path):
    (tmp_path / "pools.json").write_text('{"pools": {}}')
    open_run(tmp_path / "run", dataclasses.replace(config, pools=str(tmp_path / "pools.json")))
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("policy", "train.jsonl", "held_out.jsonl", "pools.json", "run"):
        (tmp_path / name).rename(moved / name)
    files = {"policy": "policy", "tasks": "train.jsonl", "held_out": "held_out.jsonl", "pools": "pools.json"}
    there = dataclasses.replace(config, **{name: os.path.relpath(moved / file) for name, file in files.items()})
    open_run(moved / "run", there)
    write_tasks(moved / "train.jsonl", word_tasks(0, 19))
    with pytest.raises(ValueError, match="other values of tasks"):
        open_run(moved / "run", there)


def test_a_configuration_survives_a_kill_while_it_is_written(config, tmp_path, monkeypatch):
    open_run(tmp_path / "run", config)
    before = (tmp_path / "run" / "config.json").read_text()

    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        open_run(tmp_path / "run", dataclasses.replace(config, steps=12))
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_two_processes_do_not_work_in_one_folder(config, tmp_path):
    with exclusive(tmp_path / "run"), pytest.raises(OSError, match="another process is training in"):
        run_rl(config, tmp_path / "run")


@pytest.mark.slow
def test_a_run_goes_from_the_moderate_to_the_hard_pool_on_a_plateau(config, tmp_path):
    pools = {"moderate": [str(number) for number in range(10)], "hard": [str(number) for number in range(10, 20)]}
    (tmp_path / "pools.json").write_text(json.dumps({"pools": pools}))
    moderate = CurriculumStage(
        pool="moderate", prompts_per_step=2, samples_per_prompt=4, plateau_window=1, plateau_gain=9.0
    )
    config = dataclasses.replace(
        config,
        pools=str(tmp_path / "pools.json"),
        stages=(moderate, CurriculumStage(pool="hard", prompts_per_step=2, samples_per_prompt=6)),
        rollout=RolloutConfig(drop_uninformative=False),
        steps=4,
    )
    run_rl(config, tmp_path / "run", say=lambda line: None)
    rows = read_record(tmp_path / "run")
    assert [row["stage"] for row in rows[1:]] == [0, 0, 1, 1]
    assert [row["num_samples"] for row in rows[1:]] == [12, 12, 18, 18]  # oversampling makes three groups
    assert [row["pool/begun"] for row in rows[1:]] == [3, 6, 9, 12]
    assert rows[3]["pool/dropped_stage"] == 1  # the third group of the second step


@pytest.mark.slow
def test_a_measurement_of_pools_goes_on_where_it_was_stopped(config, tmp_path):
    tasks = [
        dataclasses.replace(task, metadata={**task.metadata, "verified_answer": i != 5})
        for i, task in enumerate(word_tasks(0, 6))
    ]
    write_tasks(tmp_path / "train.jsonl", tasks)
    thresholds = PoolThresholds(k=2, num_samples=4, hard_k=6)
    measured = PoolsConfig(
        policy=config.policy, tasks=config.tasks, thresholds=thresholds, max_tokens=12, prompts_at_once=2
    )
    whole = measure_pools(measured, tmp_path / "whole.json", say=lambda line: None)
    assert json.loads((tmp_path / "whole.json").read_text()) == whole
    assert whole["left_out"] == 1
    assert sum(whole["counts"].values()) == 5
    assert whole["samples"] >= 20

    def killed(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_pools(measured, tmp_path / "killed.json", say=killed)
    with (tmp_path / "killed.json.partial").open("a") as partial:
        partial.write('{"task_id": "2", "po')  # a line cut short
    with pytest.raises(ValueError, match="begun with another configuration"):
        measure_pools(dataclasses.replace(measured, seed=1), tmp_path / "killed.json")
    said = []
    relative = dataclasses.replace(measured, tasks=os.path.relpath(measured.tasks))
    resumed = measure_pools(relative, tmp_path / "killed.json", say=said.append)
    assert said == ["4 of 5 prompts", "5 of 5 prompts"]
    assert resumed["measurements"] == whole["measurements"]
    assert not (tmp_path / "killed.json.partial").exists()


def test_a_prompt_in_both_files_is_refused(config, tmp_path):
    write_tasks(tmp_path / "held_out.jsonl", word_tasks(19, 3))
    with pytest.raises(ValueError, match="1 questions are in both"):
        read_task_files(config)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("hello", "line 1: not a task: Expecting value"),
        ("null", "line 1: not a task: Task = None: expected the fields"),
        ('{"task_id": "1", "verifier": "x", "answer": 1}', "missing messages"),
        ('{"task_id": "1", "verifier": "x", "answer": 1, "messages": "hi"}', "messages = 'hi': expected list"),
        ('{"task_id": "1", "verifier": 7, "answer": 1, "messages": []}', "verifier = 7: expected str"),
        ("\xff", "line 1: not a task: 'utf"),
    ],
)
def test_a_line_that_is_no_task_is_refused_with_its_number(config, line, said):
    Path(config.tasks).write_bytes(line.encode("latin-1"))
    with pytest.raises(ValueError, match=said):
        read_task_files(config)


def test_a_file_that_holds_no_pools_is_refused(tmp_path):
    (tmp_path / "pools.json").write_text('{"pools": {"hard": ["1", "2"]}}')
    assert pool_members(str(tmp_path / "pools.json"), "hard") == {"1", "2"}
    with pytest.raises(ValueError, match="has no moderate pool: name the file that `glm45 rl pools` wrote"):
        pool_members(str(tmp_path / "pools.json"), "moderate")


def test_a_run_whose_answers_can_none_of_them_be_judged_stops(groups):
    samples = [sample for group in groups for sample in group]
    for sample in samples[1:]:
        sample.judge(Failure("error", "KeyError: 'gold'"))
    require_judgement(groups)
    samples[0].judge(Failure("error", "KeyError: 'first'"))
    with pytest.raises(
        ValueError, match=f"none of {len(samples)} answers could be judged; the first: error, KeyError: 'fi"
    ):
        require_judgement(groups)


def test_only_expert_verified_science_is_kept_when_asked(config, tmp_path):
    from glm45.environments.science import science_task

    science = [science_task(f"q{i}", f"q{i}?", ["a", "b"], 0, expert_verified=i == 0) for i in range(4)]
    write_tasks(tmp_path / "train.jsonl", [*science, *word_tasks(0, 2)])
    kept, _ = read_task_files(dataclasses.replace(config, expert_verified_only=True))
    assert sorted(task.task_id for task in kept) == ["0", "1", "q0"]
    assert len(read_task_files(config)[0]) == 6


def test_a_part_of_the_held_out_tasks_comes_from_all_of_the_file(config, tmp_path):
    write_tasks(tmp_path / "held_out.jsonl", word_tasks(100, 200))
    _, part = read_task_files(dataclasses.replace(config, evaluation=RLEvaluationConfig(num_tasks=40)))
    numbers = [int(task.task_id) for task in part]
    assert len(set(numbers)) == 40
    assert min(numbers) < 150 < 250 < max(numbers)
