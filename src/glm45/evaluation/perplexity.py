"""Held-out perplexity of a model in this process: by source, and by position in long documents."""

from pathlib import Path

import torch

from glm45.data.folder import DataFolder
from glm45.data.loader import Batch, held_out_batches
from glm45.evaluation.statistics import Estimate, bootstrap
from glm45.kernels.logprobs import linear_logprobs
from glm45.model import hub
from glm45.model.transformer import Glm45
from glm45.text.tokenizer import Tokenizer

POSITION = "position"
"""First word of the keys that are stretches of documents."""


def held_out_perplexity(
    checkpoint: Path, data: Path, *, length: int, rows: int = 16, parts: int = 4
) -> dict[str, Estimate]:
    """Return nats per token on the held-out datasets of a data folder, with intervals over rows.

    Keys are sources, and `position a to b` for the mean over all sources of the tokens that stand there in their
    document, in `parts` stretches up to `length`: what a longer context is worth. Raises ValueError if the data was
    made with another tokenizer, or has nothing held out.
    """
    folder = DataFolder.open(data)
    fingerprint = Tokenizer.load(checkpoint).fingerprint
    made_with = folder.manifest["tokenizer"]["fingerprint"]
    if fingerprint != made_with:
        raise ValueError(f"{data} was tokenized with {made_with[:12]}, {checkpoint} has {fingerprint[:12]}")
    if not folder.held_out:
        raise ValueError(f"{data} has no held-out dataset")
    model = hub.load(checkpoint, device=hub.best_device()).eval()
    found: dict[str, list[float]] = {}
    for source, batches in held_out_batches(folder, length, 1, rows).items():
        for batch in batches:
            nats_T, valid_T = _nats(model, batch.to(model.device))
            stretches_T = batch.positions_BT[0, 1:].to(model.device) * parts // length
            masks = {source: valid_T}
            for part in range(parts):
                first, last = (length * each // parts for each in (part, part + 1))
                masks[f"{POSITION} {first:,} to {last:,}"] = valid_T & (stretches_T == part)
            for name, chosen_T in masks.items():
                if chosen_T.any():
                    found.setdefault(name, []).append(nats_T[chosen_T].mean().item())
    return {name: bootstrap(values) for name, values in found.items()}


@torch.no_grad()
def _nats(model: Glm45, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return minus log-probability of each next token of the only row, and which of them count."""
    tokens_BT, documents_BT = batch.tokens_BT, batch.document_ids_BT
    output = model(tokens_BT, document_ids=documents_BT, output="hidden")
    logprobs_T, _ = linear_logprobs(output.hidden_BTD[0, :-1], model.lm_head.weight, tokens_BT[0, 1:])
    same_T = (documents_BT[0, 1:] == documents_BT[0, :-1]) & (documents_BT[0, 1:] >= 0)
    return -logprobs_T, same_T & batch.loss_mask_BT[0, 1:]
