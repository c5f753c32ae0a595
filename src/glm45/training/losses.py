"""The training loss: next token, plus lambda times multi-token prediction, plus the sequence-level balance loss.

B rows, T tokens, L MoE layers, E experts. Every sum is divided by a count over the *whole* batch, all ranks and all
micro-batches, so the parts of micro-batches and ranks simply add up to the loss of the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from glm45.data.loader import Batch
from glm45.kernels.logprobs import linear_cross_entropy
from glm45.model.transformer import Glm45


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass with their targets."""

    tokens_BT: torch.Tensor
    document_ids_BT: torch.Tensor
    positions_BT: torch.Tensor
    targets_BT: torch.Tensor
    """The next token."""
    valid_BT: torch.Tensor
    """Whether the next token is learnt."""
    mtp_targets_BT: torch.Tensor
    """The token after the next."""
    mtp_valid_BT: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device | str = "cpu") -> "MicroBatch":
        """Add the targets to a batch and move it to a device."""
        tokens, documents, mask = batch.tokens_BT, batch.document_ids_BT, batch.loss_mask_BT
        targets, valid = shifted_targets(tokens, documents, mask, shift=1)
        mtp_targets, mtp_valid = shifted_targets(tokens, documents, mask, shift=2)
        fields = (tokens, documents, batch.positions_BT, targets, valid, mtp_targets, mtp_valid)
        return cls(*(field.to(device, non_blocking=True) for field in fields))

    def part(self, take: Callable[[torch.Tensor], torch.Tensor]) -> "MicroBatch":
        """Keep the targets of some positions; what the model reads stays whole, and it takes its part itself."""
        names = ("targets_BT", "valid_BT", "mtp_targets_BT", "mtp_valid_BT")
        return replace(self, **{name: take(getattr(self, name)) for name in names})

    def split(self, rows: int) -> "list[MicroBatch]":
        """Cut into micro-batches of at most `rows` rows."""
        fields = [getattr(self, name).split(rows) for name in self.__dataclass_fields__]
        return [MicroBatch(*parts) for parts in zip(*fields, strict=True)]


@dataclass(frozen=True)
class Counts:
    """What the sums of a batch are divided by, over all ranks and micro-batches."""

    targets: float
    mtp_targets: float
    rows: float

    @classmethod
    def of(cls, totals: Sequence[float]) -> "Counts":
        """Take the reduced sums of `count`; a batch without targets has a loss of 0, not a division by 0."""
        return cls(*(max(total, 1.0) for total in totals))


@dataclass(frozen=True)
class LossParts:
    """A micro-batch's share of the loss of its batch; shares add up over micro-batches and ranks."""

    total: torch.Tensor
    """What to call `backward` on."""
    next_token: torch.Tensor
    mtp: torch.Tensor
    balance: torch.Tensor
    loads_LE: torch.Tensor
    """Tokens that went to each expert."""


def shifted_targets(
    tokens_BT: torch.Tensor, document_ids_BT: torch.Tensor, loss_mask_BT: torch.Tensor, shift: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every position's target, `shift` tokens ahead, and whether it counts.

    It counts iff it lies in the same document, is no padding, and its own `loss_mask` is true.
    """
    targets_BT = torch.zeros_like(tokens_BT)
    valid_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    targets_BT[:, :-shift] = tokens_BT[:, shift:]
    same_document = document_ids_BT[:, :-shift] == document_ids_BT[:, shift:]
    valid_BT[:, :-shift] = same_document & (document_ids_BT[:, shift:] >= 0) & loss_mask_BT[:, shift:]
    return targets_BT, valid_BT


def count(batch: MicroBatch) -> torch.Tensor:
    """Return `[next-token targets, MTP targets, rows]` of a batch, fp64, to be summed over data-parallel ranks."""
    numbers = (batch.valid_BT.sum(), batch.mtp_valid_BT.sum(), torch.tensor(batch.tokens_BT.shape[0]))
    return torch.stack([number.cpu().double() for number in numbers])


def token_loss(
    model: Glm45, hidden_BTD: torch.Tensor, targets_BT: torch.Tensor, valid_BT: torch.Tensor, num_targets: float
) -> torch.Tensor:
    """Return the cross-entropy of the valid targets over `num_targets`, in fp32, chunked over positions."""
    weights_N = valid_BT.flatten().float() / num_targets
    return linear_cross_entropy(hidden_BTD.flatten(0, 1), model.lm_head.weight, targets_BT.flatten(), weights_N)


def pretraining_loss(
    model: Glm45,
    batch: MicroBatch,
    counts: Counts,
    mtp_weight: float,
    balance_weight: float,
    checkpoint: bool = False,
) -> LossParts:
    """Return a micro-batch's share of `next token + mtp_weight * MTP + balance_weight * balance` (report section 2.4).

    The balance loss is a mean over layers and sequences. `checkpoint` recomputes activations in backward.
    """
    use_mtp = model.mtp is not None and mtp_weight > 0
    output = model(
        batch.tokens_BT,
        positions=batch.positions_BT,
        document_ids=batch.document_ids_BT,
        output="hidden",
        mtp=use_mtp,
        checkpoint=checkpoint,
    )
    next_token = token_loss(model, output.hidden_BTD, batch.targets_BT, batch.valid_BT, counts.targets)
    mtp = torch.zeros_like(next_token)
    if use_mtp:
        mtp = token_loss(model, output.mtp_hidden_BTD, batch.mtp_targets_BT, batch.mtp_valid_BT, counts.mtp_targets)
    loads_LE = output.router.loads_LE
    if model.mtp is not None and not use_mtp:  # a row of zeros keeps the MTP layer's place, and moves no bias
        loads_LE = torch.cat([loads_LE, torch.zeros_like(loads_LE[:1])])
    balance = output.router.balance_loss * (batch.tokens_BT.shape[0] / counts.rows)
    total = next_token + mtp_weight * mtp + balance_weight * balance
    return LossParts(total, next_token.detach(), mtp.detach(), balance.detach(), loads_LE)
