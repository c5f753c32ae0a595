"""What a step's rollouts say in numbers: over all groups made, dropped ones too."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from glm45.rl.curriculum import pass_at_k
from glm45.rl.pool import Group
from glm45.rl.sample import Sample


def rollout_metrics(groups: Sequence[Group], weight_version: int) -> dict[str, float]:
    """Return rewards by part and by domain, pass@k, lengths, and rates; empty if nothing was generated.

    What could not be judged counts in `failure_share`, by kind in `failure/*`, and nowhere else.
    """
    samples = [sample for group in groups for sample in group if sample.status != "aborted"]
    in_groups = judged_groups(groups)
    judged = [sample for group in in_groups for sample in group]
    kinds = Counter(sample.metadata["failure"]["kind"] for sample in samples if sample.status == "failed")
    failures = {f"failure/{kind}": float(count) for kind, count in sorted(kinds.items())}
    if not judged:
        return {"failure_share": 1.0, "num_samples": float(len(samples)), **failures} if samples else {}
    record = {
        "reward": _mean([sample.reward or 0.0 for sample in judged]),
        "response_length": _mean([float(sample.num_generated) for sample in samples]),
        "truncation": _mean([float(sample.status == "truncated") for sample in samples]),
        "failure_share": 1 - len(judged) / len(samples),
        "faulty_share": _mean([float(sample.metadata["faulty"]) for sample in judged]),
        "repetition_rate": _mean([sample.metadata["repetition_rate"] for sample in judged]),
        "language_mixing_rate": _mean([sample.metadata["language_mixing_rate"] for sample in judged]),
        "informative_share": _mean([float(len({each.reward for each in group}) > 1) for group in in_groups]),
        "staleness": _mean([float(weight_version - sample.weight_version) for sample in samples]),
        "num_samples": float(len(samples)),
        "generated_tokens": float(sum(sample.num_generated for sample in samples)),
    }
    record |= {f"part/{name}": value for name, value in _parts(judged).items()}
    record |= {f"reward/{name}": value for name, value in _domains(judged).items()}
    return record | failures | _passes(in_groups)


def judged_groups(groups: Sequence[Group]) -> list[Group]:
    """Return the groups without samples that could not be judged, and without groups of only those."""
    return [each for group in groups if (each := [sample for sample in group if sample.reward is not None])]


def require_judgement(made: Sequence[Group]) -> None:
    """Raise ValueError if no answer could be judged: nothing can be learnt or said until the cause is mended."""
    failures = [sample.metadata["failure"] for group in made for sample in group if sample.status == "failed"]
    if failures and len(failures) == sum(map(len, made)):
        raise ValueError(
            f"none of {len(failures)} answers could be judged; the first: {failures[0]['kind']}, "
            f"{failures[0]['detail']}; mend the cause and run the same command to go on"
        )


def accuracy(groups: Sequence[Group]) -> float:
    """Return the share of right answers (part `correct`, or a reward of 1) among those that were judged.

    Raises ValueError if none was.
    """
    require_judgement(groups)
    return _mean([float(is_correct(sample)) for group in judged_groups(groups) for sample in group])


def accuracy_error(groups: Sequence[Group]) -> float:
    """Return the standard error of `accuracy` over prompts: samples of one prompt are not independent."""
    shares = [accuracy([group]) for group in judged_groups(groups)]
    mean = _mean(shares)
    return math.sqrt(sum((share - mean) ** 2 for share in shares) / max(len(shares) - 1, 1) / len(shares))


def is_correct(sample: Sample) -> bool:
    """Whether the verifier found the answer right."""
    return sample.reward is not None and sample.reward_parts["correct"] == 1.0


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
