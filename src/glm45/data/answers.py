"""Which tokens of packed chats are answers: the loss mask of fine-tuning, read off the role tokens.

Shapes: B rows of a batch, T sequence length.
"""

import dataclasses

import torch

from glm45.data.loader import Batch
from glm45.text.tokenizer import Tokenizer

ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


class AnswersOnly:
    """Takes from a batch's loss mask what the assistant of a chat did not produce.

    Learnt are the tokens after `<|assistant|>`, the role token that ends the turn included, and whatever stands before
    the first role token of a document, so that documents without roles are learnt whole. Unlike the mask of
    `glm45.text.chat.render_tokens`, the newline and the empty reasoning that a prompt may end with count as produced.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._roles = torch.tensor([tokenizer.special_id(role) for role in ROLES])
        self._assistant = tokenizer.special_id("<|assistant|>")

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with fewer tokens to learn."""
        tokens_BT, documents_BT = batch.tokens_BT, batch.document_ids_BT
        place_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
        role_at_BT = torch.where(torch.isin(tokens_BT, self._roles), place_BT, -1)
        before_BT = torch.nn.functional.pad(role_at_BT, (1, 0), value=-1)[:, :-1].cummax(dim=1).values
        at_BT = before_BT.clamp(min=0)
        same_document_BT = (before_BT >= 0) & (documents_BT.gather(1, at_BT) == documents_BT)
        answer_BT = ~same_document_BT | (tokens_BT.gather(1, at_BT) == self._assistant)
        return dataclasses.replace(batch, loss_mask_BT=batch.loss_mask_BT & answer_BT)
