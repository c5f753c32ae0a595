"""Newton-Schulz iteration: the step of Muon that makes a matrix nearly orthogonal (report section 2.4).

S matrices of one shape, M and N their rows and columns.
"""

import torch

from glm45.kernels import native

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Jordan et al. 2024). Not in the report, which gives the five steps alone."""

EPSILON = 1e-7
"""Smallest norm that a matrix is divided by. Not in the report; as in `torch.optim.Muon`."""


def orthogonalize(x_SMN: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Return the matrices with their singular values brought near one (0.7 to 1.2), by Newton-Schulz iteration.

    In bf16 on a GPU; in fp32 on a CPU, whose bf16 products are slower at these sizes. An all-zero matrix stays zero.
    """
    if x_SMN.shape[-2] > x_SMN.shape[-1]:
        return orthogonalize(x_SMN.mT, steps).mT
    if x_SMN.dtype == torch.float32 and native.supports(x_SMN):
        x_SMN = x_SMN.contiguous()
        out_SMN = torch.empty_like(x_SMN)
        threads = native.threads_for(x_SMN.numel())
        native.function("orthogonalize")(x_SMN, out_SMN, *x_SMN.shape, steps, *NEWTON_SCHULZ, EPSILON, threads)
        return out_SMN
    return _orthogonalize_reference(x_SMN, steps)


def _orthogonalize_reference(x_SMN: torch.Tensor, steps: int) -> torch.Tensor:
    x_SMN = x_SMN / torch.linalg.matrix_norm(x_SMN, keepdim=True).clamp(min=EPSILON)
    if x_SMN.is_cuda:
        x_SMN = x_SMN.bfloat16()
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram_SMM = x_SMN @ x_SMN.mT
        update_SMM = torch.baddbmm(gram_SMM, gram_SMM, gram_SMM, beta=b, alpha=c)
        x_SMN = torch.baddbmm(x_SMN, update_SMM, x_SMN, beta=a)
    return x_SMN
