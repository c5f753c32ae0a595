"""Routed experts: each token goes through its chosen SwiGLU experts, and their outputs are added by weight.

N tokens, K experts a token, E experts, D hidden size, I intermediate size of one expert. A pair is one (token,
choice); R = N * K rows are the pairs sorted by expert, so that each expert's rows are one slice.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from glm45.kernels import native
from glm45.kernels.products import Groups, prepare, product_by_rows, product_by_terms
from glm45.kernels.swiglu import native_swiglu, native_swiglu_backward, swiglu


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
    sizes_fit = x_ND.shape[-1] % 16 == 0 and down_EDI.shape[-1] % 16 == 0
    if sizes_fit and native.supports(x_ND) and native.supports(weights_NK) and weights_NK.dtype == torch.float32:
        return _NativeExperts.apply(x_ND, gate_up_E2ID, down_EDI, expert_ids_NK, weights_NK)
    if _grouped_takes(x_ND, down_EDI):
        return _grouped_experts(x_ND, gate_up_E2ID, down_EDI, expert_ids_NK, weights_NK)
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


def grouped_products() -> Callable[..., torch.Tensor] | None:
    """Return torch's product of row groups with one matrix each, or None where this torch has none."""
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def _grouped_takes(x_ND: torch.Tensor, down_EDI: torch.Tensor) -> bool:
    """It serves bf16, and fp32 on CPU, with rows of whole 16 bytes."""
    if grouped_products() is None or native.watched() or type(x_ND) not in native.PLAIN:
        return False
    dtype_fits = x_ND.dtype == torch.bfloat16 or (x_ND.dtype == torch.float32 and x_ND.device.type == "cpu")
    whole = all(size * x_ND.element_size() % 16 == 0 for size in down_EDI.shape[1:])
    return dtype_fits and whole and x_ND.shape[0] > 0


def _grouped_experts(
    x_ND: torch.Tensor,
    gate_up_E2ID: torch.Tensor,
    down_EDI: torch.Tensor,
    expert_ids_NK: torch.Tensor,
    weights_NK: torch.Tensor,
) -> torch.Tensor:
    """Two grouped products over rows sorted by expert; nothing is read back to the host."""
    multiply = grouped_products()
    assert multiply is not None
    num_choices, num_experts = expert_ids_NK.shape[1], down_EDI.shape[0]
    order_R = expert_ids_NK.flatten().argsort(stable=True)
    counts_E = torch.zeros(num_experts, dtype=torch.int32, device=x_ND.device)
    counts_E.index_add_(0, expert_ids_NK.flatten(), torch.ones_like(order_R, dtype=torch.int32))
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    x_RD = x_ND[order_R // num_choices]
    gate_up_R2I = multiply(x_RD, gate_up_E2ID.to(x_ND.dtype).flatten(1, 2).mT, offs=ends_E)
    hidden_RI = swiglu(gate_up_R2I) * weights_NK.flatten()[order_R, None].to(x_ND.dtype)
    out_RD = multiply(hidden_RI, down_EDI.to(x_ND.dtype).mT, offs=ends_E)
    row_of_pair_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=x_ND.device))
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    return out_RD[row_of_pair_R].unflatten(0, (-1, num_choices)).sum(1, dtype=wide).to(x_ND.dtype)


class _Routing:
    """The order of pairs sorted by expert, made once in the forward pass."""

    def __init__(self, expert_ids_NK: torch.Tensor, num_experts: int):
        ids = expert_ids_NK.long().contiguous()
        self.num_tokens, self.num_choices = ids.shape
        self.offsets = ids.new_empty(num_experts + 1)
        self.pair_of_row = ids.new_empty(ids.numel())
        self.row_of_pair = ids.new_empty(ids.numel())
        native.function("route_sort")(ids, ids.numel(), num_experts, self.offsets, self.pair_of_row, self.row_of_pair)
        if self.offsets[-1] != ids.numel():
            raise IndexError(f"expert ids must lie in 0..{num_experts - 1}, got {ids.min()}..{ids.max()}")
        self.groups = Groups.of(self.offsets)

    def gather(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Return every pair's token, sorted by expert, `[R, D]`."""
        x_ND = x_ND.contiguous()
        out_RD = x_ND.new_empty(self.pair_of_row.numel(), x_ND.shape[-1])
        native.function("route_gather")(
            *(x_ND, self.pair_of_row, out_RD, out_RD.shape[0], self.num_choices),
            *(x_ND.shape[-1] * x_ND.element_size(), native.threads_for(out_RD.numel())),
        )
        return out_RD

    def combine(self, rows_RD: torch.Tensor) -> torch.Tensor:
        """Return the sum of every token's rows, `[N, D]`."""
        out_ND = rows_RD.new_empty(self.num_tokens, rows_RD.shape[-1])
        native.function("route_combine", rows_RD.dtype)(
            *(rows_RD, self.row_of_pair, out_ND, *out_ND.shape[:1], self.num_choices, out_ND.shape[1]),
            native.threads_for(rows_RD.numel()),
        )
        return out_ND


class _NativeExperts(torch.autograd.Function):
    """The routing weight multiplies the activation before the down projection, where rows are narrowest.

    Kept for the backward pass: x, the gate and up products, the routing, and the weights in the products' dtype. The
    gathered rows and the activations are made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: torch.Tensor,
        gate_up_E2ID: torch.Tensor,
        down_EDI: torch.Tensor,
        expert_ids_NK: torch.Tensor,
        weights_NK: torch.Tensor,
    ) -> torch.Tensor:
        num_experts, size, intermediate = down_EDI.shape
        ctx.weight_dtype = gate_up_E2ID.dtype
        gate_up_EDJ = prepare(gate_up_E2ID, x_ND.dtype).view(num_experts, 2 * intermediate, size).mT
        down_EID = prepare(down_EDI, x_ND.dtype).mT
        ctx.routing = routing = _Routing(expert_ids_NK, num_experts)
        row_weights_R = weights_NK.flatten()[routing.pair_of_row]
        x_RD = routing.gather(x_ND)
        num_rows = x_RD.shape[0]
        gate_up_R2I = x_ND.new_empty(num_rows, 2 * intermediate)
        product_by_rows(x_RD, gate_up_EDJ, routing.groups, gate_up_R2I)
        hidden_RI = x_ND.new_empty(num_rows, intermediate)
        native_swiglu(gate_up_R2I, row_weights_R, hidden_RI)
        product_by_rows(hidden_RI, down_EID, routing.groups, x_RD)
        ctx.save_for_backward(x_ND, gate_up_EDJ, down_EID, row_weights_R, gate_up_R2I)
        return routing.combine(x_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_ND, gate_up_EDJ, down_EID, row_weights_R, gate_up_R2I = ctx.saved_tensors
        routing = ctx.routing
        grad_RD = routing.gather(grad_ND)
        grad_hidden_RI = gate_up_R2I.new_empty(gate_up_R2I.shape[0], down_EID.shape[1])
        product_by_rows(grad_RD, down_EID.mT, routing.groups, grad_hidden_RI)
        hidden_RI, grad_weights_R = torch.empty_like(grad_hidden_RI), torch.empty_like(row_weights_R)
        grad_gate_up_R2I = torch.empty_like(gate_up_R2I)
        native_swiglu_backward(
            *(grad_hidden_RI, gate_up_R2I, row_weights_R, grad_gate_up_R2I, hidden_RI, grad_weights_R)
        )
        grad_down_EDI = product_by_terms(grad_RD, hidden_RI, routing.groups, ctx.weight_dtype)
        # x's gradient takes the place of the output's, which is spent.
        product_by_rows(grad_gate_up_R2I, gate_up_EDJ.mT, routing.groups, grad_RD)
        grad_x_ND = routing.combine(grad_RD)
        grad_gate_up = product_by_terms(grad_gate_up_R2I, routing.gather(x_ND), routing.groups, ctx.weight_dtype)
        num_experts, size, intermediate = grad_down_EDI.shape
        grad_weights_NK = grad_weights_R[routing.row_of_pair].view(routing.num_tokens, routing.num_choices)
        return grad_x_ND, grad_gate_up.view(num_experts, 2, intermediate, size), grad_down_EDI, None, grad_weights_NK
