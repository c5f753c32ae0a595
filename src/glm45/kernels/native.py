"""Native CPU kernels: compiled with g++ on first use, cached for the user, called through a plain C interface.

`library()` is None wherever they cannot run, and every operator then takes its PyTorch reference; `status()` says
which it is and why. Set GLM45_NATIVE=0 to go without. The cache is keyed by the sources, the compiler, its flags and
the processor, so that a home folder shared by different machines holds one library for each.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

SOURCES = Path(__file__).parent / "native"
FLAGS = [
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
    *("-fopenmp", "-shared", "-fPIC", "-fvisibility=hidden"),
]
COMPILE_SECONDS = 600
MIN_PARALLEL_ELEMENTS = 1 << 15
"""Below this many elements, starting a second thread costs more than it saves."""

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
PLAIN = (torch.Tensor, torch.nn.Parameter)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """Whether the native kernels run here."""

    library: ctypes.CDLL | None
    reason: str
    """Where the library is, or why there is none."""


def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where they cannot be had (the reason is logged once)."""
    return status().library


@functools.cache
def status() -> Status:
    """Compile or find the library, load it, and say what came of it."""
    if os.environ.get("GLM45_NATIVE", "1") == "0":
        return Status(None, "switched off by GLM45_NATIVE=0")
    try:
        path = build(cache_folder())
        return Status(ctypes.CDLL(str(path)), str(path))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        logger.warning("native kernels are not available, PyTorch's own run instead: %s", error)
        return Status(None, str(error))


def supports(*tensors: torch.Tensor | None) -> bool:
    """Say whether native kernels take these tensors: plain ones on CPU, fp32 or bf16, all of one dtype.

    Not a distributed or a fake tensor, whose memory is not its own, and not while somebody watches.
    """
    if watched():
        return False
    present = [tensor for tensor in tensors if tensor is not None]
    dtype = present[0].dtype
    for tensor in present:
        if type(tensor) not in PLAIN or tensor.device.type != "cpu" or tensor.dtype != dtype:
            return False
    return dtype in DTYPES and library() is not None


def watched() -> bool:
    """Say whether `torch.compile` traces or a dispatch mode (a counter of operations, say) follows what torch does."""
    return is_in_torch_dispatch_mode() or torch.compiler.is_compiling()


def has(probe: str) -> bool:
    """Say whether the library was compiled with a feature: `probe` names a function that returns 0 or 1."""
    loaded = library()
    return loaded is not None and bool(getattr(loaded, probe)())


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    """Return where a tensor of any strides begins."""
    return ctypes.c_void_p(tensor.data_ptr())


def function(name: str, dtype: torch.dtype | None = None) -> Callable[..., None]:
    """Return a kernel that takes tensors (contiguous, kept alive by the caller), None, integers and floats."""
    return _function(name if dtype is None else f"{name}_{DTYPES[dtype]}")


def threads_for(elements: int) -> int:
    """Return how many threads to use for work on so many elements: torch's own number, or one for little work."""
    return torch.get_num_threads() if elements >= MIN_PARALLEL_ELEMENTS else 1


def cache_folder() -> Path:
    """Return the folder of compiled kernels: $GLM45_CACHE, else $XDG_CACHE_HOME/glm45, else ~/.cache/glm45."""
    chosen = os.environ.get("GLM45_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glm45"


def cached_file(name: str) -> Path:
    """Return the path of a file that belongs to this very library, beside it."""
    path = Path(status().reason)
    return path.with_name(f"{path.stem}-{name}")


def build(folder: Path) -> Path:
    """Return the compiled library in `folder`, compiling it where it is not there yet.

    Processes that start together wait for the one that compiles; the library appears whole or not at all. Raises
    RuntimeError where there is no compiler or it fails, OSError where the folder cannot be written.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("no C++ compiler: install g++, or set CXX")
    path = folder / f"kernels-{_key(compiler)}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(compiler, path)
    return path


def _compile(compiler: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        partial, sources = Path(scratch) / path.name, sorted(SOURCES.glob("*.cpp"))
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        list(pool.map(lambda source, made: _run(compiler, "-c", source, "-o", made), sources, objects))
        _run(compiler, *objects, *_openmp_of_torch(), "-o", partial)
        os.replace(partial, path)


def _run(compiler: str, *arguments: str | Path) -> None:
    run = subprocess.run(
        [compiler, *FLAGS, *map(str, arguments)], capture_output=True, text=True, timeout=COMPILE_SECONDS
    )
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines()
        raise RuntimeError(f"{compiler} failed with status {run.returncode}: {lines[0] if lines else 'no message'}")


def _openmp_of_torch() -> list[str]:
    """Link torch's own OpenMP where it ships one: two runtimes in a process would keep two pools of threads."""
    shipped = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return [str(shipped[0]), "-Wl,--as-needed"] if shipped else []


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=COMPILE_SECONDS).stdout
    parts = [version, *FLAGS, *_openmp_of_torch(), _processor()]
    parts += [source.name + source.read_text() for source in sorted(SOURCES.iterdir())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Return what `-march=native` depends on: the processor's model and its features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    kept = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.startswith(kept))


@functools.cache
def _function(symbol: str) -> Callable[..., None]:
    loaded = library()
    assert loaded is not None, f"{symbol} was asked for without a library: check `supports` first"
    entry = getattr(loaded, symbol)
    entry.restype = None

    def call(*arguments: Any) -> None:
        entry(*[_to_c(argument) for argument in arguments])

    return call


def _to_c(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        assert argument.is_contiguous(), f"a native kernel was given strides {argument.stride()}"
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument
