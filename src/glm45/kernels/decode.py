"""Decoding on CPU in one native call a step: the layers of a GLM-4.5-class model over a paged cache.

This file is the interface to `native/decode.cpp`: structures, packed weights, pointers. Its plain reference is the
model's own forward over the engine's paged cache; `engine.native` builds the structures from a model.

N rows, O outputs, I inputs, D hidden size, V vocabulary, S sequences, k drafts.
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


class Rows(ctypes.Structure):
    """Where a step's rows stand and where their keys and values go: int32 arrays, as in `engine.batch`."""

    _fields_ = (
        ("count", c_int64),
        *((name, c_void_p) for name in ("tokens", "positions", "slots", "sequence", "blocks", "block_starts")),
        ("first_slot", c_int64),
    )

    @classmethod
    def of(cls, arrays: tuple[np.ndarray, ...], first_slot: int) -> "Rows":
        """Point to arrays in the order of the fields."""
        rows = cls(len(arrays[0]), *map(_address, arrays), first_slot)
        rows.arrays = arrays  # so that they live as long
        return rows


class Draws(ctypes.Structure):
    """How each of some sequences draws: temperatures in fp32, seeds and next positions in uint64."""

    _fields_ = (("count", c_int64), *((name, c_void_p) for name in ("temperatures", "seeds", "positions")))

    @classmethod
    def of(cls, *arrays: np.ndarray) -> "Draws":
        """Point to arrays in the order of the fields."""
        draws = cls(len(arrays[0]), *map(_address, arrays))
        draws.arrays = arrays  # so that they live as long
        return draws


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

    def forward(self, shape: Shape, layers: "ctypes.Array[Layer]", final_norm: int, rows: Rows) -> torch.Tensor:
        """Run layers over rows; return normed `[N, D]`."""
        out_ND = torch.empty(rows.count, shape.hidden)
        self._native.decoder_forward(
            self._handle, shape, layers, len(layers), rows, final_norm, self._bf16, out_ND.data_ptr()
        )
        return out_ND

    def draft(
        self,
        shape: Shape,
        layers: "ctypes.Array[Layer]",
        mtp: Mtp,
        final_norm: int,
        rows: Rows,
        hidden_ND: torch.Tensor,
        last_rows_S: np.ndarray,
        draws: Draws,
        num_drafts: int,
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Run the MTP layer over rows, then draft for some sequences, each after its last row.

        Returns tokens `[S, k]` and the probabilities that they were drawn from, a view `[S, k, V]` of padded rows.
        """
        tokens_SK = np.empty((draws.count, num_drafts), np.int32)
        probs_SKV = torch.empty(draws.count, num_drafts, _padded(shape.vocab))
        self._native.decoder_draft(
            *(self._handle, shape, layers, len(layers), mtp, rows, hidden_ND.data_ptr(), final_norm),
            *(_address(last_rows_S), draws, num_drafts, self._bf16, _address(tokens_SK), probs_SKV.data_ptr()),
        )
        return tokens_SK, probs_SKV[:, :, : shape.vocab]

    def head(self, shape: Shape, hidden_ND: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """Return logits `[len(rows), V]` of some rows; the result is a view of padded rows."""
        logits = torch.empty(len(rows), _padded(shape.vocab))
        self._native.decoder_head(
            *(self._handle, shape, hidden_ND.data_ptr(), _address(rows), len(rows), self._bf16, logits.data_ptr())
        )
        return logits[:, : shape.vocab]

    def sample(
        self,
        logits_NV: torch.Tensor,
        draws: Draws,
        starts_S1: np.ndarray,
        drafts: np.ndarray,
        draft_probs: list[torch.Tensor | None],
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Draw from softmax(logits / temperature), verifying drafts; return each sequence's tokens and their logprobs.

        Rows `starts[i]` to `starts[i + 1]` belong to sequence i; both the logits and the drafts' probabilities are as
        `head` and `draft` return them.
        """
        num_rows, vocab = logits_NV.shape
        probs_S = np.array([0 if probs is None else probs.data_ptr() for probs in draft_probs], np.uint64)
        tokens_N, logprobs_N = np.empty(num_rows, np.int32), np.empty(num_rows, np.float32)
        counts_S = np.empty(draws.count, np.int32)
        self._native.decoder_sample(
            *(self._handle, logits_NV.data_ptr(), vocab, logits_NV.stride(0), draws),
            *map(_address, (starts_S1, drafts, probs_S, tokens_N, logprobs_N, counts_S)),
        )
        tokens, logprobs, starts = tokens_N.tolist(), logprobs_N.tolist(), starts_S1.tolist()
        spans = [slice(start, start + count) for start, count in zip(starts, counts_S.tolist(), strict=False)]
        return [tokens[span] for span in spans], [logprobs[span] for span in spans]


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _padded(outputs: int) -> int:
    return -(-outputs // PANEL) * PANEL


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
    shape, layers, mtp, rows, draws = (ctypes.POINTER(kind) for kind in (Shape, Layer, Mtp, Rows, Draws))
    native.decoder_forward.restype = None
    native.decoder_forward.argtypes = [pointer, shape, layers, number, rows, pointer, number, pointer]
    native.decoder_head.restype = None
    native.decoder_head.argtypes = [pointer, shape, pointer, pointer, number, number, pointer]
    native.decoder_draft.restype = None
    native.decoder_draft.argtypes = [
        *(pointer, shape, layers, number, mtp, rows, pointer, pointer),
        *(pointer, draws, number, number, pointer, pointer),
    ]
    native.decoder_sample.restype = None
    native.decoder_sample.argtypes = [pointer, pointer, number, number, draws, *[pointer] * 6]
    return native
