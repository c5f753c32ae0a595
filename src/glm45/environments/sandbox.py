"""Run programs that nobody trusts: bubblewrap with no network, a read-only system, a private /tmp and hard limits.

The program sees the system's libraries and one Python, and nothing else of the machine: no home, no environment
variables, no other process. Whatever it starts dies with it. Where bubblewrap is missing the answer is a refusal;
`allow_unsandboxed` is for people who know that the programs are their own.
"""

import contextlib
import itertools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from glm45.config import configuration

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
PYTHON = "/python"
"""Where the interpreter's installation is mounted inside."""

# Runs inside, before the program: limits that must not bind bubblewrap itself, and for root a real change of user,
# because the kernel exempts uid 0 from the limit on processes.
LAUNCHER = """
import json, os, resource, sys
limits, user = json.loads(sys.argv[1]), int(sys.argv[2])
if user:
    os.setgroups([]); os.setresgid(user, user, user); os.setresuid(user, user, user)
for name, value in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
os.execv(sys.argv[3], sys.argv[3:])
"""

PREFIX = "glm45-sandbox-"

_next_user = itertools.count()


class SandboxUnavailableError(RuntimeError):
    """There is no sandbox on this machine, so the program was not run."""


@configuration
class SandboxLimits:
    """What a program may use. Not in the report."""

    wall_s: float = 10.0
    """Seconds from start to end; of code tasks, for all the tests of one answer. Not in the report."""
    cpu_s: int = 10
    """CPU seconds of each process. Not in the report."""
    memory_mb: int = 512
    """Address space of each process, in MiB. Not in the report."""
    num_processes: int = 16
    """Processes and threads alive at once. Not in the report."""
    output_bytes: int = 1 << 20
    """Bytes of standard output, and of standard error, after which the program is stopped. Not in the report."""
    file_mb: int = 16
    """Size of a file, and of all of /tmp, in MiB. Not in the report."""
    allow_unsandboxed: bool = False
    """Run with plain process limits where bubblewrap is missing: no protection of files or network. Not in the
    report."""


@dataclass(frozen=True, slots=True)
class SandboxResult:
    """How a program ended: `status` is "ok" (exit status 0), "failed" (another), "timeout" or "output" (too much)."""

    status: str
    exit_status: int
    stdout: str
    stderr: str
    wall_s: float


@cache
def why_unavailable() -> str:
    """Return why programs cannot be sandboxed here, or an empty string if they can."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed (Debian: apt-get install bubblewrap)"
    limits = SandboxLimits()
    with tempfile.TemporaryDirectory() as folder:
        trial = subprocess.run(
            [*_bubblewrap(Path(folder), limits), *_inside(limits), "-c", "print(6*7)"], capture_output=True, timeout=30
        )
    if trial.stdout.strip() != b"42":
        return f"bubblewrap does not work here: {trial.stderr.decode(errors='replace').strip()[-300:]}"
    return ""


def run_python(
    program: str, stdin: str = "", limits: SandboxLimits | None = None, files: dict[str, str] | None = None
) -> SandboxResult:
    """Run a Python program in the sandbox and return how it ended.

    `files` (name to text) lie read-only in /work, the working directory, beside the program. Raises
    SandboxUnavailableError where there is no sandbox and `limits.allow_unsandboxed` is false.
    """
    limits = limits or SandboxLimits()
    reason = why_unavailable()
    if reason and not limits.allow_unsandboxed:
        raise SandboxUnavailableError(
            f"untrusted code was not run: {reason}; set allow_unsandboxed only if every program is trusted"
        )
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # the program runs as another user
        for file_name, text in {**(files or {}), "program.py": program}.items():
            (folder / file_name).write_text(text, encoding="utf-8", errors="surrogateescape")
        if reason:
            command = [*_launch(sys.executable, limits, user=0), str(folder / "program.py")]
        else:
            command = [*_bubblewrap(folder, limits), *_inside(limits), "/work/program.py"]
        return _run_limited(command, stdin, limits, folder)


def remove_folders_of(pid: int) -> None:
    """Remove the folders of programs that a process ran when it was killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}{pid}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _bubblewrap(folder: Path, limits: SandboxLimits) -> list[str]:
    command = ["bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox"]
    if os.geteuid() == 0:  # no user namespace: the launcher needs a real change of user, see LAUNCHER
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    for path in SYSTEM:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            command += ["--ro-bind", path, path]
    command += ["--ro-bind", sys.base_prefix, PYTHON, "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    command += ["--perms", "1777", "--size", str(limits.file_mb << 20), "--tmpfs", "/tmp"]
    command += ["--ro-bind", str(folder), "/work", "--remount-ro", "/", "--chdir", "/work"]
    for name, value in {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}.items():
        command += ["--setenv", name, value]
    return command


def _launch(python: str, limits: SandboxLimits, user: int) -> list[str]:
    """Return the command that sets the limits and starts an isolated Python, up to the program's name."""
    numbers = {
        "CPU": limits.cpu_s,
        "AS": limits.memory_mb << 20,
        "FSIZE": limits.file_mb << 20,
        "NOFILE": 256,
        "CORE": 0,
        "NPROC": limits.num_processes,
    }
    return [python, "-I", "-S", "-c", LAUNCHER, json.dumps(numbers), str(user), python, "-I"]


def _inside(limits: SandboxLimits) -> list[str]:
    python = f"{PYTHON}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    # Every sandbox gets a user of its own: the kernel counts processes by user.
    user = 0x40000000 + (os.getpid() * 64 + next(_next_user) % 64) % 0x20000000 if os.geteuid() == 0 else 0
    return _launch(python, limits, user)


def _run_limited(command: list[str], stdin: str, limits: SandboxLimits, folder: Path) -> SandboxResult:
    (folder / "stdin").write_text(stdin, encoding="utf-8", errors="surrogateescape")
    start = time.monotonic()
    with open(folder / "stdin", "rb") as source:
        process = subprocess.Popen(
            command,
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            cwd=folder,
        )
    try:
        stdout, stderr, status = _collect(process, start + limits.wall_s, limits.output_bytes)
    finally:
        _kill(process)
    if status == "ok" and process.returncode != 0:
        status = "failed"
    return SandboxResult(
        status=status,
        exit_status=process.returncode,
        stdout=stdout.decode("utf-8", "replace"),
        stderr=stderr.decode("utf-8", "replace"),
        wall_s=time.monotonic() - start,
    )


def _collect(process: subprocess.Popen[bytes], deadline: float, output_bytes: int) -> tuple[bytes, bytes, str]:
    """Read both streams until the program ends, the deadline passes or one stream grows past its limit."""
    assert process.stdout is not None
    assert process.stderr is not None
    parts: dict[int, bytearray] = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    status = "ok"
    with selectors.DefaultSelector() as selector:
        for descriptor in parts:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map() and status == "ok":
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                status = "timeout"
            for key, _ in ready:
                chunk = os.read(key.fd, 1 << 16)
                parts[key.fd] += chunk
                if not chunk:
                    selector.unregister(key.fd)
                elif len(parts[key.fd]) > output_bytes:
                    status = "output"
    if status == "ok":
        try:
            process.wait(max(0.0, deadline - time.monotonic()))  # it may have closed both streams and gone on
        except subprocess.TimeoutExpired:
            status = "timeout"
    stdout, stderr = (bytes(part[:output_bytes]) for part in parts.values())
    return stdout, stderr, status


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill bubblewrap; the kernel then ends every process of its namespace."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stderr.close()
