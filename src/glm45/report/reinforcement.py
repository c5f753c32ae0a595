"""What an RL run's folder says, as plots: reward, held-out accuracy, length, entropy, temperature, signal."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm45.page import Line, Page, lines
from glm45.training.metrics import read_record

HELD_OUT = {"held_out_greedy": "greedy", "held_out_full_cap": "sampled, full cap"}
SHARES = {
    "informative_share": "informative groups",
    "truncation": "truncated",
    "faulty_share": "faults of format",
    "part/careful": "careful traces",
}


def add_reinforcement(page: Page, folder: Path) -> None:
    """Add the curves of an RL run. Raises FileNotFoundError if there is no log of record in the folder."""
    record = read_record(folder)
    steps = [row for row in record if "reward" in row]
    if not steps:
        page.text("No update was made.")
        return
    held_out = {name: _series(record, key) for key, name in HELD_OUT.items()}
    count = _num_held_out(folder)
    bands = {name: _interval(shares, count) for name, (_, shares) in held_out.items()}
    shares = {name: _series(steps, key) for key, name in SHARES.items() if any(key in row for row in steps)}
    page.plots(
        lines({"reward": _series(steps, "reward")}, "Reward of rollouts", "update", "mean reward"),
        lines(held_out, "Held-out accuracy, with 95 % intervals", "update", "accuracy", bands=bands),
        lines(shares, "Shares", "update", "share"),
        lines({"tokens": _series(steps, "response_length")}, "Length of answers", "update", "tokens"),
        _optional(steps, "entropy", "Entropy of the policy", "nats per token"),
        _optional(steps, "temperature", "Sampling temperature", "temperature"),
    )
    alarms = [[row["step"], alarm] for row in steps for alarm in row.get("alarms", [])]
    page.text(f"{len(steps)} updates, {len(alarms)} alarms.")
    if alarms:
        page.table(["update", "alarm"], alarms[-8:], numbers_from=9)


def _series(rows: Sequence[dict[str, Any]], key: str) -> Line:
    kept = [row for row in rows if row.get(key) is not None]
    return [row["step"] for row in kept], [row[key] for row in kept]


def _num_held_out(folder: Path) -> int:
    """Return on how many prompts held-out accuracy was measured."""
    with (folder / "held_out.jsonl").open() as file:
        there = sum(1 for _ in file)
    return min(there, json.loads((folder / "config.json").read_text())["evaluation"]["num_tasks"])


def _interval(shares: Sequence[float], count: int) -> tuple[list[float], list[float]]:
    """Return Wilson's 95 % interval of each share of `count` prompts; samples of one prompt count as one."""
    z = 1.96
    middles = [(share + z * z / (2 * count)) / (1 + z * z / count) for share in shares]
    halves = [
        z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
        for share in shares
    ]
    return (
        [middle - half for middle, half in zip(middles, halves, strict=True)],
        [middle + half for middle, half in zip(middles, halves, strict=True)],
    )


def _optional(rows: Sequence[dict[str, Any]], key: str, title: str, y: str) -> str:
    series = _series(rows, key)
    return lines({key: series}, title, "update", y) if series[0] else ""
