"""The command answers at once and tells failures in one line."""

import resource
import subprocess
import sys

import pytest

from glm45.cli import parse


def run_cli(*arguments):
    return subprocess.run([sys.executable, "-m", "glm45", *arguments], capture_output=True, text=True, timeout=60)


def test_help_answers_without_importing_torch():
    code = (
        "import sys, glm45.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_help_is_quick():
    """Processor time, so that a busy machine does not fail it."""
    assert min(_cpu_seconds_of_help() for _ in range(3)) < 0.5


def _cpu_seconds_of_help():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run_cli("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "demo", "seed=2", "--run", "x"],
        ["train", "demo", "--run", "x", "seed=2"],
        ["train", "--run", "x", "demo", "seed=2"],
    ],
)
def test_overrides_may_stand_before_and_after_options(arguments):
    options = parse(arguments)
    assert (options.recipe, options.folder, options.overrides) == ("demo", "x", ["seed=2"])


@pytest.mark.parametrize(
    "arguments", [["train", "demo", "--run", "x", "seed"], ["train", "demo", "--seed=2"], ["inspect", "pico", "a=b"]]
)
def test_what_is_no_override_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert "unrecognized arguments" in capsys.readouterr().err
