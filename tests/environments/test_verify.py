"""Reward processes: what breaks becomes a typed failure, is counted, and never costs the run or a zero reward."""

import os
import tempfile
import textwrap

import pytest

from glm45.environments.catalogue import VERIFIERS, load_verifier
from glm45.environments.code import program_task
from glm45.environments.protocol import Failure, Reward, Task, assistant, prove, user
from glm45.environments.sandbox import SandboxLimits, why_unavailable
from glm45.environments.verify import RewardConfig, RewardWorkers

HOSTILE_VERIFIER = textwrap.dedent(
    """
    import os, signal, sys, time
    from glm45.environments.protocol import Reward, Task, assistant, user
    from glm45.environments.sandbox import SandboxLimits, run_python

    ANSWERS = 3  # the protocol's channel, duplicated from standard output

    class Hostile:
        def score(self, task, response):
            what = response["content"]
            if what == "hang": time.sleep(1000)
            if what == "deaf": signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)
            if what == "memory": bytearray(1 << 40)
            if what == "crash": os.kill(os.getpid(), signal.SIGSEGV)
            if what == "raise": raise KeyError("gold")
            if what == "program": run_python("import time; time.sleep(9)", limits=SandboxLimits(allow_unsandboxed=True))
            if what == "nan": return Reward(float("nan"))
            if what == "print": print("not for the protocol")
            if what == "half": os.write(ANSWERS, b"{"); time.sleep(1000)
            if what == "closed": os.close(ANSWERS); time.sleep(1000)
            if what == "child":
                if os.fork() == 0: time.sleep(1000)
                os._exit(3)
            return Reward(float(what != "bad"), {"correct": 1.0})

        def examples(self):
            yield Task(task_id="t", verifier="", messages=[user("?")], answer=None), assistant("good"), assistant("bad")

    class Wrong(Hostile):
        def score(self, task, response):
            return Reward(0.0)
    """
)


@pytest.fixture
def workers(tmp_path, monkeypatch):
    (tmp_path / "hostile_verifier.py").write_text(HOSTILE_VERIFIER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(tmp_path)
    with RewardWorkers(
        RewardConfig(num_workers=2, timeout_s=1.5, memory_mb=1024, sandbox=SandboxLimits(wall_s=1))
    ) as workers:
        yield workers


def task(verifier: str = "hostile_verifier:Hostile") -> Task:
    return Task(task_id="t", verifier=verifier, messages=[user("?")], answer=None)


@pytest.mark.slow
def test_failures_are_typed_counted_and_survived(workers):
    assert workers.score(task(), assistant("good")) == Reward(1.0, {"correct": 1.0})
    for what, kind in (
        ("hang", "timeout"),
        ("deaf", "timeout"),
        ("memory", "memory"),
        ("crash", "crash"),
        ("raise", "error"),
        ("nan", "error"),
        ("half", "timeout"),
        ("closed", "crash"),
        ("child", "timeout"),
    ):
        workers.score(task(), assistant("good"))  # so that the start of a process is not part of the limit
        outcome = workers.score(task(), assistant(what))
        assert isinstance(outcome, Failure)
        assert outcome.kind == kind, outcome
        assert workers.score(task(), assistant("good")).value == 1.0
    assert workers.failures == {"timeout": 4, "memory": 1, "crash": 2, "error": 2}
    assert workers.score(task(), assistant("print")).value == 1.0


@pytest.mark.slow
def test_the_folder_of_a_program_goes_with_the_process_that_ran_it(workers, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for _ in range(2):  # both processes: a start is not part of the limit
        workers.score(task(), assistant("good"))
    assert workers.score(task(), assistant("program")).kind == "timeout"
    assert list(tmp_path.glob("glm45-sandbox-*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["endless", "fork bomb"])
def test_a_hostile_program_earns_a_zero_and_no_failure(name, monkeypatch):
    """Through the processes and limits of a run. The endless one is run without bubblewrap, which is allowed here."""
    if name == "endless":
        monkeypatch.setenv("PATH", "/nowhere")
    elif reason := why_unavailable():
        pytest.skip(reason)
    program = {"endless": "while True: pass", "fork bomb": "import os\nwhile True: os.fork()"}[name]
    question = program_task("t", "?", [("", "1"), ("", "2"), ("", "3")])
    sandbox = SandboxLimits(wall_s=2.0, allow_unsandboxed=name == "endless")
    with RewardWorkers(RewardConfig(timeout_s=10.0, sandbox=sandbox)) as workers:
        workers.prove(["code"])
        reward = workers.score(question, assistant(program))
        assert reward == Reward(0.0, {"correct": 0.0, "passed_share": 0.0, "ended_well": 0.0})
        assert not workers.failures


def test_programs_must_end_before_their_verifier_is_given_up():
    with pytest.raises(ValueError, match=r"sandbox.wall_s = 10.0 and timeout_s = 5.0: .* set wall_s below"):
        RewardConfig(timeout_s=5.0)


def test_a_verifier_that_fails_its_own_proof_gives_failures_not_zeros(workers):
    outcome = workers.score(task("hostile_verifier:Wrong"), assistant("good"))
    assert outcome.kind == "error"
    assert "gave its gold answer" in outcome.detail
    assert "no verifier 'nothing'" in workers.score(task("nothing"), assistant("good")).detail


def test_a_run_learns_before_it_begins_that_a_verifier_cannot_judge(workers):
    workers.prove(["hostile_verifier:Hostile", "arithmetic"])
    with pytest.raises(ValueError, match=r"'hostile_verifier:Wrong' cannot judge here \(error\).*gave its gold answer"):
        workers.prove(["arithmetic", "hostile_verifier:Wrong"])
    with pytest.raises(ValueError, match="'nothing' cannot judge here"):
        workers.prove(["nothing"])


def test_code_is_refused_clearly_where_there_is_no_sandbox(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with RewardWorkers() as workers, pytest.raises(ValueError, match=r"\(refused\): .*bubblewrap is not installed"):
        workers.prove(["code"])


def test_scoring_runs_in_the_background_and_close_cancels(workers):
    workers.score(task(), assistant("good"))
    futures = [workers.submit(task(), assistant("good")) for _ in range(50)]
    assert [future.result().value for future in futures] == [1.0] * 50
    hanging = workers.submit(task(), assistant("hang"))
    workers.close()
    assert hanging.done()


@pytest.mark.parametrize("name", VERIFIERS)
def test_every_verifier_proves_itself(name):
    if name == "code":
        from glm45.environments.sandbox import why_unavailable

        if why_unavailable():
            pytest.skip(why_unavailable())
    load_verifier(name)


def test_a_verifier_without_examples_is_refused():
    class Silent:
        def score(self, task, response):
            return Reward(1.0)

        def examples(self):
            return iter(())

    with pytest.raises(ValueError, match="has no examples"):
        prove(Silent(), "silent")
