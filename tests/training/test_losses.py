"""The loss against a plain computation from logits, and its shares against the whole."""

import pytest
import torch
import torch.nn.functional as F

from glm45.data.loader import Batch
from glm45.model.config import preset
from glm45.model.transformer import Glm45
from glm45.training.losses import Counts, MicroBatch, count, pretraining_loss, shifted_targets


@pytest.fixture
def batch():
    torch.manual_seed(0)
    document_ids = torch.tensor([[0] * 6 + [1] * 6, [0] * 9 + [-1] * 3, [0] * 12])
    mask = torch.rand(3, 12) > 0.3
    positions = torch.stack([torch.cat([torch.arange(6)] * 2), torch.arange(12), torch.arange(12)])
    return Batch(torch.randint(0, 300, (3, 12)), document_ids, positions, mask & (document_ids >= 0))


def test_targets_follow_the_convention_by_hand():
    """The target of i is token i + 1, counted iff of the same document and marked at i + 1."""
    tokens, documents = torch.tensor([[5, 6, 7, 8, 9, 0]]), torch.tensor([[0, 0, 0, 1, 1, -1]])
    mask = torch.tensor([[True, False, True, True, True, False]])
    targets, valid = shifted_targets(tokens, documents, mask, shift=1)
    assert targets[valid].tolist() == [7, 9]
    assert valid.tolist() == [[False, True, False, True, False, False]]
    targets, valid = shifted_targets(tokens, documents, mask, shift=2)
    assert targets[valid].tolist() == [7]


def test_equals_cross_entropy_of_the_logits(batch):
    model = Glm45(preset("pico"), seed=1).train()
    micro = MicroBatch.of(batch)
    counts = Counts.of(count(micro).tolist())
    parts = pretraining_loss(model, micro, counts, mtp_weight=0.3, balance_weight=1e-2)
    output = model(batch.tokens_BT, document_ids=batch.document_ids_BT, positions=batch.positions_BT, mtp=True)
    expected = 0.0
    for shift, logits, weight in ((1, output.logits_BTV, 1.0), (2, output.mtp_logits_BTV, 0.3)):
        losses = [
            F.cross_entropy(logits[row, i], batch.tokens_BT[row, i + shift])
            for row in range(3)
            for i in range(12 - shift)
            if batch.document_ids_BT[row, i] == batch.document_ids_BT[row, i + shift] >= 0
            and batch.loss_mask_BT[row, i + shift]
        ]
        expected = expected + weight * torch.stack(losses).mean()
    expected = expected + 1e-2 * output.router.balance_loss
    torch.testing.assert_close(parts.total, expected)


def test_shares_of_micro_batches_add_up_to_the_loss_of_the_batch(batch):
    """Uneven numbers of valid tokens are no matter, since sums are divided by global counts; gradients too."""
    model = Glm45(preset("pico"), seed=1).train()
    micro = MicroBatch.of(batch)
    counts = Counts.of(count(micro).tolist())
    gradients, totals = [], []
    for rows in (3, 1):
        model.zero_grad()
        parts = [pretraining_loss(model, piece, counts, 0.3, 1e-2) for piece in micro.split(rows)]
        sum(part.total for part in parts).backward()
        totals.append(sum(part.total.detach() for part in parts))
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*totals)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_batch_without_targets_has_no_loss(batch):
    empty = MicroBatch.of(Batch(batch.tokens_BT, batch.document_ids_BT, batch.positions_BT, batch.loss_mask_BT & False))
    model = Glm45(preset("pico"), seed=1).train()
    parts = pretraining_loss(model, empty, Counts.of(count(empty).tolist()), 0.3, 0.0)
    assert parts.total.item() == 0.0


def test_without_mtp_its_row_of_loads_is_zero(batch):
    model = Glm45(preset("pico"), seed=1).train()
    micro = MicroBatch.of(batch)
    parts = pretraining_loss(model, micro, Counts.of(count(micro).tolist()), mtp_weight=0.0, balance_weight=0.0)
    assert len(parts.loads_LE) == len(model.moe_layers())
    assert parts.loads_LE[-1].sum() == 0
    assert parts.mtp == 0
