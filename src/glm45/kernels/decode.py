"""Decoding on CPU in one native call a step: the layers of a GLM-4.5-class model over a paged cache.

This file is the interface to `native/decode.cpp`: structures, packed weights, pointers. Its plain reference is the
model's own forward over the engine's paged cache; `engine.native` builds the structures from a model.

N rows, O outputs, I inputs, D hidden size, V vocabulary.
"""

import ctypes
import mmap
from ctypes import c_double, c_int64, c_void_p
from typing import Any

import numpy as np
import torch

from glm45.kernels.native import library

BLOCK_SIZE = 16
"""Tokens of a cache block: one vector of scores."""
HEAD_SIZES = (16, 32, 64, 128)
"""Head sizes that have a kernel."""
PANEL = 64
"""Outputs that are packed, and computed, together."""


class Shape(ctypes.Structure):
    """What all layers share; pointers to fp32 tables and to the packed head."""

    _fields_ = (
        [(name, c_int64) for name in ("hidden", "groups", "group_heads", "head_dim", "rotary_half")]
        + [(name, c_int64) for name in ("experts", "top_k", "moe_width", "vocab", "norm_top_k")]
        + [(name, c_double) for name in ("eps", "scale", "routed_scale")]
        + [(name, c_void_p) for name in ("embeddings", "cosines", "sines", "head")]
    )


class Layer(ctypes.Structure):
    """Pointers to one layer's weights and to its part of the cache; null where a layer has no such weight."""

    _fields_ = (
        [(name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm", "qkv_bias", "qkv", "o_proj")]
        + [(name, c_void_p) for name in ("router", "router_bias", "expert_gate_up", "expert_down", "gate_up", "down")]
        + [("width", c_int64)]
        + [(name, c_void_p) for name in ("keys", "values")]
    )


class Mtp(ctypes.Structure):
    """Pointers to what the MTP layer has before its decoder layer."""

    _fields_ = tuple((name, c_void_p) for name in ("embedding_norm", "hidden_norm", "combine"))


def is_available(bf16: bool) -> bool:
    """Say whether the kernels run here; in bf16 they need AVX512-BF16."""
    native = library()
    return native is not None and (not bf16 or bool(_typed(native).decoder_has_bf16()))


class Memory:
    """Zeroed memory on huge pages, taken once and kept; untouched parts of it cost nothing.

    Weights are read in one stream for every token: from ordinary pages that is up to three times slower.
    """

    def __init__(self, num_bytes: int) -> None:
        # Private, not Python's default: shared memory gets no huge pages.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self._map = mmap.mmap(-1, max(num_bytes, 1) + (1 << 21), **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._used = -self._bytes.ctypes.data % (1 << 21)

    def take(self, num_bytes: int) -> np.ndarray:
        """Return the next bytes, aligned to a cache line."""
        start = self._used
        self._used += -(-num_bytes // 64) * 64
        assert self._used <= len(self._bytes), "the memory was measured too small"
        return self._bytes[start : start + num_bytes]


class Decoder:
    """A pool of threads with its workspace, and calls into the kernels. Use it from one thread at a time."""

    def __init__(self, num_threads: int, bf16: bool) -> None:
        native = library()
        assert native is not None, "check is_available first"
        self._native = _typed(native)
        self._bf16 = int(bf16)
        self._handle = c_void_p(self._native.decoder_create(num_threads))
        self._tokens_N = np.zeros(0, np.int32)
        self._logprobs_N = np.zeros(0, np.float32)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._native.decoder_destroy(self._handle)

    def packed_bytes(self, weight: torch.Tensor, gated: bool = False) -> int:
        """How much memory `pack` needs for `[..., O, I]` or, gated, `[..., 2, O, I]`."""
        outputs, inputs, count = _matrix(weight, gated)
        return count * self._native.decoder_packed_size(outputs, inputs, gated, self._bf16)

    def pack(self, weight: torch.Tensor, packed: np.ndarray, gated: bool = False) -> None:
        """Lay out a weight (or a stack of them) in panels of 64 outputs, gate and up side by side if `gated`."""
        outputs, inputs, count = _matrix(weight, gated)
        size = self._native.decoder_packed_size(outputs, inputs, gated, self._bf16)
        wide = weight.detach().float().contiguous()
        for i in range(count):
            source = wide.data_ptr() + i * outputs * inputs * 4
            target = packed.ctypes.data + i * size
            self._native.decoder_pack(source, outputs, inputs, gated, self._bf16, target)

    def forward(
        self,
        shape: Shape,
        layers: "ctypes.Array[Layer]",
        final_norm: int,
        rows: tuple[np.ndarray, ...],
        first_slot: int,
        mtp: Mtp | None = None,
        hidden_ND: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run layers over rows (tokens, positions, slots, sequences, blocks, block starts); return normed `[N, D]`."""
        out_ND = torch.empty(len(rows[0]), shape.hidden)
        self._native.decoder_forward(
            self._handle,
            ctypes.byref(shape),
            layers,
            len(layers),
            None if mtp is None else ctypes.byref(mtp),
            len(rows[0]),
            *[array.ctypes.data for array in rows],
            first_slot,
            None if hidden_ND is None else hidden_ND.data_ptr(),
            final_norm,
            self._bf16,
            out_ND.data_ptr(),
        )
        return out_ND

    def head(self, shape: Shape, hidden_ND: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """Return logits `[len(rows), V]` of some rows; the result is a view of padded rows."""
        logits = torch.empty(len(rows), -(-shape.vocab // PANEL) * PANEL)
        self._native.decoder_head(
            self._handle,
            ctypes.byref(shape),
            hidden_ND.data_ptr(),
            rows.ctypes.data,
            len(rows),
            self._bf16,
            logits.data_ptr(),
        )
        return logits[:, : shape.vocab]

    def sample(
        self, logits_NV: torch.Tensor, temperatures_N: np.ndarray, seeds_N: np.ndarray, counters_N: np.ndarray
    ) -> tuple[list[int], list[float]]:
        """Draw a token a row from softmax(logits / temperature); return tokens and their log-probabilities."""
        num_rows, vocab = logits_NV.shape
        tokens_N, logprobs_N = np.empty(num_rows, np.int32), np.empty(num_rows, np.float32)
        self._native.decoder_sample(
            self._handle,
            logits_NV.data_ptr(),
            num_rows,
            vocab,
            logits_NV.stride(0),
            *[array.ctypes.data for array in (temperatures_N, seeds_N, counters_N, tokens_N, logprobs_N)],
        )
        return tokens_N.tolist(), logprobs_N.tolist()


def _matrix(weight: torch.Tensor, gated: bool) -> tuple[int, int, int]:
    """Outputs and inputs of one matrix of a stack, and how many there are."""
    inputs = weight.shape[-1]
    outputs = weight.shape[-2] * (2 if gated else 1)
    return outputs, inputs, weight.numel() // (outputs * inputs)


def _typed(native: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the C functions: without it, integers would be passed in 32 bits."""
    pointer: Any = c_void_p
    number: Any = c_int64
    native.decoder_create.restype, native.decoder_create.argtypes = pointer, [number]
    native.decoder_destroy.restype, native.decoder_destroy.argtypes = None, [pointer]
    native.decoder_has_bf16.restype, native.decoder_has_bf16.argtypes = number, []
    native.decoder_packed_size.restype, native.decoder_packed_size.argtypes = number, [number] * 4
    native.decoder_pack.restype, native.decoder_pack.argtypes = None, [pointer, *[number] * 4, pointer]
    native.decoder_forward.restype = None
    native.decoder_forward.argtypes = [
        *(pointer, pointer, pointer, number, pointer, number, *[pointer] * 6),
        *(number, pointer, pointer, number, pointer),
    ]
    native.decoder_head.restype = None
    native.decoder_head.argtypes = [pointer, pointer, pointer, pointer, number, number, pointer]
    native.decoder_sample.restype = None
    native.decoder_sample.argtypes = [pointer, pointer, number, number, number, *[pointer] * 5]
    return native
