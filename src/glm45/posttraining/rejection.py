"""Rejection sampling: which sampled answers are good enough to learn from (report section 3.1, overall SFT).

Four filters in the report's order: form (repetition, length, truncation, reasoning format), correctness where it can
be verified, a judge's score where it cannot, and for tools the protocol and the state the trajectory ends in. What is
dropped is counted by reason, with examples.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from glm45.config import configuration
from glm45.environments.formats import format_faults, repetition_rate
from glm45.environments.protocol import Message
from glm45.rl.sample import Sample

Judge = Callable[[Sample], float]
"""Scores an answer to a subjective question between 0 and 1; a reward model or a model that is asked."""


@configuration
class RejectionConfig:
    """Thresholds of the filters. The report names the filters and no numbers."""

    max_repetition: float = 0.2
    """Largest share of four-grams that occurred before. Not in the report."""
    min_tokens: int = 2
    """Fewest generated tokens. Not in the report."""
    min_reward: float = 1.0
    """Least reward of a verified answer. Not in the report."""
    min_judgement: float = 0.5
    """Least score of a judged answer. Not in the report."""
    num_examples: int = 3
    """Dropped answers kept for each reason, to look at. Not in the report."""


@dataclass
class RejectionReport:
    """What was kept and what was dropped, and why."""

    kept: list[Sample] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """`kept` and every reason for dropping."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """A few dropped answers for each reason."""


def reject(samples: Iterable[Sample], config: RejectionConfig, judge: Judge | None = None) -> RejectionReport:
    """Filter samples. Raises ValueError for a subjective one (without a verifier's reward) where there is no judge."""
    report = RejectionReport()
    for sample in samples:
        reason = reason_to_drop(sample, config, judge)
        report.counts[reason or "kept"] += 1
        if not reason:
            report.kept.append(sample)
            continue
        shown = report.examples.setdefault(reason, [])
        if len(shown) < config.num_examples:
            shown.append(f"{sample.task.task_id}: {_full_text(sample.response)[:300]!r}")
    return report


def reason_to_drop(sample: Sample, config: RejectionConfig, judge: Judge | None = None) -> str:
    """Return the first filter that a sample does not pass, or an empty string."""
    response = sample.response
    if sample.status == "failed":
        return "not judged"
    if sample.status != "completed":
        return "truncated"
    if sample.num_generated < config.min_tokens:
        return "too short"
    if repetition_rate(_full_text(response)) > config.max_repetition:
        return "repetitive"
    if format_faults(response, sample.task.thinking):
        return "tool protocol" if sample.task.tools and response.get("faults") else "format"
    if sample.reward is not None:
        if sample.reward >= config.min_reward:
            return ""
        return "wrong terminal state" if sample.task.tools else "incorrect"
    if judge is None:
        raise ValueError(
            f"task {sample.task.task_id!r} has no verified reward: give a judge for subjective answers, or leave it out"
        )
    return "" if judge(sample) >= config.min_judgement else "judged poor"


def _full_text(response: Message) -> str:
    return f"{response.get('reasoning_content') or ''} {response.get('content') or ''}".strip()
