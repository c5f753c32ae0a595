"""Pipeline parallelism: consecutive layers on ranks of their own, scheduled by torch.distributed.pipelining.

B rows of a micro-batch, T tokens, D hidden size, L MoE layers of the whole model, E experts.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)
from torch.utils.checkpoint import checkpoint as checkpointed

from glm45.model.layers import Positions
from glm45.model.moe import MoE
from glm45.model.mtp import shift_left
from glm45.model.transformer import DecoderLayer, Glm45
from glm45.training.dtensors import local
from glm45.training.layout import Layout
from glm45.training.losses import Counts, LossParts, MicroBatch, token_loss

PARTS_PER_RANK = {"1f1b": 1, "interleaved": 2}


class Part(nn.Module):
    """Consecutive layers; the first part embeds, the last one norms, predicts and computes the loss.

    The last part holds a copy of the embedding for the MTP layer; its gradient is summed with that of the first.
    """

    def __init__(self, model: Glm45, layers: range, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(model.layers[index] for index in layers)
        self.indices, self.is_first, self.is_last = layers, is_first, is_last
        if is_first or (is_last and model.mtp is not None):
            self.embed_tokens = model.embed_tokens
        if is_last:
            self.norm, self.lm_head, self.mtp = model.norm, model.lm_head, model.mtp
        self._model = [model]  # in a list, so that it is no part of this module
        self.shares: list[LossParts] = []
        """What every micro-batch of the present step gave."""
        self.configure: tuple[Counts, float, float, bool] = (Counts(targets=1, mtp_targets=1, rows=1), 0.0, 0.0, False)
        """Counts, MTP weight, balance weight and recomputation of the present step."""

    def forward(
        self, residual_BTD: torch.Tensor, delta_BTD: torch.Tensor | None = None, **batch: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """Return residual and delta for the next part, or the loss; the first part's input is token ids."""
        micro, model = MicroBatch(**batch), self._model[0]
        counts, _, balance_weight, recompute = self.configure
        where = Positions.of(micro.positions_BT, micro.document_ids_BT, model.config)
        if self.is_first:
            residual_BTD = model.embed(residual_BTD)
        loads, balance = [], torch.zeros((), device=residual_BTD.device)
        for layer in self.layers:
            residual_BTD, delta_BTD, routed = _run(layer, recompute, residual_BTD, delta_BTD, where, None, None)
            if routed is not None:
                loads.append(routed.load_E)
                balance = balance + routed.balance_loss
        if not self.is_last:
            assert delta_BTD is not None
            balance = balance * (len(micro.tokens_BT) / counts.rows)
            self._note(balance * balance_weight, balance, loads)
            return _AddLoss.apply(residual_BTD, balance * balance_weight), delta_BTD
        return self._loss(residual_BTD, delta_BTD, micro, where, loads, balance)

    def _loss(
        self,
        residual_BTD: torch.Tensor,
        delta_BTD: torch.Tensor | None,
        micro: MicroBatch,
        where: Positions,
        loads: list[torch.Tensor],
        balance: torch.Tensor,
    ) -> torch.Tensor:
        model = self._model[0]
        counts, mtp_weight, balance_weight, recompute = self.configure
        _, hidden_BTD = self.norm.add(residual_BTD, delta_BTD, model.compute_dtype)
        next_token = token_loss(model, hidden_BTD, micro.targets_BT, micro.valid_BT, counts.targets)
        mtp = torch.zeros_like(next_token)
        if self.mtp is not None and mtp_weight > 0:
            next_BTD = model.embed(*shift_left(micro.tokens_BT, micro.document_ids_BT))
            mtp_hidden_BTD, routed = _run(self.mtp, recompute, next_BTD, hidden_BTD, where, None, None)
            mtp = token_loss(model, mtp_hidden_BTD, micro.mtp_targets_BT, micro.mtp_valid_BT, counts.mtp_targets)
            loads.append(routed.load_E)
            balance = balance + routed.balance_loss
        elif self.mtp is not None:
            loads.append(torch.zeros(model.config.n_routed_experts, device=hidden_BTD.device))
        balance = balance * (len(micro.tokens_BT) / counts.rows)
        total = next_token + mtp_weight * mtp + balance_weight * balance
        self._note(total, balance, loads, next_token, mtp)
        return total.unsqueeze(0)

    def _note(self, total: torch.Tensor, balance: torch.Tensor, loads: list[torch.Tensor], *losses: Any) -> None:
        next_token, mtp = losses or (torch.zeros_like(total),) * 2
        num_experts = self._model[0].config.n_routed_experts
        loads_LE = torch.stack(loads) if loads else total.new_zeros(0, num_experts)
        parts = (total, next_token, mtp, balance, loads_LE)
        self.shares.append(LossParts(*(part.detach() for part in parts)))


class Pipeline:
    """The parts of a model that this rank has."""

    def __init__(self, model: Glm45, layout: Layout, mesh: DeviceMesh, device: torch.device) -> None:
        self.model, self.device, self.group = model, device, mesh.get_group()
        self.layout = layout
        per_rank = PARTS_PER_RANK[layout.pipeline_schedule]
        self.num_parts, rank = layout.pipeline * per_rank, mesh.get_local_rank()
        ranges = divide_layers(len(model.layers), self.num_parts)
        self.numbers = [rank + layout.pipeline * turn for turn in range(per_rank)]
        self.parts = [Part(model, ranges[number], number == 0, number == self.num_parts - 1) for number in self.numbers]
        moe = [isinstance(layer, DecoderLayer) and isinstance(layer.mlp, MoE) for layer in model.layers]
        self.moe_rows = [[sum(moe[:index]) for index in part.indices if moe[index]] for part in self.parts]
        self.num_moe_layers = sum(moe) + (model.mtp is not None)
        if self.parts[-1].is_last and model.mtp is not None:
            self.moe_rows[-1].append(self.num_moe_layers - 1)
        _drop_others(model, self.parts)

    @property
    def own_rows(self) -> list[int]:
        """Rows of the whole model's `loads_LE` that are this rank's layers, in their order in the model."""
        return sorted(row for rows in self.moe_rows for row in rows)

    def forward_backward(
        self, batch: MicroBatch, rows: int, counts: Counts, mtp_weight: float, balance_weight: float, recompute: bool
    ) -> list[LossParts]:
        """Run the micro-batches of a step through the pipeline; return this rank's shares, loads of all layers.

        Raises ValueError if there are fewer micro-batches than ranks, or uneven ones.
        """
        num_rows = len(batch.tokens_BT)
        count, rest = divmod(num_rows, rows)
        if rest or not count or count % self.layout.pipeline:
            raise ValueError(
                f"{num_rows} rows in micro-batches of {rows} for a pipeline of {self.num_parts} parts on "
                f"{self.layout.pipeline} ranks: set micro_batch_tokens and batch_tokens so that every rank has a whole "
                f"multiple of {self.layout.pipeline} micro-batches"
            )
        for part in self.parts:
            part.shares, part.configure = [], (counts, mtp_weight, balance_weight, recompute)
        schedule = self._schedule(batch, rows, Schedule1F1B, ScheduleInterleaved1F1B, _loss_is_output)
        target = {"target": batch.targets_BT} if self.parts[-1].is_last else {}
        schedule.step(*self._inputs(batch), **target, **_fields(batch))
        return [self._placed(number, share) for number, part in enumerate(self.parts) for share in part.shares]

    @torch.no_grad()
    def next_token_loss(self, batch: MicroBatch) -> torch.Tensor:
        """Run rows forward, each a micro-batch; return the sum of their targets' losses, 0 before the last part."""
        for part in self.parts:
            part.shares, part.configure = [], (Counts(targets=1, mtp_targets=1, rows=1), 0.0, 0.0, False)
        schedule = self._schedule(batch, 1, ScheduleGPipe, ScheduleLoopedBFS, None)
        schedule.eval(*self._inputs(batch), **_fields(batch))
        return torch.stack([share.next_token for part in self.parts for share in part.shares]).sum()

    def _inputs(self, batch: MicroBatch) -> tuple[torch.Tensor, ...]:
        return (batch.tokens_BT,) if self.parts[0].is_first else ()

    def _placed(self, number: int, share: LossParts) -> LossParts:
        """Put a part's loads into their rows of the whole model's."""
        loads_LE = share.loads_LE.new_zeros(self.num_moe_layers, share.loads_LE.shape[1])
        loads_LE[self.moe_rows[number]] = share.loads_LE
        return LossParts(share.total, share.next_token, share.mtp, share.balance, loads_LE)

    def _schedule(self, batch: MicroBatch, rows: int, of_one: Any, of_several: Any, loss: Any) -> Any:
        """Return the schedule for a batch's micro-batches: of one kind where a rank has one part, else of another."""
        tokens_BT = batch.tokens_BT[:rows]
        own_length = tokens_BT.shape[1] // (self.layout.context * self.layout.tensor)
        hidden = (rows, own_length, self.model.config.hidden_size)
        wide = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        between = (
            torch.empty(hidden, device="meta", dtype=wide, requires_grad=True),
            torch.empty(hidden, device="meta", dtype=self.model.compute_dtype, requires_grad=True),
        )
        stages = [
            PipelineStage(
                part,
                number,
                self.num_parts,
                self.device,
                input_args=(tokens_BT.to("meta"),) if part.is_first else between,
                output_args=(torch.empty(1, device="meta", dtype=wide, requires_grad=True),)
                if part.is_last
                else between,
                group=self.group,
            )
            for number, part in zip(self.numbers, self.parts, strict=True)
        ]
        count = len(batch.tokens_BT) // rows
        if len(stages) == 1:
            return of_one(stages[0], count, loss_fn=loss, scale_grads=False)
        return of_several(stages, count, loss_fn=loss, scale_grads=False)


def divide_layers(num_layers: int, num_parts: int) -> list[range]:
    """Return the layers of each part: even, the last one lighter by one for the MTP layer and the head."""
    ends = [min(round(part * (num_layers + 1) / num_parts), num_layers - num_parts + part) for part in range(num_parts)]
    return [range(start, end) for start, end in zip(ends, [*ends[1:], num_layers], strict=True)]


def _drop_others(model: Glm45, parts: list[Part]) -> None:
    """Remove from the model what other ranks have; the places of its layers stay."""
    own = {index for part in parts for index in part.indices}
    for index in range(len(model.layers)):
        if index not in own:
            model.layers[index] = nn.Identity()
    for name in ("embed_tokens", "norm", "lm_head", "mtp"):
        if not any(getattr(part, name, None) is not None for part in parts):
            setattr(model, name, None)


def _fields(batch: MicroBatch) -> dict[str, torch.Tensor]:
    return {name: getattr(batch, name) for name in batch.__dataclass_fields__}


def _run(module: nn.Module, recompute: bool, *arguments: Any) -> Any:
    return checkpointed(module, *arguments, use_reentrant=False) if recompute else module(*arguments)


def _loss_is_output(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output.sum()


class _AddLoss(torch.autograd.Function):
    """Pass x on and give a further loss its gradient: losses of early parts never reach the last one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradients[0], torch.ones((), device=gradients[0].device, dtype=ctx.dtype)


def sum_embedding_gradients(model: Glm45, ends: dist.ProcessGroup) -> None:
    """Sum the gradients of the first and the last part's copy of the embedding."""
    if model.config.num_nextn_predict_layers:
        gradient = model.embed_tokens.weight.grad
        assert gradient is not None
        dist.all_reduce(local(gradient), group=ends)
