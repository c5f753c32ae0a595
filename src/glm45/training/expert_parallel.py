"""Experts on ranks of their own: tokens go to them by all-to-all and come back.

N tokens of this rank, K experts a token, R received tokens, D hidden size, E experts of all ranks.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from glm45.kernels.experts import routed_experts
from glm45.model.moe import Experts
from glm45.training.collectives import send_rows
from glm45.training.dtensors import local


def divide_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Keep this rank's equal part of the experts and send tokens to where their experts are."""
    group = mesh.get_group()
    for name, parameter in list(experts.named_parameters()):
        part = parameter.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
        sharded = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
        experts.register_parameter(name, torch.nn.Parameter(sharded))

    def forward(x_ND: torch.Tensor, expert_ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        gate_up, down = local(experts.gate_up_proj), local(experts.down_proj)
        return _dispatch(x_ND, gate_up, down, expert_ids_NK, weights_NK, group)

    experts.forward = forward  # type: ignore


def _dispatch(
    x_ND: torch.Tensor,
    gate_up_E2ID: torch.Tensor,
    down_EDI: torch.Tensor,
    expert_ids_NK: torch.Tensor,
    weights_NK: torch.Tensor,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Return the weighted sum over each token's experts, wherever they are, `[N, D]` in x's dtype."""
    own_experts, num_choices = gate_up_E2ID.shape[0], expert_ids_NK.shape[1]
    flat_ids = expert_ids_NK.flatten()
    order = flat_ids.argsort(stable=True)
    sent = torch.bincount(flat_ids // own_experts, minlength=group.size())
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    counts = sent.tolist(), received.tolist()
    rows_RD = send_rows(x_ND[order // num_choices], *counts, group)
    ids_R = send_rows(flat_ids[order] % own_experts, *counts, group)
    # Each received row goes through one expert; the weights are applied at home, where their gradient is wanted.
    ones_R1 = torch.ones(len(ids_R), 1, dtype=weights_NK.dtype, device=x_ND.device)
    done_RD = routed_experts(rows_RD, gate_up_E2ID, down_EDI, ids_R[:, None], ones_R1)
    back = send_rows(done_RD, counts[1], counts[0], group)
    weighted = back.to(weights_NK.dtype) * weights_NK.flatten()[order, None]
    out_ND = torch.zeros(x_ND.shape, dtype=weights_NK.dtype, device=x_ND.device)
    return out_ND.index_add(0, order // num_choices, weighted).to(x_ND.dtype)
