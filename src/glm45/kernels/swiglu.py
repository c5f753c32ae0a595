"""SwiGLU activation over a fused gate-and-up projection. I intermediate size."""

import torch
import torch.nn.functional as F


def swiglu(gate_up_2I: torch.Tensor) -> torch.Tensor:
    """Return `silu(gate) * up`, where the last dimension holds gate in its first half and up in its second.

    `[..., 2 * I]` gives `[..., I]`, in the same dtype, computed in fp32.
    """
    return _swiglu_reference(gate_up_2I)


def _swiglu_reference(gate_up_2I: torch.Tensor) -> torch.Tensor:
    wide_2I = gate_up_2I if gate_up_2I.dtype == torch.float64 else gate_up_2I.float()
    gate_I, up_I = wide_2I.chunk(2, dim=-1)
    return (F.silu(gate_I) * up_I).to(gate_up_2I.dtype)
