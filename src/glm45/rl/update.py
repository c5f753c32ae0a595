"""One update of the policy from a batch of groups.

N learnt tokens of a row, D hidden size, V vocabulary. Log-probabilities that enter the loss are computed here, by the
training forward, at the temperature of the rollout; the engine's serve the mismatch correction and its metric. The
router's bias and the balance loss stay out of it: the model is in evaluation mode throughout.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from glm45.kernels.logprobs import linear_cross_entropy, linear_logprobs
from glm45.model.transformer import Glm45
from glm45.rl.batch import PolicyRow, policy_rows
from glm45.rl.config import LossConfig
from glm45.rl.losses import policy_loss
from glm45.rl.pool import Group
from glm45.training.gradients import clip_gradients, gradient_squares
from glm45.training.optimizers import OptimizerConfig, build_optimizers, set_learning_rate
from glm45.training.parallel import World, reduce_gradients

SUMS = ("tokens", "clipped_low", "clipped_high", "ratio", "kl", "mismatch", "mismatch_kl", "mismatch_capped")

Sums = dict[str, float]


@dataclass
class Forward:
    """What one pass over a row gives."""

    logprobs_N: torch.Tensor
    entropy_N: torch.Tensor
    mtp_loss: torch.Tensor
    expert_ids: list[torch.Tensor]


class PolicyTrainer:
    """The policy, its optimiser and the update."""

    def __init__(self, model: Glm45, config: LossConfig, world: World):
        self.model = model.eval()
        shares = config.share_prompts and config.mtp_weight == 0 and model.device.type == "cpu"
        self.config = dataclasses.replace(config, share_prompts=shares)
        self.world = world
        self.optimizer_config = OptimizerConfig(
            matrices="adamw", head="adamw", weight_decay=config.weight_decay, clip_norm=config.clip_norm
        )
        if model.mtp is not None:
            model.mtp.requires_grad_(config.mtp_weight > 0)
        elif config.mtp_weight > 0:
            raise ValueError(f"mtp_weight = {config.mtp_weight}, but the policy has no MTP layer: set it to 0")
        self.optimizers = build_optimizers(model, self.optimizer_config)

    def update(self, groups: Sequence[Group], max_tokens: int) -> dict[str, float]:
        """Learn from a batch of groups, the same on every rank, and return what happened."""
        parts = min(self.config.num_minibatches, len(groups)) or 1
        minibatches = [list(groups[start::parts]) for start in range(parts)]
        old: list[list[Forward]] | None = None
        rows = [self._rows(part, max_tokens) for part in minibatches]
        if parts > 1 or self.config.routing_replay:
            with torch.no_grad():
                old = [[self._forward(row) for row in part] for part in rows]
        records = [self._step(part, old[i] if old else None) for i, part in enumerate(rows)]
        return _averages(records)

    def _rows(self, groups: Sequence[Group], max_tokens: int) -> list[PolicyRow]:
        """This rank's rows; advantages and weights are those of the whole minibatch."""
        rows = policy_rows([sample for group in groups for sample in group], self.config, max_tokens)
        return rows[self.world.data_rank :: self.world.num_data_ranks]

    def _step(self, rows: Sequence[PolicyRow], old: Sequence[Forward] | None) -> Sums:
        sums: Sums = defaultdict(float)
        largest = 0.0
        for index, row in enumerate(rows):
            before = old[index] if old else None
            now = self._forward(row, before.expert_ids if before and self.config.routing_replay else None)
            device = now.logprobs_N.device
            result = policy_loss(
                now.logprobs_N,
                before.logprobs_N if before else now.logprobs_N.detach(),
                row.advantages_N.to(device),
                row.weights_N.to(device),
                clip_low=self.config.clip_low,
                clip_high=self.config.clip_high,
                rollout_logprobs_N=row.rollout_logprobs_N.to(device),
                mismatch_cap=self.config.mismatch_cap,
                sample_ids_N=row.sample_ids_N.to(device) if self.config.ratio == "sequence" else None,
            )
            (result.loss + self.config.mtp_weight * now.mtp_loss).backward()
            for name, value in result.sums.items():
                sums[name] += value
            sums["loss"] += result.loss.item()
            sums["mtp_loss"] += now.mtp_loss.item()
            sums["entropy"] += float(now.entropy_N.sum())
            largest = max(largest, result.max_mismatch)
        return self._apply(sums, largest)

    def _apply(self, sums: Sums, largest: float) -> Sums:
        """Reduce the gradient, step unless it is not finite, and return the sums over all ranks."""
        names = [*SUMS, "loss", "mtp_loss", "entropy"]
        reduced = self.world.sum(torch.tensor([sums[name] for name in names], dtype=torch.float64))
        record = dict(zip(names, reduced.tolist(), strict=True))
        record |= {"max_mismatch": self.world.largest(largest), "grad_norm": 0.0, "skipped_updates": 0.0}
        if record["tokens"] == 0:
            return record
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is None:  # a rank without rows takes part in the sum
                parameter.grad = torch.zeros_like(parameter)
        reduce_gradients(self.model, self.world)
        norm = sum(gradient_squares(self.model, self.world).values()) ** 0.5
        if math.isfinite(norm):
            clip_gradients(self.model, norm, self.config.clip_norm)
            set_learning_rate(self.optimizers, self.config.lr, self.optimizer_config)
            for optimizer in self.optimizers:
                optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return record | {"grad_norm": norm, "skipped_updates": float(not math.isfinite(norm))}

    def _forward(self, row: PolicyRow, expert_ids: list[torch.Tensor] | None = None) -> Forward:
        device = self.model.device
        output = self.model(
            row.tokens_1T.to(device),
            positions=row.positions_1T.to(device),
            document_ids=row.document_ids_1T.to(device),
            branch_ids=None if row.branch_ids_1T is None else row.branch_ids_1T.to(device),
            output="hidden",
            mtp=self.config.mtp_weight > 0,
            expert_ids=expert_ids,
        )
        hidden_ND = output.hidden_BTD[0, row.predicted_at_N.to(device)]
        # The head has no bias, so dividing the hidden state divides the logits: one call serves every temperature.
        hidden_ND = (hidden_ND / row.temperatures_N.to(device)[:, None]).to(hidden_ND.dtype)
        logprobs_N, entropy_N = linear_logprobs(hidden_ND, self.model.lm_head.weight, row.targets_N.to(device))
        return Forward(logprobs_N, entropy_N, self._mtp_loss(output.mtp_hidden_BTD, row), output.router.expert_ids)

    def _mtp_loss(self, hidden_BTD: torch.Tensor | None, row: PolicyRow) -> torch.Tensor:
        """Cross-entropy of the MTP layer on the same learnt tokens, each weighed as in the policy loss."""
        if hidden_BTD is None:
            return torch.zeros((), device=self.model.device)
        documents_T = row.document_ids_1T[0]
        inside_N = (row.predicted_at_N > 0) & (documents_T[row.predicted_at_N - 1] == documents_T[row.predicted_at_N])
        hidden_ND = hidden_BTD[0, (row.predicted_at_N[inside_N] - 1).to(hidden_BTD.device)]
        targets_N, weights_N = row.targets_N[inside_N], row.weights_N[inside_N]
        return linear_cross_entropy(
            hidden_ND, self.model.lm_head.weight, targets_N.to(hidden_BTD.device), weights_N.to(hidden_BTD.device)
        )


def _averages(records: Sequence[Sums]) -> dict[str, float]:
    """Return means over all learnt tokens and the last gradient norm; only the count where nothing was learnt."""
    tokens = sum(record["tokens"] for record in records)
    if tokens == 0:
        return {"learnt_tokens": 0.0}
    means = (*(name for name in SUMS if name != "tokens"), "entropy")
    averages = {name: sum(record[name] for record in records) / tokens for name in means}
    return {
        "loss": sum(record["loss"] for record in records),
        "mtp_loss": sum(record["mtp_loss"] for record in records),
        "learnt_tokens": tokens,
        **averages,
        "max_mismatch": max(record["max_mismatch"] for record in records),
        "grad_norm": records[-1]["grad_norm"],
        "skipped_updates": sum(record["skipped_updates"] for record in records),
    }
