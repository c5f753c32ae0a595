"""Mixture of experts: sigmoid router with loss-free balance, routed and shared experts, router health.

B batch, T tokens, M = B * T, D hidden size, E routed experts, K experts a token, I width of one expert, L MoE layers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from glm45.kernels.experts import routed_experts
from glm45.model.config import ModelConfig
from glm45.model.layers import DenseMLP


class RouterOutput(NamedTuple):
    """What the router of one layer decided in one forward pass.

    Loads are returned rather than stored, so that activation checkpointing, which runs a layer's forward twice,
    counts them once.
    """

    load_E: torch.Tensor
    """How many tokens each expert got, fp32, no gradient; padding is not counted."""
    balance_loss: torch.Tensor
    """Sequence-level balance loss of this layer, a scalar, not yet weighted; 0 in evaluation."""
    expert_ids_MK: torch.Tensor
    """The experts chosen for each token."""


class Router(nn.Module):
    """Sigmoid router in fp32; the correction bias moves the selection and nothing else (report section 2.1)."""

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias_E = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias_E)

    def forward(
        self, x_MD: torch.Tensor, expert_ids_MK: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the sigmoid scores `[M, E]`, the chosen experts and their weights, both `[M, K]`.

        Given `expert_ids` are used as they are (routing replay); the weights are computed from today's scores.
        """
        wide = torch.promote_types(x_MD.dtype, torch.float32)
        scores_ME = torch.sigmoid(x_MD.to(wide) @ self.weight.to(wide).T)
        if expert_ids_MK is None:
            expert_ids_MK = self.select(scores_ME.detach())
        weights_MK = scores_ME.gather(1, expert_ids_MK)
        if self.config.norm_topk_prob:
            weights_MK = weights_MK / (weights_MK.sum(-1, keepdim=True) + 1e-20)
        return scores_ME, expert_ids_MK, weights_MK * self.config.routed_scaling_factor

    @torch.no_grad()
    def select(self, scores_ME: torch.Tensor) -> torch.Tensor:
        """Return the K experts of each token: the best by biased score, within its best groups."""
        choice_ME = scores_ME + self.e_score_correction_bias
        groups = self.config.n_group
        if groups > 1:
            by_group = choice_ME.unflatten(-1, (groups, -1))
            group_scores = by_group.topk(2, dim=-1).values.sum(-1)
            kept = group_scores.topk(self.config.topk_group, dim=-1).indices
            outside = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, kept, False)
            choice_ME = by_group.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(1)
        return choice_ME.topk(self.config.num_experts_per_tok, dim=-1, sorted=False).indices


class Experts(nn.Module):
    """The routed experts' weights, stacked, gate and up fused."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2, width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_MD: torch.Tensor, expert_ids_MK: torch.Tensor, weights_MK: torch.Tensor) -> torch.Tensor:
        """Return each token's weighted sum over its experts; expert parallelism replaces this method."""
        return routed_experts(x_MD, self.gate_up_proj, self.down_proj, expert_ids_MK, weights_MK)


class MoE(nn.Module):
    """Routed experts plus a shared expert that is neither gated nor scaled (ledger of deployed implementations)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        shared_width = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = DenseMLP(config.hidden_size, shared_width) if config.n_shared_experts else None

    def forward(
        self,
        x_BTD: torch.Tensor,
        document_ids_BT: torch.Tensor | None = None,
        expert_ids_MK: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, RouterOutput]:
        """Return the layer's output `[B, T, D]` and what the router decided."""
        x_MD = x_BTD.flatten(0, 1)
        scores_ME, expert_ids_MK, weights_MK = self.gate(x_MD, expert_ids_MK)
        out_MD = self.experts(x_MD, expert_ids_MK, weights_MK)
        if self.shared_experts is not None:
            out_MD = out_MD + self.shared_experts(x_MD)
        valid_BT = torch.ones(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
        if document_ids_BT is not None:
            valid_BT = document_ids_BT >= 0
        counts_BE = count_loads(expert_ids_MK, valid_BT, scores_ME.shape[1])
        balance_loss = counts_BE.new_zeros(())
        if self.training and torch.is_grad_enabled():
            balance_loss = self.balance_loss(scores_ME, counts_BE, valid_BT)
        return out_MD.view_as(x_BTD), RouterOutput(counts_BE.sum(0), balance_loss, expert_ids_MK)

    def balance_loss(self, scores_ME: torch.Tensor, counts_BE: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
        """Return the sequence-level balance loss; context parallelism, which sees parts of sequences, replaces it."""
        return sequence_balance_loss(scores_ME, counts_BE, valid_BT)


@torch.no_grad()
def count_loads(expert_ids_MK: torch.Tensor, valid_BT: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return fp32 counts `[B, E]` of the valid tokens of each sequence that go to each expert."""
    batch_size, length = valid_BT.shape
    rows_BT = torch.arange(batch_size, device=valid_BT.device)[:, None].expand(-1, length)
    slots_MK = rows_BT.reshape(-1, 1) * num_experts + expert_ids_MK
    counts = torch.zeros(batch_size * num_experts, device=valid_BT.device)
    ones_MK = valid_BT.reshape(-1, 1).expand_as(slots_MK).to(counts.dtype)
    return counts.index_add(0, slots_MK.flatten(), ones_MK.flatten()).view(batch_size, num_experts)


def sequence_balance_loss(
    scores_ME: torch.Tensor, counts_BE: torch.Tensor, valid_BT: torch.Tensor, lengths_B: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the mean over sequences of `sum_i f_i P_i` (report section 2.4, DeepSeek-V3's form).

    `f_i` is expert i's share of the sequence's routed tokens, times E, so that balance gives 1; `P_i` is the mean of
    its score, normalised over the experts. Perfect balance gives 1; a sequence of padding only counts as 0.
    Given parts of sequences with the `counts` and `lengths` (valid tokens) of the whole ones, it gives their part.
    """
    num_experts = scores_ME.shape[1]
    lengths_B = valid_BT.sum(1) if lengths_B is None else lengths_B
    shares_ME = scores_ME / (scores_ME.sum(-1, keepdim=True) + 1e-20)
    shares_BTE = shares_ME.view(*valid_BT.shape, num_experts) * valid_BT.unsqueeze(-1)
    f_BE = num_experts * counts_BE / counts_BE.sum(-1, keepdim=True).clamp(min=1)
    p_BE = shares_BTE.sum(1) / lengths_B.unsqueeze(-1).clamp(min=1)
    return (f_BE * p_BE).sum(-1).mean()


@torch.no_grad()
def update_bias(bias_E: torch.Tensor, load_E: torch.Tensor, rate: float) -> None:
    """Loss-free balance, in place: raise the bias of underloaded experts and lower that of overloaded ones by `rate`.

    `b += rate * sign(mean(load) - load)`, once a step, with loads summed over micro-batches and ranks beforehand
    (report section 2.4; Wang et al. 2408.15664).
    """
    bias_E += rate * torch.sign(load_E.mean() - load_E).to(bias_E.dtype)


@dataclass(frozen=True)
class RouterHealth:
    """How evenly the experts of each MoE layer are used, `[L]` each."""

    max_violation_L: torch.Tensor
    """MaxVio: the busiest expert's load over the mean load, minus one; 0 is perfect balance."""
    busiest_share_L: torch.Tensor
    """Share of tokens that go to the busiest 20 % of experts (at least one)."""
    entropy_L: torch.Tensor
    """Entropy of the load over its maximum, log E; 1 is perfect balance."""
    dead_experts_L: torch.Tensor
    """Number of experts that got nothing."""

    @classmethod
    def of(cls, loads_LE: torch.Tensor) -> "RouterHealth":
        """Measure loads `[L, E]` summed over whatever stretch of training is of interest."""
        num_experts = loads_LE.shape[1]
        shares_LE = loads_LE / loads_LE.sum(-1, keepdim=True).clamp(min=1)
        busiest = max(1, round(0.2 * num_experts))
        entropy_L = -torch.special.xlogy(shares_LE, shares_LE).sum(-1)
        return cls(
            max_violation_L=shares_LE.amax(-1) * num_experts - 1,
            busiest_share_L=shares_LE.topk(busiest, dim=-1).values.sum(-1),
            entropy_L=entropy_L / max(torch.tensor(float(num_experts)).log().item(), 1e-20),
            dead_experts_L=(loads_LE == 0).sum(-1),
        )
