"""Models and runs beside each other: what they reached, how sure that is, and what it cost.

Every figure is of one seed: errors are over held-out prompts, not over seeds. Costs are counted in tokens that were
generated, which depend on no clock, and in core-seconds. What a run spent on choosing is charged to it: the measurement
of the pools that it used, the temperatures that it tried. Evaluations and the cold start, the same for all, are not.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm45.rl.metrics import accuracy, judged_groups
from glm45.rl.pool import Group
from glm45.training.metrics import read_record

Row = dict[str, Any]
SCORES = {"held_out_greedy": "greedy", "held_out_full_cap": "sampled", "held_out_part/careful": "careful traces"}
CHOOSING = "temperature_choice_tokens"
COSTS = ("updates", "samples", "generated tokens", "of these for choosing", "learnt tokens", "core-seconds")


def compare_arms(folders: Mapping[str, Path]) -> dict[str, Row]:
    """Return for each run, by name, its scores before and after, its costs, and its scores at the cheapest's cost."""
    records = {name: read_record(folder) for name, folder in folders.items()}
    pools = {name: _pools(folder) for name, folder in folders.items()}
    spent = {name: _tokens_so_far(record, pools[name]["generated_tokens"]) for name, record in records.items()}
    budget = min(tokens[-1] for tokens in spent.values())
    rows = {}
    for name, record in records.items():
        looked = [place for place, line in enumerate(record) if "held_out_greedy" in line]
        affordable = [place for place in looked if spent[name][place] <= budget]
        rows[name] = {
            "before": _scores(record[looked[0]]),
            "after": _scores(record[looked[-1]]),
            "at equal tokens": _scores(record[affordable[-1]]) if affordable else {},
            "updates": record[-1]["step"],
            "samples": _total(record, "num_samples") + pools[name]["samples"],
            "generated tokens": spent[name][-1],
            "of these for choosing": pools[name]["generated_tokens"] + _total(record, CHOOSING),
            "learnt tokens": _total(record, "learnt_tokens"),
            "core-seconds": _core_seconds(folders[name]) + pools[name]["core_seconds"],
            "truncation": _total(record, "truncation") / max(record[-1]["step"], 1),
            "alarms": sorted(
                {alarm.split(":")[0].split("?")[0] for line in record for alarm in line.get("alarms", [])}
            ),
        }
    return rows


def arms_table(rows: Mapping[str, Row]) -> str:
    """Return `compare_arms` as text for people: one table of scores in percent, one of costs."""
    names = list(next(iter(rows.values()))["after"])
    scores = [["arm", *(f"{name}, {when}" for name in names for when in ("before", "after"))]]
    scores[0] += [f"{name}, at equal tokens" for name in names if len(rows) > 1]
    for arm, row in rows.items():
        cells = [_percent(row[when].get(name)) for name in names for when in ("before", "after")]
        scores.append([arm, *cells, *(_percent(row["at equal tokens"].get(name)) for name in names if len(rows) > 1)])
    costs = [["arm", *COSTS, "truncated", "alarms"]]
    for arm, row in rows.items():
        numbers = [f"{row[name]:,.0f}" for name in COSTS]
        costs.append([arm, *numbers, f"{row['truncation']:.0%}", "; ".join(row["alarms"]) or "none"])
    notes = (
        "Held-out accuracy in percent, ± one standard error over prompts; one seed, so errors between seeds add to it."
    )
    if len(rows) > 1:
        budget = min(row["generated tokens"] for row in rows.values())
        notes += f"\nEqual tokens: the last evaluation within {budget:,.0f} generated tokens."
    return f"{notes}\n\n{_aligned(scores)}\n\n{_aligned(costs)}\n"


@dataclass(frozen=True)
class Retention:
    """How much of an expert's score another model keeps on the same prompts."""

    expert: float
    unified: float
    kept: float | None
    """The share that is kept, above 1 where the unified model is better; None where the expert was never right."""
    kept_error: float | None
    """Its standard error over prompts, each compared with itself."""
    num_prompts: int
    num_samples: int
    """Of each prompt."""


def retention(expert: Sequence[Group], unified: Sequence[Group]) -> Retention:
    """Compare two models' groups of the same prompts, those of which both have an answer that could be judged.

    Raises ValueError if there are none.
    """
    both = [pair for pair in zip(expert, unified, strict=True) if len(judged_groups(pair)) == 2]
    if not both:
        raise ValueError("no prompt has an answer of both models that could be judged: look into their verifier")
    pairs = [(accuracy([one]), accuracy([other])) for one, other in both]
    before, after = (accuracy(groups) for groups in zip(*both, strict=True))
    if not before:
        return Retention(before, after, None, None, len(pairs), len(expert[0]))
    kept = after / before
    spread = sum((other - kept * one) ** 2 for one, other in pairs) / max(len(pairs) - 1, 1)
    error = math.sqrt(spread / len(pairs)) / before
    return Retention(before, after, kept, error, len(pairs), len(expert[0]))


def retention_table(rows: Mapping[str, Retention]) -> str:
    """Return retentions, by expert, as text for people."""
    cells = [["expert", "its score", "unified model's", "kept", "held-out prompts", "samples of each"]]
    for name, row in rows.items():
        scores = [f"{100 * score:.1f}" for score in (row.expert, row.unified)]
        kept = "nothing to keep"
        if row.kept is not None and row.kept_error is not None:
            kept = f"{100 * row.kept:.1f} ± {100 * row.kept_error:.1f}"
        cells.append([name, *scores, kept, str(row.num_prompts), str(row.num_samples)])
    note = "Held-out accuracy in percent at temperature 1, ± one standard error over prompts; one seed."
    return f"{note}\n\n{_aligned(cells)}\n"


def _scores(line: Row) -> dict[str, Row]:
    """Return the held-out scores of a line of the log of record, with their errors where they have one."""
    kept = {key: name for key, name in SCORES.items() if key in line}
    by = [key for key in line if key.startswith("held_out_by/") and not key.endswith("_error")]
    kept |= {key: f"sampled, {key.split('/')[1]}" for key in by}
    return {name: {"value": line[key], "error": line.get(f"{key}_error")} for key, name in kept.items()}


def _tokens_so_far(record: Sequence[Row], charged: int) -> list[int]:
    """Return the tokens generated up to and with each line."""
    spent, tokens = [], charged
    for line in record:
        tokens += round(line.get("generated_tokens", 0)) + line.get(CHOOSING, 0)
        spent.append(tokens)
    return spent


def _pools(folder: Path) -> Row:
    """Return what measuring the pools of a run cost; nothing where it used none."""
    path = json.loads((folder / "config.json").read_text())["pools"]
    if not path:
        return {"samples": 0, "generated_tokens": 0, "core_seconds": 0.0}
    measured = json.loads(Path(path).read_text())
    return {**measured, "core_seconds": _core_seconds(Path(path).parent)}


def _core_seconds(folder: Path) -> float:
    """Return what a pipeline's step in this folder took; 0 where the run was not one."""
    record = folder / "step.json"
    return json.loads(record.read_text())["cpu_seconds"] if record.exists() else 0.0


def _total(record: Sequence[Row], name: str) -> float:
    return sum(line.get(name, 0) for line in record)


def _percent(score: Row | None) -> str:
    if score is None:
        return "-"
    error = "" if score["error"] is None else f" ± {100 * score['error']:.1f}"
    return f"{100 * score['value']:.1f}{error}"


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    """Return rows of text as a table in Markdown whose columns line up."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
