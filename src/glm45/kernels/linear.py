"""Matrix product with a master weight: computed in the activation's dtype, with the gradient in the weight's.

O outputs, I inputs.
"""

import torch
import torch.nn.functional as F


def linear(x_I: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x @ weight.T + bias` in x's dtype; the weight may be of another dtype, such as an fp32 master copy."""
    return _linear_reference(x_I, weight_OI, bias_O)


def _linear_reference(x_I: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x_I, weight_OI.to(x_I.dtype), None if bias_O is None else bias_O.to(x_I.dtype))
