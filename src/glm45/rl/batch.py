"""Samples as packed rows with what the policy loss needs of every learnt token.

R rows, T tokens a row, N learnt tokens of a row's targets, S samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
    positions_N: torch.Tensor
    """Where in the row each learnt token is predicted: the token before it."""
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


def policy_rows(samples: Sequence[Sample], config: LossConfig, max_tokens: int) -> list[PolicyRow]:
    """Pack the samples of a whole batch, all groups and all ranks, with advantages and global weights.

    `max_tokens` is the cap in force (the denominator of "constant" aggregation). Samples that cannot move the policy,
    with advantage 0 or masked, are weighed in the denominators and then left out of the rows.
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
    moving = [i for i in range(len(kept)) if not masked[i] and advantages_S[i] != 0]
    if config.mtp_weight > 0:
        moving = [i for i in range(len(kept)) if not masked[i]]
    bins = best_fit(
        [len(kept[i].tokens) for i in moving],
        max([config.micro_batch_tokens, *(len(kept[i].tokens) for i in moving)]),
    )
    return [
        _pack(
            [kept[moving[j]] for j in each],
            [(float(advantages_S[moving[j]]), float(weights_S[moving[j]])) for j in each],
        )
        for each in bins
    ]


def _pack(samples: Sequence[Sample], scalars: Sequence[tuple[float, float]]) -> PolicyRow:
    tokens: list[int] = []
    documents: list[int] = []
    columns: list[tuple[int, int, float, float, float, float, int]] = []
    for number, (sample, (advantage, weight)) in enumerate(zip(samples, scalars, strict=True)):
        temperature = sample.metadata.get("temperature", 1.0)
        for place, (token, learnt, logprob) in enumerate(
            zip(sample.tokens, sample.loss_mask, sample.rollout_logprobs, strict=True)
        ):
            if learnt:
                assert place > 0, "a learnt token needs a token before it"
                columns.append((len(tokens) + place - 1, token, advantage, weight, logprob, temperature, number))
        tokens += sample.tokens
        documents += [number] * len(sample.tokens)
    positions, targets, advantages, weights, logprobs, temperatures, sample_ids = zip(*columns, strict=True)
    return PolicyRow(
        tokens_1T=torch.tensor([tokens]),
        document_ids_1T=torch.tensor([documents]),
        positions_N=torch.tensor(positions),
        targets_N=torch.tensor(targets),
        advantages_N=torch.tensor(advantages, dtype=torch.float32),
        weights_N=torch.tensor(weights, dtype=torch.float32),
        rollout_logprobs_N=torch.tensor(logprobs, dtype=torch.float32),
        temperatures_N=torch.tensor(temperatures, dtype=torch.float32),
        sample_ids_N=torch.tensor(sample_ids),
    )
