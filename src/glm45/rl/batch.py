"""Samples as packed rows with what the policy loss needs of every learnt token.

R rows, T tokens a row, N learnt tokens of a row's targets, S samples.

Samples of one prompt share it: a row holds the prompt once, as a trunk, and what follows it as branches that do not see
each other (see `kernels.attention`). With sixteen answers as long as their prompt, that is nearly half of the work.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from glm45.data.packing import best_fit
from glm45.rl.advantages import group_advantages, informative
from glm45.rl.config import LossConfig
from glm45.rl.losses import token_weights
from glm45.rl.sample import Sample


@dataclass(frozen=True)
class PolicyRow:
    """One packed row, `[1, T]`, and flat tensors over its learnt tokens, `[N]`."""

    tokens_1T: torch.Tensor
    document_ids_1T: torch.Tensor
    branch_ids_1T: torch.Tensor | None
    """0 for a shared prompt, from 1 on for what follows it; None if no prompt of the row is shared."""
    positions_1T: torch.Tensor
    """Of each token in its own sample."""
    predicted_at_N: torch.Tensor
    """Where in the row each learnt token is predicted: at the token before it."""
    targets_N: torch.Tensor
    advantages_N: torch.Tensor
    weights_N: torch.Tensor
    """Share in the loss of the whole batch; already divided by global counts."""
    rollout_logprobs_N: torch.Tensor
    temperatures_N: torch.Tensor
    sample_ids_N: torch.Tensor


def learnable(samples: Sequence[Sample], config: LossConfig) -> tuple[list[Sample], list[float]]:
    """Return the samples that enter advantages, and their rewards, by the policy for truncated ones."""
    kept = [sample for sample in samples if config.truncated != "drop" or sample.status != "truncated"]
    rewards = []
    for sample in kept:
        assert sample.reward is not None, f"sample {sample.group_id}/{sample.index} was never judged"
        rewards.append(0.0 if config.truncated == "zero" and sample.status == "truncated" else sample.reward)
    return kept, rewards


def teaches(group: Sequence[Sample], config: LossConfig) -> bool:
    """Whether judged samples of one prompt can move the policy: their rewards differ after `learnable`, unmasked."""
    kept, rewards = learnable(group, config)
    differs_N = informative(torch.tensor(rewards), torch.zeros(len(kept)))
    return any(differs and not _masked(sample, config) for sample, differs in zip(kept, differs_N, strict=True))


def _masked(sample: Sample, config: LossConfig) -> bool:
    return config.truncated == "mask" and sample.status == "truncated"


@dataclass(frozen=True)
class _Learnt:
    """A sample with its share in the loss."""

    sample: Sample
    advantage: float
    weight: float

    @property
    def prompt(self) -> list[int]:
        """What comes before the first learnt token."""
        return self.sample.tokens[: self.sample.loss_mask.index(True)]


Document = list[_Learnt]
"""Samples that share their prompt."""


def policy_rows(samples: Sequence[Sample], config: LossConfig, max_tokens: int) -> list[PolicyRow]:
    """Pack the samples of a whole batch, all groups and all ranks, with advantages and global weights.

    `max_tokens` is the cap in force (the denominator of "constant" aggregation). Samples that cannot move the policy,
    with advantage 0 or masked, are weighed in the denominators and then left out of the rows. With `share_prompts`,
    samples of one prompt have it once in a row.
    """
    kept, rewards = learnable(samples, config)
    if not kept:
        return []
    group_ids_S = torch.tensor([sample.group_id for sample in kept])
    advantages_S = group_advantages(torch.tensor(rewards), group_ids_S, config.divide_by_std)
    masked = [_masked(sample, config) for sample in kept]
    lengths_S = torch.tensor([0 if hidden else each.num_generated for each, hidden in zip(kept, masked, strict=True)])
    domains = [sample.task.verifier for sample in kept]
    aggregation: dict[str, str] = dict(config.aggregation)
    weights_S = token_weights(lengths_S, domains, aggregation, config.default_aggregation, max_tokens)
    moving = [i for i in range(len(kept)) if not masked[i] and kept[i].num_generated]
    if config.mtp_weight == 0:
        moving = [i for i in moving if advantages_S[i] != 0]
    learnt = [_Learnt(kept[i], float(advantages_S[i]), float(weights_S[i])) for i in moving]
    documents = _sharing(learnt, config.micro_batch_tokens) if config.share_prompts else [[each] for each in learnt]
    lengths = [_length(document) for document in documents]
    bins = best_fit(lengths, max([config.micro_batch_tokens, *lengths]))
    return [_pack([documents[i] for i in each]) for each in bins]


def _sharing(learnt: Sequence[_Learnt], capacity: int) -> list[Document]:
    """Put samples of equal prompts together, in their order, as many as fit into a row."""
    documents: list[Document] = []
    newest: dict[tuple[int, ...], tuple[Document, int]] = {}  # of each prompt: the document and its tokens
    for each in learnt:
        prompt, size = tuple(each.prompt), len(each.sample.tokens)
        document, filled = newest.get(prompt, ([], capacity))
        if filled + size - len(prompt) > capacity:
            document, filled = [], len(prompt)
            documents.append(document)
        document.append(each)
        newest[prompt] = (document, filled + size - len(prompt))
    return documents


def _length(document: Document) -> int:
    shared = (len(document) - 1) * len(document[0].prompt)
    return sum(len(each.sample.tokens) for each in document) - shared


def _pack(row: Sequence[Document]) -> PolicyRow:
    tokens: list[np.ndarray] = []
    document_ids: list[np.ndarray] = []
    branch_ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    learnt: list[tuple[np.ndarray, ...]] = []
    filled = 0
    for number, document in enumerate(row):
        trunk, prompt_size = filled, len(document[0].prompt)
        assert prompt_size > 0, "a learnt token needs a token before it"
        for branch, each in enumerate(document):
            sample, begin = each.sample, prompt_size if branch else 0
            places = np.arange(begin, len(sample.tokens))
            tokens.append(np.array(sample.tokens)[begin:])
            document_ids.append(np.full(len(places), number))
            branch_ids.append(np.where(places < prompt_size, 0, branch + 1 if len(document) > 1 else 0))
            positions.append(places)
            learnt_at = np.flatnonzero(sample.loss_mask)
            predicted_at = filled - begin + learnt_at - 1
            predicted_at[0] = trunk + prompt_size - 1  # the prompt's last token, which branches share
            per_sample = (each.advantage, each.weight, sample.metadata.get("temperature", 1.0), len(learnt))
            learnt.append(
                (
                    predicted_at,
                    np.array(sample.tokens)[learnt_at],
                    np.array(sample.rollout_logprobs, np.float32)[learnt_at],
                    *(np.full(len(learnt_at), value) for value in per_sample),
                )
            )
            filled += len(places)
    columns = [torch.from_numpy(np.concatenate(column)) for column in zip(*learnt, strict=True)]
    predicted_at_N, targets_N, logprobs_N, advantages_N, weights_N, temperatures_N, sample_ids_N = columns
    rows = [torch.from_numpy(np.concatenate(parts))[None] for parts in (tokens, document_ids, branch_ids, positions)]
    tokens_1T, document_ids_1T, branch_ids_1T, positions_1T = rows
    return PolicyRow(
        tokens_1T=tokens_1T,
        document_ids_1T=document_ids_1T,
        branch_ids_1T=branch_ids_1T if branch_ids_1T.any() else None,
        positions_1T=positions_1T,
        predicted_at_N=predicted_at_N,
        targets_N=targets_N,
        advantages_N=advantages_N.float(),
        weights_N=weights_N.float(),
        rollout_logprobs_N=logprobs_N,
        temperatures_N=temperatures_N.float(),
        sample_ids_N=sample_ids_N,
    )
