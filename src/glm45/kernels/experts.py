"""Routed experts: each token goes through its chosen SwiGLU experts, and their outputs are added by weight.

N tokens, K experts a token, E experts, D hidden size, I intermediate size of one expert.
"""

import torch
import torch.nn.functional as F

from glm45.kernels.swiglu import swiglu


def routed_experts(
    x_ND: torch.Tensor,
    gate_up_E2ID: torch.Tensor,
    down_EDI: torch.Tensor,
    expert_ids_NK: torch.Tensor,
    weights_NK: torch.Tensor,
) -> torch.Tensor:
    """Return `sum_k weights[n, k] * expert[expert_ids[n, k]](x[n])`, `[N, D]`, in x's dtype.

    Products are in x's dtype whatever the weights'; the sum over a token's experts is in fp32. Differentiable in x,
    both weight tensors and the routing weights.
    """
    return _routed_experts_reference(x_ND, gate_up_E2ID, down_EDI, expert_ids_NK, weights_NK)


def _routed_experts_reference(
    x_ND: torch.Tensor,
    gate_up_E2ID: torch.Tensor,
    down_EDI: torch.Tensor,
    expert_ids_NK: torch.Tensor,
    weights_NK: torch.Tensor,
) -> torch.Tensor:
    out_ND = torch.zeros_like(x_ND, dtype=weights_NK.dtype)
    for expert in range(gate_up_E2ID.shape[0]):
        tokens, choices = torch.where(expert_ids_NK == expert)
        gate_up = F.linear(x_ND[tokens], gate_up_E2ID[expert].flatten(0, 1).to(x_ND.dtype))
        output = F.linear(swiglu(gate_up), down_EDI[expert].to(x_ND.dtype))
        out_ND = out_ND.index_add(0, tokens, output * weights_NK[tokens, choices, None])
    return out_ND.to(x_ND.dtype)
