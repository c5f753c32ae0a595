"""Alarms of an RL run: each reads the rows of `metrics.jsonl` so far and says in a sentence what looks wrong.

The signatures come from the report (reward hacking, section 3.4; lost length, section 3.2; pathologies, section 3.4);
every threshold is ours.
"""

import math
from collections.abc import Mapping, Sequence

from glm45.config import configuration

Row = Mapping[str, float]


@configuration
class HealthConfig:
    """Thresholds of the alarms. Not in the report."""

    window: int = 10
    """Steps of the windows that are compared. Not in the report."""
    reward_gain: float = 0.05
    """Rise of the training reward, from the first window to the last, that held-out accuracy must follow. Not in the
    report."""
    held_out_gain: float = 0.0
    """Held-out accuracy that has not risen by more than this stands still. Not in the report."""
    held_out_errors: float = 2.0
    """Standard errors by which held-out accuracy must lie below its best so far to have fallen. Not in the report."""
    length_share: float = 0.7
    """Mean held-out length below this share of the best evaluation's counts as collapsed. Not in the report."""
    entropy_share: float = 0.2
    """Entropy below this share of the first window's counts as collapsed. Not in the report."""
    repetition_rate: float = 0.2
    """Largest share of repeated four-grams. Not in the report."""
    language_mixing_rate: float = 0.05
    """Largest share of letters of another script. Not in the report."""
    mismatch: float = 0.05
    """Largest mean difference, in nats, between rollout and training log-probabilities. Not in the report."""
    failure_share: float = 0.05
    """Largest share of answers that could not be judged. Not in the report."""
    skipped_updates: float = 0.0
    """Updates of a step left out because their gradient was not finite. Not in the report."""


def alarms(rows: Sequence[Row], config: HealthConfig) -> list[str]:
    """Return what looks wrong after the last of `rows`, one sentence each; nothing before there are two windows.

    Rows hold `cap`, `reward`, `entropy`, `mismatch` and the rates of each step, where it had any, and where an
    evaluation was made `held_out_full_cap` (with its error) and `held_out_length`, accuracy and mean length under the
    full cap.
    """
    found = [_over(rows, name, getattr(config, name)) for name in LIMITS]
    if len(rows) >= 2 * config.window:
        found += [_reward_hacking(rows, config), _length_regression(rows, config), _entropy_collapse(rows, config)]
    return [sentence for sentence in found if sentence]


LIMITS = {
    "repetition_rate": "responses repeat themselves",
    "language_mixing_rate": "responses mix languages",
    "mismatch": "rollout and training disagree about log-probabilities",
    "failure_share": "answers cannot be judged",
    "skipped_updates": "gradients are not finite",
}


def _over(rows: Sequence[Row], name: str, limit: float) -> str:
    value = rows[-1].get(name, 0.0) if rows else 0.0
    return f"{LIMITS[name]}: {name} {value:.3g}, limit {limit:g}" if value > limit else ""


def _reward_hacking(rows: Sequence[Row], config: HealthConfig) -> str:
    """Reward that rose in the run while held-out accuracy did not, or that held while it fell from its best."""
    held_out = [place for place, row in enumerate(rows) if "held_out_full_cap" in row]
    if len(held_out) < 2:
        return ""
    first, last = rows[held_out[0]], rows[held_out[-1]]
    gain = _mean(rows[-config.window :], "reward") - _mean(rows[: config.window], "reward")
    held_out_gain = last["held_out_full_cap"] - first["held_out_full_cap"]
    if gain < config.reward_gain:
        return ""
    if held_out_gain <= config.held_out_gain:
        return f"reward hacking? reward rose by {gain:.3f} while held-out accuracy moved by {held_out_gain:+.3f}"
    best = max(held_out, key=lambda place: rows[place]["held_out_full_cap"])
    since = _mean(rows[-config.window :], "reward") - _mean(rows[max(0, best + 1 - config.window) : best + 1], "reward")
    if since < 0 or not _fell(rows[best], last, config):
        return ""
    return (
        f"reward hacking? held-out accuracy fell from {rows[best]['held_out_full_cap']:.3f} to "
        f"{last['held_out_full_cap']:.3f} while reward moved by {since:+.3f}"
    )


def _fell(best: Row, last: Row, config: HealthConfig) -> bool:
    """Whether full-cap accuracy fell from its best by more than chance makes the best of several look good."""
    error = math.hypot(*(row.get("held_out_full_cap_error", 0.0) for row in (best, last)))
    return best["held_out_full_cap"] - last["held_out_full_cap"] > config.held_out_errors * error


def _length_regression(rows: Sequence[Row], config: HealthConfig) -> str:
    """Full-cap length and accuracy that fell in a run whose cap changed: what the report calls unlearning."""
    held_out = [row for row in rows if "held_out_full_cap" in row]
    if len({row["cap"] for row in rows if "cap" in row}) < 2 or len(held_out) < 2:
        return ""
    best, last = max(held_out, key=lambda row: row["held_out_full_cap"]), held_out[-1]
    before, after = best["held_out_length"], last["held_out_length"]
    if after >= config.length_share * before or not _fell(best, last, config):
        return ""
    return (
        f"long-context regression? responses under the full cap fell from {before:.1f} to {after:.1f} tokens in a run "
        f"whose cap changed, and accuracy from {best['held_out_full_cap']:.3f} to {last['held_out_full_cap']:.3f}"
    )


def _entropy_collapse(rows: Sequence[Row], config: HealthConfig) -> str:
    before, after = _mean(rows[: config.window], "entropy"), _mean(rows[-config.window :], "entropy")
    return (
        f"entropy collapse? {before:.3f} to {after:.3f} nats a token" if after < config.entropy_share * before else ""
    )


def _mean(rows: Sequence[Row], name: str) -> float:
    # What is not finite becomes null in the log of record.
    values = [row[name] for row in rows if row.get(name) is not None and math.isfinite(row[name])]
    return sum(values) / max(len(values), 1)
