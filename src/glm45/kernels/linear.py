"""Matrix product with a master weight: computed in the activation's dtype, with the gradient in the weight's.

N rows, O outputs, I inputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from glm45.kernels.products import beats_torch, prepare, product


def linear(x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x @ weight.T + bias` in x's dtype; the weight may be of another dtype, such as an fp32 master copy.

    Where the dtypes differ, the cast weight is kept for the backward pass instead of being cast again.
    """
    if x_NI.dtype == weight_OI.dtype and not beats_torch(x_NI, weight_OI):
        return F.linear(x_NI, weight_OI, bias_O)
    return _MasterLinear.apply(x_NI, weight_OI, bias_O)


class _MasterLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        x_NI, used_OI = x.reshape(-1, x.shape[-1]), prepare(weight_OI, x.dtype)
        ctx.save_for_backward(x_NI, used_OI)
        ctx.weight_dtype = weight_OI.dtype
        return product(x_NI, used_OI.T, bias_N=bias_O).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NI, used_OI = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x = product(grad_NO, used_OI).view(*grad.shape[:-1], -1) if need_x else None
        grad_weight = product(grad_NO.T, x_NI, dtype=ctx.weight_dtype) if need_weight else None
        grad_bias = grad_NO.sum(0, dtype=ctx.weight_dtype) if need_bias else None
        return grad_x, grad_weight, grad_bias
