"""What a step's rollouts say in numbers: over all groups made, dropped ones too."""

import math
from collections import defaultdict
from collections.abc import Sequence

from glm45.rl.curriculum import pass_at_k
from glm45.rl.pool import Group
from glm45.rl.sample import Sample


def rollout_metrics(groups: Sequence[Group], weight_version: int) -> dict[str, float]:
    """Return rewards by part and by domain, pass@k, lengths, and rates; empty if nothing was generated.

    What could not be judged counts in `failure_share` and nowhere else.
    """
    samples = [sample for group in groups for sample in group if sample.status != "aborted"]
    judged = [sample for sample in samples if sample.reward is not None]
    if not judged:
        return {"failure_share": 1.0, "num_samples": float(len(samples))} if samples else {}
    judged_groups = [each for group in groups if (each := [sample for sample in group if sample.reward is not None])]
    record = {
        "reward": _mean([sample.reward or 0.0 for sample in judged]),
        "response_length": _mean([float(sample.num_generated) for sample in samples]),
        "truncation": _mean([float(sample.status == "truncated") for sample in samples]),
        "failure_share": 1 - len(judged) / len(samples),
        "faulty_share": _mean([float(sample.metadata["faulty"]) for sample in judged]),
        "repetition_rate": _mean([sample.metadata["repetition_rate"] for sample in judged]),
        "language_mixing_rate": _mean([sample.metadata["language_mixing_rate"] for sample in judged]),
        "informative_share": _mean([float(len({each.reward for each in group}) > 1) for group in judged_groups]),
        "staleness": _mean([float(weight_version - sample.weight_version) for sample in samples]),
        "num_samples": float(len(samples)),
        "generated_tokens": float(sum(sample.num_generated for sample in samples)),
    }
    record |= {f"part/{name}": value for name, value in _parts(judged).items()}
    record |= {f"reward/{name}": value for name, value in _domains(judged).items()}
    return record | _passes(judged_groups)


def accuracy(groups: Sequence[Group]) -> float:
    """Return the share of right answers (part `correct`, or a reward of 1); unjudged ones count as wrong."""
    samples = [sample for group in groups for sample in group]
    return _mean([float(is_correct(sample)) for sample in samples])


def accuracy_error(groups: Sequence[Group]) -> float:
    """Return the standard error of `accuracy` over prompts: samples of one prompt are not independent."""
    shares = [accuracy([group]) for group in groups]
    mean = _mean(shares)
    return math.sqrt(sum((share - mean) ** 2 for share in shares) / max(len(shares) - 1, 1) / len(shares))


def is_correct(sample: Sample) -> bool:
    """Whether the verifier found the answer right."""
    return sample.reward is not None and sample.reward_parts.get("correct", sample.reward) == 1.0


def _parts(samples: Sequence[Sample]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        for name, value in sample.reward_parts.items():
            values[name].append(value)
    return {name: _mean(each) for name, each in sorted(values.items())}


def _domains(samples: Sequence[Sample]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        values[sample.task.verifier].append(sample.reward or 0.0)
    return {name: _mean(each) for name, each in sorted(values.items())}


def _passes(groups: Sequence[Group]) -> dict[str, float]:
    """Unbiased pass@1, and pass@k for the largest power of two that every group has samples for."""
    counts = [(len(group), sum(map(is_correct, group))) for group in groups]
    smallest = min(size for size, _ in counts)
    largest_k = 1 << (smallest.bit_length() - 1)
    return {f"pass_at_{k}": _mean([pass_at_k(size, right, k) for size, right in counts]) for k in {1, largest_k}}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
