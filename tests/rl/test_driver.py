"""The driver: a run killed again and again writes the metrics of one that never was; wrong runs are refused clearly."""

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
from glm45.rl.curriculum import CurriculumStage, LengthSchedule
from glm45.rl.driver import require_judgement
from glm45.rl.state import open_run, pool_members, read_task_files
from glm45.rl.temperature import TemperatureConfig

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
    import dataclasses

    open_run(tmp_path / "run", config)
    open_run(tmp_path / "run", dataclasses.replace(config, steps=12))
    with pytest.raises(ValueError, match="other values of seed"):
        open_run(tmp_path / "run", dataclasses.replace(config, seed=5))


def test_a_prompt_in_both_files_is_refused(config, tmp_path):
    write_tasks(tmp_path / "held_out.jsonl", word_tasks(19, 3))
    with pytest.raises(ValueError, match="1 prompts are in both"):
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
    import dataclasses

    from glm45.environments.science import science_task

    science = [science_task(f"q{i}", f"q{i}?", ["a", "b"], 0, expert_verified=i == 0) for i in range(4)]
    write_tasks(tmp_path / "train.jsonl", [*science, *word_tasks(0, 2)])
    kept, _ = read_task_files(dataclasses.replace(config, expert_verified_only=True))
    assert sorted(task.task_id for task in kept) == ["0", "1", "q0"]
    assert len(read_task_files(config)[0]) == 6


def test_a_part_of_the_held_out_tasks_comes_from_all_of_the_file(config, tmp_path):
    import dataclasses

    write_tasks(tmp_path / "held_out.jsonl", word_tasks(100, 200))
    _, part = read_task_files(dataclasses.replace(config, evaluation=RLEvaluationConfig(num_tasks=40)))
    numbers = [int(task.task_id) for task in part]
    assert len(set(numbers)) == 40
    assert min(numbers) < 150 < 250 < max(numbers)
