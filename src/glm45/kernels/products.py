"""Matrix products of bf16 activations on CPU, in the arithmetic unit that is fastest there.

M rows, N columns, K terms of a sum, G groups of rows R. How fast bf16 units are against fp32 and fp16 ones differs
widely between processors (those with AMX lead, some with AVX512-BF16 alone are slower than in fp32), so `bf16_unit`
measures once per machine and keeps the answer beside the compiled kernels:

- "torch": `torch.mm` on bf16 operands; weights are cast to bf16 and the cast copy is kept for the backward pass.
- "fp32": native products with fp32 arithmetic; reads bf16 and fp32 operands as they are.
- "fp16": native products with AVX512-FP16, every row and column scaled into range; eleven bits instead of eight.

Whichever it is, sums end in fp32 and operands are at least as exact as bf16.
"""

import functools
import itertools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from glm45.files import write_atomically
from glm45.kernels import native

UNITS = ("torch", "fp32", "fp16")
MIN_ROWS = 64
"""With fewer rows than this, packing the weight costs more than a faster unit saves."""
PROBE_SIZES = (512, 256, 512)
PROBE_SECONDS = 0.2
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


def prepare(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight as `product` wants it beside operands of `dtype`: cast, unless native products read it."""
    return weight if _takes(weight, dtype) else weight.to(dtype)


def beats_torch(x_NI: torch.Tensor, weight: torch.Tensor) -> bool:
    """Say whether native products serve better even where operands are of one dtype, and nothing has to be cast."""
    return x_NI.numel() >= MIN_ROWS * x_NI.shape[-1] and type(x_NI) in native.PLAIN and _takes(weight, x_NI.dtype)


def product(
    a_MK: torch.Tensor,
    b_KN: torch.Tensor,
    *,
    out_MN: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    bias_N: torch.Tensor | None = None,
    add: bool = False,
) -> torch.Tensor:
    """Return `a @ b + bias`, in `out` where given (with `add`, added to it), else in `dtype` (default: a's).

    Operands may be transposed views. Where any of the three is in bf16, native products serve if they are this
    machine's fastest, and take any mixture of bf16 and fp32; elsewhere operands must be of one dtype, and a result
    of another is cast.
    """
    if out_MN is None:
        out_MN = a_MK.new_empty(a_MK.shape[0], b_KN.shape[1], dtype=dtype or a_MK.dtype)
    half = torch.bfloat16 in (a_MK.dtype, b_KN.dtype, out_MN.dtype)
    if half and type(a_MK) in native.PLAIN and _takes(b_KN, torch.bfloat16):
        return _native_product(a_MK, b_KN, out_MN, bias_N, add=add, fp16=bf16_unit() == "fp16")
    if out_MN.dtype == a_MK.dtype and bias_N is None:
        return out_MN.addmm_(a_MK, b_KN) if add else torch.mm(a_MK, b_KN, out=out_MN)
    computed = a_MK @ b_KN if bias_N is None else torch.addmm(bias_N.to(a_MK.dtype), a_MK, b_KN)
    return out_MN.add_(computed) if add else out_MN.copy_(computed)


def _takes(operand: torch.Tensor, dtype: torch.dtype) -> bool:
    """Native products serve bf16 activations on CPU, where they are faster than torch's."""
    return dtype == torch.bfloat16 and native.supports(operand) and bf16_unit() != "torch"


def _native_product(
    a_MK: torch.Tensor,
    b_KN: torch.Tensor,
    out_MN: torch.Tensor,
    bias_N: torch.Tensor | None,
    *,
    add: bool,
    fp16: bool,
) -> torch.Tensor:
    (rows, terms), columns = a_MK.shape, b_KN.shape[1]
    assert out_MN.shape == (rows, columns)
    assert out_MN.stride(1) == 1 or columns <= 1, f"rows must be contiguous, not of strides {out_MN.stride()}"
    bias_N = None if bias_N is None else bias_N.float().contiguous()
    if rows and columns and terms:
        native.function("matmul")(
            *(native.pointer(a_MK), _TYPES[a_MK.dtype], *a_MK.stride()),
            *(native.pointer(b_KN), _TYPES[b_KN.dtype], *b_KN.stride()),
            *(native.pointer(out_MN), _TYPES[out_MN.dtype], out_MN.stride(0), bias_N),
            *(rows, columns, terms, int(add), int(fp16), native.threads_for(rows * columns)),
        )
    elif not add:
        out_MN.zero_()
    return out_MN


@dataclass(frozen=True)
class Groups:
    """Consecutive slices of rows, one for each of G matrices."""

    offsets: torch.Tensor
    """Where each slice begins, and where the last one ends, `[G + 1]` int64."""
    slices: list[tuple[int, slice]]
    """The matrix and the rows of every slice that is not empty."""

    @classmethod
    def of(cls, offsets: torch.Tensor) -> "Groups":
        """Read the offsets."""
        bounds = offsets.tolist()
        pairs = itertools.pairwise(bounds)
        return cls(offsets, [(g, slice(start, stop)) for g, (start, stop) in enumerate(pairs) if start < stop])

    def __len__(self) -> int:
        return self.offsets.numel() - 1


def product_by_rows(a_MK: torch.Tensor, b_GKN: torch.Tensor, groups: Groups, out_MN: torch.Tensor) -> None:
    """Write `out[rows] = a[rows] @ b[g]` for every group g of rows."""
    if not (out_MN.dtype == torch.bfloat16 and _takes(b_GKN, torch.bfloat16)):
        for group, rows in groups.slices:
            product(a_MK[rows], b_GKN[group], out_MN=out_MN[rows])
        return
    native.function("matmul_groups")(
        *(native.pointer(a_MK), _TYPES[a_MK.dtype], *a_MK.stride()),
        *(native.pointer(b_GKN), _TYPES[b_GKN.dtype], *b_GKN.stride()),
        *(native.pointer(out_MN), _TYPES[out_MN.dtype], out_MN.stride(0)),
        *(groups.offsets, len(groups), *b_GKN.shape[:0:-1], int(bf16_unit() == "fp16")),
        native.threads_for(out_MN.numel() // len(groups)),
    )


def product_by_terms(a_RM: torch.Tensor, b_RN: torch.Tensor, groups: Groups, dtype: torch.dtype) -> torch.Tensor:
    """Return `[G, M, N]`: `a[rows].T @ b[rows]` for every group of rows, zeros for one without any."""
    shape = (len(groups), a_RM.shape[1], b_RN.shape[1])
    full = len(groups.slices) == len(groups)
    out_GMN = a_RM.new_empty(shape, dtype=dtype) if full else a_RM.new_zeros(shape, dtype=dtype)
    if not _takes(a_RM, a_RM.dtype):
        for group, rows in groups.slices:
            product(a_RM[rows].T, b_RN[rows], out_MN=out_GMN[group])
        return out_GMN
    native.function("matmul_term_groups")(
        *(native.pointer(a_RM), _TYPES[a_RM.dtype], a_RM.stride(1), a_RM.stride(0)),
        *(native.pointer(b_RN), _TYPES[b_RN.dtype], *b_RN.stride()),
        *(native.pointer(out_GMN), _TYPES[out_GMN.dtype], *out_GMN.stride()[:2]),
        *(groups.offsets, len(groups), *shape[1:], int(bf16_unit() == "fp16")),
        native.threads_for(out_GMN.numel() // len(groups)),
    )
    return out_GMN


@functools.cache
def bf16_unit() -> str:
    """Return which unit multiplies bf16 activations on this machine's CPU: one of `UNITS`.

    GLM45_PRODUCTS chooses by hand. Otherwise it is measured once, and read from the cache folder ever after, so that
    runs on one machine repeat bit for bit. Raises ValueError for an unknown choice.
    """
    chosen = os.environ.get("GLM45_PRODUCTS")
    if chosen and chosen not in UNITS:
        raise ValueError(f"GLM45_PRODUCTS={chosen!r} is none of {', '.join(UNITS)}")
    if chosen or native.library() is None:
        return chosen or "torch"
    measured = rates()
    return max((unit for unit in UNITS if unit in measured), key=measured.__getitem__)


def rates() -> dict[str, float]:
    """Return operations a second of each unit that is here, and of torch in fp32, as measured on this machine once.

    There must be a native library: the measurement is kept beside it.
    """
    path = native.cached_file("products.json")
    try:
        measured = {str(unit): float(rate) for unit, rate in json.loads(path.read_text()).items()}
        if {"torch fp32", "torch"} <= set(measured):
            return measured
    except (OSError, ValueError, AttributeError):
        pass  # not measured yet, or not by this version
    measured = _measure()
    write_atomically(path, json.dumps(measured))
    return measured


def _measure() -> dict[str, float]:
    rows, terms, columns = PROBE_SIZES
    a_MK, weight_NK = torch.ones(rows, terms).bfloat16(), torch.ones(columns, terms).bfloat16()
    out_MN = a_MK.new_empty(rows, columns)
    wide_MK, wide_KN, wide_MN = a_MK.float(), weight_NK.T.float(), out_MN.float()
    steps: dict[str, Callable[[], Any]] = {
        "torch fp32": lambda: torch.mm(wide_MK, wide_KN, out=wide_MN),
        "torch": lambda: torch.mm(a_MK, weight_NK.T, out=out_MN),
        "fp32": lambda: _native_product(a_MK, weight_NK.T, out_MN, None, add=False, fp16=False),
    }
    if native.has("has_fp16"):
        steps["fp16"] = lambda: _native_product(a_MK, weight_NK.T, out_MN, None, add=False, fp16=True)
    seconds: dict[str, list[float]] = {unit: [] for unit in steps}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other measure the machine's other work
    stop = time.perf_counter() + PROBE_SECONDS
    while time.perf_counter() < stop:  # alternating, so that a busy moment hits all alike
        for unit, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[unit].append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return {unit: 2 * rows * terms * columns / min(measured) for unit, measured in seconds.items()}
