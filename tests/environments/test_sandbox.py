"""Twenty hostile programs against the sandbox: none escapes, hangs the run, stays behind or changes a reward."""

import os
import time
from pathlib import Path

import pytest

from glm45.environments import code, sandbox
from glm45.environments.code import CodeVerifier, function_task
from glm45.environments.protocol import assistant
from glm45.environments.sandbox import SandboxLimits, SandboxUnavailableError, run_python, why_unavailable

needs_sandbox = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable() or "available")
LIMITS = SandboxLimits(wall_s=1.5, cpu_s=1, memory_mb=256, output_bytes=1 << 16, file_mb=4)

# Each is run as a program of its own, and as the body of a solution that then returns a wrong answer.
HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread bomb": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
    "endless loop": "while True: pass",
    "endless sleep": "import time; time.sleep(1000)",
    "infinite output": "while True: print('x' * 1000)",
    "infinite errors": "import sys\nwhile True: sys.stderr.write('x' * 1000)",
    "memory": "x = [0]\nwhile True: x = x + x",
    "stack exhaustion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "huge integer": "x = 9 ** (9 ** 9)",
    "full disk": "f = open('/tmp/x', 'wb')\nwhile True: f.write(b'x' * 65536); f.flush()",
    "many files": "i = 0\nwhile True: open(f'/tmp/{i}', 'w').write('x' * 4096); i += 1",
    "file deletion": "import os, shutil\nfor d in os.listdir('/'): shutil.rmtree('/' + d, ignore_errors=True)",
    "writing the system": "open('/usr/bin/python-hostile', 'w').write('x')",
    "network": "import socket; socket.create_connection(('127.0.0.1', SECRET_PORT), timeout=1)",
    "reading secrets": "print(open('SECRET_PATH').read())",
    "environment": "import os; print(os.environ['GLM45_TEST_SECRET'])",
    "killing everyone": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "ignoring signals": "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\nwhile True: pass",
    "leaving children behind": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    "        os.execv('/bin/sleep', ['MARKER', '1000'])\n    os._exit(0)\ntime.sleep(0.1)",
    "leaving early": "import os; os._exit(0)",
}
assert len(HOSTILE) == 20


@pytest.fixture
def secrets(tmp_path, monkeypatch):
    """A secret file, a secret variable, a listening port and a marker, to be put into the programs."""
    import socket

    (tmp_path / "secret").write_text("XYZZY-SECRET")
    monkeypatch.setenv("GLM45_TEST_SECRET", "XYZZY-SECRET")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0)
        yield {
            "SECRET_PATH": str(tmp_path / "secret"),
            "SECRET_PORT": str(server.getsockname()[1]),
            "MARKER": f"glm45-left-behind-{os.getpid()}",
            "server": server,
        }


def fill_in(program: str, secrets: dict) -> str:
    for name in ("SECRET_PATH", "SECRET_PORT", "MARKER"):
        program = program.replace(name, secrets[name])
    return program


def processes_named(marker: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker in (folder / "cmdline").read_text(errors="replace").split("\0")[0]:
                found.append(folder.name)
        except OSError:
            pass
    return found


@needs_sandbox
@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_contained(name, secrets):
    start = time.monotonic()
    result = run_python(fill_in(HOSTILE[name], secrets), limits=LIMITS)
    assert time.monotonic() - start < 60  # whatever the load: these programs would never end
    assert "XYZZY" not in result.stdout + result.stderr
    assert len(result.stdout) <= LIMITS.output_bytes
    assert len(result.stderr) <= LIMITS.output_bytes
    assert processes_named(secrets["MARKER"]) == []
    with pytest.raises(BlockingIOError):
        secrets["server"].accept()  # nobody connected
    assert not os.path.exists("/usr/bin/python-hostile")
    assert os.path.exists(os.__file__)
    well = {"file deletion", "leaving children behind", "leaving early", "killing everyone"}
    assert result.status in {"failed", "timeout", "output"} or name in well, result


@needs_sandbox
@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_solution_earns_nothing(name, secrets):
    body = "\n    ".join(fill_in(HOSTILE[name], secrets).splitlines())
    program = f"def answer(x):\n    {body}\n    return -1\n"
    reward = CodeVerifier(LIMITS).score(function_task("t", "?", "answer", [([1], 1), ([2], 4)]), assistant(program))
    assert reward.value == 0.0


@needs_sandbox
def test_a_solution_cannot_pass_by_lying_about_equality_or_printing_results():
    liars = (
        "class Same(int):\n    def __eq__(self, other): return True\ndef answer(x): return Same(7)",
        "import builtins, json\njson.dumps = lambda value: '{\"value\": true}'\ndef answer(x): return x",
        'import os\nos.write(1, b\'{"value": 1}\\n{"value": 1}\\n\')\ndef answer(x): return -1',
        "import sys, os\nsys.modules['__main__'].results.write('{}')\ndef answer(x): return -1",
    )
    for program in liars:
        task = function_task("t", "?", "answer", [([1], 1), ([2], 4)])
        assert CodeVerifier(LIMITS).score(task, assistant(program)).value == 0.0, program


@needs_sandbox
def test_an_honest_program_sees_its_input_and_a_small_world():
    result = run_python(
        "import os\nprint(input(), sorted(os.listdir('/tmp')), len(os.environ), os.getuid() != 0)", "hi"
    )
    assert result.status == "ok"
    assert result.stdout == "hi [] 5 True\n"


@needs_sandbox
def test_the_programs_of_many_sandboxes_do_not_share_a_process_limit():
    from concurrent.futures import ThreadPoolExecutor

    many = "import threading, time\nfor _ in range(10): threading.Thread(target=time.sleep, args=(0.3,)).start()"
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: run_python(many).status, range(4)))
    assert results == ["ok"] * 4


def test_without_bubblewrap_there_is_a_clear_refusal(monkeypatch):
    monkeypatch.setattr(sandbox, "why_unavailable", lambda: "bubblewrap is not installed")
    with pytest.raises(SandboxUnavailableError, match="bubblewrap is not installed; set allow_unsandboxed"):
        run_python("print(1)")
    result = run_python("print(1)", limits=SandboxLimits(allow_unsandboxed=True))
    assert (result.status, result.stdout) == ("ok", "1\n")


def test_the_tests_of_an_answer_share_the_time(monkeypatch):
    """Or an endless program with a few tests would outlast whoever waits for the verdict, and be no wrong answer."""
    ran = []

    def endless(program, stdin, limits):
        ran.append(limits.wall_s)
        status = "ok" if stdin == "quick" else "timeout"
        return sandbox.SandboxResult(status, 0, "", "", 0.5 if stdin == "quick" else limits.wall_s)

    monkeypatch.setattr(code, "run_python", endless)
    task = code.program_task("t", "?", [("quick", ""), ("slow", "x"), ("slow", "y"), ("slow", "z")])
    reward = CodeVerifier(LIMITS).score(task, assistant("while True: pass"))
    assert ran == [1.5, 1.0]
    assert reward.parts == {"correct": 0.0, "passed_share": 0.25, "ended_well": 0.0}
