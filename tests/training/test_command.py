"""`glm45 train` and `glm45 export` as a person uses them, with good and bad input."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from glm45 import cli
from glm45.config import to_dict
from glm45.data.folder import describe_tokenizer, update_manifest
from glm45.engine.engine import Engine
from glm45.engine.request import SamplingParams
from glm45.model import hub
from glm45.recipes import catalogue
from glm45.text.tokenizer import Tokenizer
from glm45.training import loop
from glm45.training.checkpoint import committed_steps
from glm45.training.launch import default_processes, launch
from glm45.training.metrics import read_record
from glm45.training.run import Run


@pytest.fixture
def glm45(toy_recipe, monkeypatch, capsys):
    """Run a command line with the toy recipe known as "toy"; return status, output and errors."""
    monkeypatch.setitem(catalogue.TRAINING, "toy", toy_recipe)

    def run(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


def test_train_export_and_load(glm45, tmp_path):
    """The exported folder gives the run's weights to the hub's reader, and its tokenizer."""
    keep = "checkpoints.keep_every=3"
    status, out, _ = glm45("train", "toy", keep, "--run", tmp_path / "run", "--processes", 1)
    assert status == 0
    assert "done: 24 steps" in out
    assert "of the time between steps" in out
    assert glm45("export", tmp_path / "run", tmp_path / "early", "--step", 9)[0] == 0
    assert hub.load(tmp_path / "early").config.rope_theta == 1e4  # the stage that step 9 belongs to
    status, out, _ = glm45("export", tmp_path / "run", tmp_path / "out", "--dtype", "float32")
    assert status == 0
    model = hub.load(tmp_path / "out")
    assert model.config.rope_theta == 1e6  # the last stage's
    assert Tokenizer.load(tmp_path / "out").vocab_size == 300
    run = Run.read(tmp_path / "run")
    trained = loop.train(run)  # at its end: only loads
    assert trained.config.rope_theta == 1e6
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.slow
def test_an_exported_run_answers_in_transformers_as_in_the_engine(glm45, tmp_path):
    """Greedy tokens of a trained model are equal."""
    transformers = pytest.importorskip("transformers", reason="the peer is not installed")
    glm45("train", "toy", "--run", tmp_path / "run", "--processes", 1)
    glm45("export", tmp_path / "run", tmp_path / "out", "--dtype", "float32")
    tokenizer = Tokenizer.load(tmp_path / "out")
    prompts = [tokenizer.encode(text) for text in ("the sum of 3 and", "the cat", "sat on")]
    with Engine(hub.load(tmp_path / "out")) as engine:
        ours = engine.generate(prompts, SamplingParams(max_tokens=24, temperature=0, ignore_eos=True))
    peer = transformers.Glm4MoeForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    peer.generation_config.eos_token_id = None
    for prompt, [completion] in zip(prompts, ours, strict=True):
        theirs = peer.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
        assert theirs[0, len(prompt) :].tolist() == completion.token_ids
    assert len({completion.token_ids[0] for [completion] in ours}) > 1


@pytest.mark.slow
def test_the_run_folder_says_what_ran(glm45, toy_recipe, tmp_path):
    glm45("train", "toy", "seed=5", "--run", tmp_path, "--processes", 1)
    assert json.loads((tmp_path / "config.json").read_text()) == to_dict(toy_recipe("seed=5"))
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0] or environment["packages"]["torch"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "timings.jsonl", "checkpoints", "samples", "tensorboard"}
    record = read_record(tmp_path)
    assert {line["event"] for line in record if "event" in line} == {"health", "evaluation"}
    evaluations = [line for line in record if line.get("event") == "evaluation"]
    assert [line["step"] for line in evaluations] == [10, 20, 24]
    assert evaluations[-1]["mean"] < evaluations[0]["mean"]
    assert json.loads((tmp_path / "samples" / "step-00000024.json").read_text()).keys() == {"the sum"}
    timings = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert len(timings) == 24
    assert all(line["tokens_per_second"] > 0 for line in timings)


def test_dry_run_prints_and_saves_and_trains_nothing(glm45, tmp_path):
    status, out, _ = glm45("train", "toy", "--run", tmp_path, "--dry-run")
    assert status == 0
    assert "general" in out
    assert "MB a rank" in out
    assert (tmp_path / "schedule.png").exists()
    assert not (tmp_path / "metrics.jsonl").exists()
    assert glm45("train", "toy", "seed=3", "--run", tmp_path, "--dry-run")[0] == 0  # nothing to be lost by it


@pytest.mark.slow
def test_a_run_goes_on_by_its_folder_with_what_it_was_given(glm45, toy_recipe, tmp_path, monkeypatch):
    """The words of the farewell, after overrides and in another working folder."""
    folder = tmp_path / "run"
    glm45("train", "toy", "seed=2", "--run", folder, "--processes", 1)
    monkeypatch.chdir(tmp_path)
    assert "done: 24 steps" in glm45("train", "run", "--processes", 1)[1]
    assert Run.read(folder).config == toy_recipe("seed=2")
    assert "seed: 2 -> 1" in glm45("train", "run", "seed=1", "--processes", 1)[2]


def test_a_layout_that_fits_no_gpu_is_refused_with_numbers(glm45, tmp_path):
    together = ("layout.shard=1", "layout.context=1", "layout.expert=1")
    status, out, error = glm45("train", "full", *together, "--run", tmp_path, "--dry-run")
    assert status == 1
    assert "memory: about" in out
    assert "a GPU of 80 GB has 80.0 GB: raise layout.shard" in error


def test_torchruns_ranks_say_one_line_together(glm45, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in ((0, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        status, _, error = glm45("train", "toy", "micro_batch_tokens=4000000000", "--run", tmp_path)
        assert status == 1
        assert error.count("\n") == lines


def test_data_of_another_tokenizer_are_refused(glm45, toy_data, tmp_path):
    """Exchanged since the shards were made, or other than what the initial weights were trained with."""
    other = tmp_path / "other"
    other.mkdir()
    os.symlink(toy_data / "shards", other / "shards")
    Tokenizer.train(["other text " * 50], 300).save(other / "tokenizer")
    update_manifest(other, json.loads((toy_data / "manifest.json").read_text()))
    error = glm45("train", "toy", f"initial_weights={toy_data}/tokenizer", f"data={other}", "--run", tmp_path / "a")[2]
    assert "were trained with a tokenizer" in error
    update_manifest(other, {"tokenizer": describe_tokenizer(Tokenizer.load(toy_data / "tokenizer"))})
    error = glm45("train", "toy", f"data={other}", "--run", tmp_path / "b")[2]
    assert "was tokenized with a tokenizer" in error


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["tooy"], "no recipe 'tooy'; did you mean 'toy'?"),
        (["toy", "learning_rate.peek=1"], "there is no 'peek'; did you mean 'peak'?"),
        (["toy", "seed=many"], "seed = 'many': expected int"),
        (["toy", "data=/nowhere"], "no tokenizer at /nowhere/tokenizer"),
        (["toy", "stages.0.mixture.weights={\"prose.*\": 1}"], "no dataset matches 'prose.*'"),
        (["toy", "initial_weights=/nowhere"], "initial_weights: no folder /nowhere"),
        (["toy", "layout.shard=4"], "the layout needs 4 processes"),
        (["toy", "layout.tensor=4"], "tensor 4 does not divide num_key_value_heads 2"),
        (["toy", "model.vocab_size=256"], "tokenized with a vocabulary of 300, model.vocab_size is 256"),
        (["toy", "micro_batch_tokens=4000000000"], "a rank needs about"),
        (["toy", "evaluation.every=0"], "evaluation.every is 0: set it to 1 or more"),
        (["toy", "learning_rate.peak=-1"], "learning_rate: peak -1.0 must be above 0"),
        (["toy", "--processes=0"], "there are 0"),
        (["toy", "stages.0.batch_tokens=100"], "batch_tokens 100 must be a positive multiple of sequence_length 32"),
        (["full"], "the layout needs 256 processes"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_that_says_what_to_do(glm45, tmp_path, arguments, said):
    status, _, error = glm45("train", "--processes", 1, *arguments, "--run", tmp_path)
    assert status == 1
    assert error.count("\n") == 1
    assert said in error


def test_a_damaged_configuration_is_named(glm45, tmp_path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "metrics.jsonl").touch()
    status, _, error = glm45("train", "toy", "--run", tmp_path)
    assert status == 1
    assert f"{tmp_path / 'config.json'} is damaged" in error


@pytest.mark.slow
def test_another_tokenizer_is_refused_on_resume(glm45, toy_data, tmp_path):
    glm45("train", "toy", "--run", tmp_path / "run", "--processes", 1)
    other = tmp_path / "other"
    (other / "shards").parent.mkdir()
    os.symlink(toy_data / "shards", other / "shards")
    Tokenizer.train(["other text " * 50], 300).save(other / "tokenizer")
    update_manifest(other, json.loads((toy_data / "manifest.json").read_text()))
    status, _, error = glm45("train", "toy", f"data={other}", "--run", tmp_path / "run", "--processes", 1)
    assert status == 1
    assert "the run began with tokenizer" in error


def test_a_missing_tracker_says_how_to_install_it(glm45, tmp_path):
    status, _, error = glm45("train", "toy", "tracker=trackio", "--run", tmp_path, "--processes", 1)
    assert status == 1
    assert "pip install trackio" in error


def test_a_tracker_that_does_not_start_is_one_line(glm45, tmp_path, monkeypatch):
    class Tracker:
        @staticmethod
        def init(**options):
            raise RuntimeError("No API key configured.")

    monkeypatch.setitem(sys.modules, "wandb", Tracker)
    status, _, error = glm45("train", "toy", "tracker=wandb", "--run", tmp_path, "--processes", 1)
    assert status == 1
    assert "did not start: No API key configured. To go on, log in" in error


def test_two_runs_in_one_folder_are_refused(glm45, toy_recipe, tmp_path):
    with Run.open(tmp_path, toy_recipe()).exclusive():
        status, _, error = glm45("train", "toy", "--run", tmp_path, "--processes", 1)
    assert status == 1
    assert "another process is training in" in error


def test_export_without_a_run_or_checkpoint(glm45, toy_recipe, tmp_path):
    assert "no run folder" in glm45("export", tmp_path, tmp_path / "out")[2]
    Run.open(tmp_path, toy_recipe()).write()
    assert "no intact checkpoint" in glm45("export", tmp_path, tmp_path / "out")[2]
    assert "no checkpoint of step 3" in glm45("export", tmp_path, tmp_path / "out", "--step", 3)[2]


@pytest.mark.slow
def test_a_tracker_gets_the_numbers(toy_recipe, tmp_path, monkeypatch):
    calls = []

    class Tracker:
        init = staticmethod(lambda **options: calls.append(("init", options["name"])))
        log = staticmethod(lambda numbers, step: calls.append((step, numbers.get("loss"))))
        finish = staticmethod(lambda: calls.append("finish"))

    monkeypatch.setitem(sys.modules, "trackio", Tracker)
    loop.train(Run.open(tmp_path, toy_recipe("tracker=trackio")))
    losses = {line["step"]: line["loss"] for line in read_record(tmp_path) if "loss" in line}
    assert calls[0] == ("init", tmp_path.name)
    assert calls[-1] == "finish"
    assert (10, losses[10]) in calls
    assert (20, losses[20]) in calls


PROGRAM = """
import os, signal, sys
from glm45.training import loop
from glm45.training.command import run_training
from glm45.training.run import Run
original = loop.train_step
def step(state, rows):
    if state.step == 10 and state.world.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(state, rows)
loop.train_step = step
run_training(Run.read(sys.argv[1]), [], None)
"""


@pytest.mark.slow
def test_a_run_of_two_sharded_processes_goes_on_in_one(toy_recipe, tmp_path, monkeypatch):
    """The whole loop under torchrun with divided experts, stopped half-way; then one process to the end."""
    recipe = toy_recipe("layout.shard=2", "layout.expert=2", "micro_batch_tokens=32")
    Run.open(tmp_path, recipe).write()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stopped at step 11" in done.stdout
    assert committed_steps(tmp_path / "checkpoints")[-1] == 11
    loop.train(Run.open(tmp_path, toy_recipe()))
    steps = [line for line in read_record(tmp_path) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 25))

    alone = tmp_path / "alone"
    loop.train(Run.open(alone, toy_recipe()))
    expected = [line["loss"] for line in read_record(alone) if "loss" in line]
    assert [line["loss"] for line in steps] == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    "cores, overrides, processes",
    [
        (2, (), 2),
        (3, (), 2),  # batches of 2 and 4 rows do not divide among three
        (64, (), 2),
        (2, ("layout.replicate=1",), 1),
        (2, ("layout.shard=2",), 1),  # the user's own launcher decides
    ],
)
def test_one_process_a_core_as_far_as_batches_divide(toy_recipe, monkeypatch, cores, overrides, processes):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_processes(toy_recipe(*overrides)) == processes


def launched(program, tmp_path, monkeypatch):
    """Let `launch` start `python program` instead of the command line; return its status."""
    path = tmp_path / "program.py"
    path.write_text(program)
    monkeypatch.setattr(sys, "argv", ["glm45"])
    popen = subprocess.Popen

    def start(command, **options):
        return popen([sys.executable, str(path)], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    return launch([], 2)


def test_one_failing_process_ends_the_others_with_its_status(tmp_path, monkeypatch):
    program = "import os, sys, time\nsys.exit(7) if os.environ['RANK'] == '1' else time.sleep(2)\n"
    assert launched(program, tmp_path, monkeypatch) == 7


def test_ctrl_c_reaches_every_process(tmp_path, monkeypatch):
    """Each writes what it got; the launcher itself survives to wait for them."""
    program = (
        "import os, signal, sys, time, pathlib\n"
        "def got(number, frame):\n"
        f"    pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(str(number))\n"
        "    sys.exit(128 + number)\n"
        "signal.signal(signal.SIGINT, got)\n"
        "if os.environ['RANK'] == '0':\n"
        "    time.sleep(0.3); os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(20)\n"
    )
    assert launched(program, tmp_path, monkeypatch) == 128 + signal.SIGINT
    assert [(tmp_path / rank).read_text() for rank in "01"] == [str(int(signal.SIGINT))] * 2
