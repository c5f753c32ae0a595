"""Grammars that an output must follow: JSON schemas and tool calls, enforced token by token with xgrammar."""

from collections.abc import Sequence as Rows

import torch

from glm45.engine.request import Sequence


def mask_logits(logits_NV: torch.Tensor, sequences: Rows[Sequence]) -> None:
    """Set the logits of tokens that a row's grammar forbids to -inf, in place."""
    for row, sequence in enumerate(sequences):
        if sequence.matcher is not None:
            sequence.matcher.mask(logits_NV[row])
