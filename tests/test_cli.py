"""The command answers at once and tells failures in one line."""

import subprocess
import sys
import time


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
    best = min(_seconds_of_help() for _ in range(3))
    assert best < 0.5


def _seconds_of_help():
    start = time.perf_counter()
    assert run_cli("--help").returncode == 0
    return time.perf_counter() - start
