"""The command answers at once and tells failures in one line."""

import resource
import subprocess
import sys


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
