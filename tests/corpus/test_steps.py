import os
import sys
from functools import partial

import dill
import pytest

from glm45.corpus.document import Tally
from glm45.corpus.steps import Chain, Executor

SBATCH = """#!/bin/sh
number=$(ls {folder} | wc -l)
echo "$@" > {folder}/$number
echo Submitted batch job $number
"""


def one_step(folder):
    return [partial(lambda data, rank, size: iter(())), Tally(folder / "counts")]


@pytest.fixture
def chain(tmp_path):
    made = Chain(tmp_path / "work", "settings")
    made.add("first", 2, one_step)
    made.add("second", 1, one_step)
    return made


def test_a_step_is_named_by_its_settings_and_all_before_it(tmp_path):
    def folders(*settings):
        made = Chain(tmp_path, "root")
        return [made.add("step", 1, one_step, each) for each in settings]

    assert folders(1, 2)[0] == folders(1, 3)[0]
    assert folders(1, 2)[1] != folders(1, 3)[1]
    assert folders(1, 2)[1] != folders(0, 2)[1]


def test_finished_steps_are_not_run_again(chain):
    said = []
    assert chain.run(Executor(workers=1), said.append) == []
    said.clear()
    assert chain.run(Executor(workers=1), said.append) == []
    assert said == ["first: finished before", "second: finished before"]


def test_under_slurm_steps_are_submitted_one_after_the_other_and_their_tasks_finish_them(chain, tmp_path, monkeypatch):
    """With stand-ins for sbatch, which notes what it is given, and scontrol; then the jobs are run as Slurm would."""
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH.format(folder=jobs))
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    for stand_in in (tmp_path / "bin").iterdir():
        stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    executor = Executor(kind="slurm", options={"time": "1:00:00", "partition": "cpu"})
    assert chain.run(executor, lambda line: None) == ["first", "second"]
    submitted = [path.read_text() for path in sorted(jobs.iterdir())]
    assert "--dependency" not in submitted[0]
    assert "--dependency=afterok:0" in submitted[2]  # between them is the job that adds up the first one's statistics
    for step, folder in chain.steps:
        script = (folder / "logs" / "launch_script.slurm").read_text()
        assert "--partition=cpu" in script
        assert f"launch_pickled_pipeline {folder / 'logs' / 'executor.pik'}" in script
        for task in range(step.tasks):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
            monkeypatch.setenv("SLURM_NODELIST", "localhost")
            dill.loads((folder / "logs" / "executor.pik").read_bytes()).run()
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    assert chain.run(executor, lambda line: None) == []


def test_a_step_with_failed_tasks_ends_the_build(chain, monkeypatch):
    """Ray's executor says so in its log only."""

    class Lenient:
        def get_incomplete_ranks(self):
            return [0, 1]

        def run(self):
            pass

    monkeypatch.setattr("glm45.corpus.steps._make_executor", lambda *arguments: Lenient())
    with pytest.raises(RuntimeError, match=r"first: 2 of 2 tasks failed; see .*logs"):
        chain.run(Executor(workers=1), lambda line: None)


def test_ray_that_is_not_installed_is_named(chain, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "glm45\[cluster\]"'):
        chain.run(Executor(kind="ray"), lambda line: None)


@pytest.mark.slow
def test_ray_runs_the_same_steps(chain):
    """On a cluster of its own on this machine, where ray is installed; finished steps are not run again."""
    ray = pytest.importorskip("ray")
    executor = Executor(kind="ray", workers=2, options={"mem_per_cpu_gb": 0.2})
    said = []
    try:
        assert chain.run(executor, said.append) == []
        assert chain.run(executor, said.append) == []
    finally:
        ray.shutdown()
    assert said[-2:] == ["first: finished before", "second: finished before"]
    for step, folder in chain.steps:
        assert len(list((folder / "counts").iterdir())) == step.tasks
