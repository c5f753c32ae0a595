"""SwiGLU activation over a fused gate-and-up projection. N rows, I intermediate size."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from glm45.kernels import native


def swiglu(gate_up_N2I: torch.Tensor) -> torch.Tensor:
    """Return `silu(gate) * up`, where the last dimension holds gate in its first half and up in its second.

    `[..., 2 * I]` gives `[..., I]`, in the same dtype, computed in fp32.
    """
    if native.supports(gate_up_N2I) and gate_up_N2I.shape[-1] % 32 == 0:
        return _NativeSwiglu.apply(gate_up_N2I)
    return _swiglu_reference(gate_up_N2I)


def _swiglu_reference(gate_up_N2I: torch.Tensor) -> torch.Tensor:
    wide_N2I = gate_up_N2I if gate_up_N2I.dtype == torch.float64 else gate_up_N2I.float()
    gate_NI, up_NI = wide_N2I.chunk(2, dim=-1)
    return (F.silu(gate_NI) * up_NI).to(gate_up_N2I.dtype)


class _NativeSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_N2I: torch.Tensor) -> torch.Tensor:
        gate_up_N2I = gate_up_N2I.contiguous()
        out_NI = gate_up_N2I.new_empty(*gate_up_N2I.shape[:-1], gate_up_N2I.shape[-1] // 2)
        native_swiglu(gate_up_N2I, None, out_NI)
        ctx.save_for_backward(gate_up_N2I)
        return out_NI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NI: torch.Tensor) -> torch.Tensor:
        (gate_up_N2I,) = ctx.saved_tensors
        grad_gate_up_N2I = torch.empty_like(gate_up_N2I)
        native_swiglu_backward(grad_NI.contiguous(), gate_up_N2I, None, grad_gate_up_N2I, None, None)
        return grad_gate_up_N2I


def native_swiglu(gate_up_N2I: torch.Tensor, row_weights_N: torch.Tensor | None, out_NI: torch.Tensor) -> None:
    """Write `row_weight * silu(gate) * up` into `out`."""
    size = out_NI.shape[-1]
    native.function("swiglu_forward", out_NI.dtype)(
        gate_up_N2I, row_weights_N, out_NI, out_NI.numel() // size, size, native.threads_for(out_NI.numel())
    )


def native_swiglu_backward(
    grad_NI: torch.Tensor,
    gate_up_N2I: torch.Tensor,
    row_weights_N: torch.Tensor | None,
    grad_gate_up_N2I: torch.Tensor,
    out_NI: torch.Tensor | None,
    grad_row_weights_N: torch.Tensor | None,
) -> None:
    """Write the gradient of gate and up and, where given, the forward output again and the row weights' gradient.

    `grad_gate_up` may be `gate_up` itself: every element is read before it is written.
    """
    size = grad_NI.shape[-1]
    native.function("swiglu_backward", grad_NI.dtype)(
        *(grad_NI, gate_up_N2I, row_weights_N, grad_gate_up_N2I, out_NI, grad_row_weights_N),
        *(grad_NI.numel() // size, size, native.threads_for(grad_NI.numel())),
    )
