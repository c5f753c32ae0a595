"""What a training run's folder says, as plots and tables: loss by stage, held-out loss, experts, attention, samples."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm45.config import from_dict
from glm45.data.mixture import Mixture, epochs, shares
from glm45.page import Page, heat_map, lines
from glm45.training.metrics import read_record

MOST_POINTS = 400
"""A plot shows at most so many points of a series: each the mean of its neighbours."""


def add_training(page: Page, folder: Path, tokens: Mapping[str, int]) -> None:
    """Add the plots and samples of a run folder; `tokens` are those of each dataset that it reads.

    Raises FileNotFoundError if there is no log of record in the folder.
    """
    record = read_record(folder)
    steps = [line for line in record if "event" not in line and "skipped" not in line]
    if not steps:
        page.text("No step was taken.")
        return
    config = json.loads((folder / "config.json").read_text())
    _stages(page, config["stages"], tokens)
    marks = _stage_starts(steps)
    loss = {
        "loss": thin([line["tokens"] for line in steps], [line["loss"] for line in steps]),
        "next token": thin([line["tokens"] for line in steps], [line["next_token_loss"] for line in steps]),
    }
    rate = {"learning rate": thin([line["tokens"] for line in steps], [line["learning_rate"] for line in steps])}
    tokens_at = {line["step"]: line["tokens"] for line in steps}
    page.plots(
        lines(loss, "Loss by stage", "tokens", "nats per token", marks=marks),
        lines(rate, "Learning rate", "tokens", "rate", marks=marks),
        _held_out(record, tokens_at, marks),
        _attention(record, tokens_at),
        *_experts(record, tokens_at, marks, config["model"]["num_nextn_predict_layers"]),
    )
    _alarms(page, record, steps)
    _samples(page, folder)


def _stages(page: Page, stages: Sequence[dict[str, Any]], tokens: Mapping[str, int]) -> None:
    """Add the stages with what each reads: weights and repeats as asked for, and the shares that they come to."""
    header = ["stage", "tokens", "length", "batch", "RoPE base", "MTP weight", "packing", "mixture", "repeats"]
    rows, read = [], []
    for stage in stages:
        total = sum(stage["mixture"]["weights"].values())
        parts = [f"{name} {weight / total:.0%}" for name, weight in stage["mixture"]["weights"].items() if weight]
        figures = (f"{stage[key]:,}" for key in ("tokens", "sequence_length", "batch_tokens"))
        repeats = ", ".join(f"{name} × {times}" for name, times in stage["mixture"]["repeats"].items()) or "–"
        more = [f"{stage['rope_theta']:,.0f}", stage["mtp_weight"], stage["packing"], ", ".join(parts), repeats]
        rows.append([stage["name"], *figures, *more])
        read += _shares(stage, tokens)
    page.table(header, rows, numbers_to=6)
    if read:
        page.table(["stage", "dataset", "share", "times read"], read, numbers_from=2, folded="datasets by stage")


def _shares(stage: dict[str, Any], tokens: Mapping[str, int]) -> list[list[str]]:
    """Return the share of a stage's tokens that each dataset gives, and how often that reads it."""
    if not tokens:
        return []
    mixture = from_dict(Mixture, stage["mixture"])
    times = epochs(mixture, tokens, stage["tokens"])
    return [
        [stage["name"], name, f"{share:.1%}", f"{times[name]:.2f}"] for name, share in shares(mixture, tokens).items()
    ]


def thin(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return at most `MOST_POINTS` points, each the mean of a stretch of the series."""
    width = max(1, -(-len(xs) // MOST_POINTS))
    stretches = range(0, len(xs), width)
    mean = lambda values, start: sum(values[start : start + width]) / len(values[start : start + width])  # noqa: E731
    return [mean(xs, start) for start in stretches], [mean(ys, start) for start in stretches]


def _events(record: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [line for line in record if line.get("event") == name]


def _stage_starts(steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    starts: dict[str, float] = {}
    for line in steps:
        starts.setdefault(line["stage"], line["tokens"])
    return starts


def _held_out(record: Sequence[dict[str, Any]], tokens_at: dict[int, int], marks: dict[str, float]) -> str:
    looks = _events(record, "evaluation")
    if not looks:
        return ""
    sources = [key for key in looks[-1] if key not in ("event", "step", "mean")]
    series = {
        source: (
            [tokens_at.get(look["step"], 0) for look in looks if source in look],
            [look[source] for look in looks if source in look],
        )
        for source in sources
    }
    return lines(series, "Held-out loss by source", "tokens", "nats per token", marks=marks)


def _attention(record: Sequence[dict[str, Any]], tokens_at: dict[int, int]) -> str:
    looks = [look for look in _events(record, "health") if look.get("attention_logits")]
    if not looks:
        return ""
    xs = [tokens_at.get(look["step"], 0) for look in looks]
    series = {
        f"layer {layer}": (xs, [look["attention_logits"][layer] for look in looks])
        for layer in range(len(looks[0]["attention_logits"]))
    }
    return lines(series, "Largest attention logit by layer", "tokens", "|logit|")


def _experts(
    record: Sequence[dict[str, Any]], tokens_at: dict[int, int], marks: dict[str, float], num_mtp: int
) -> list[str]:
    """Draw MaxVio by layer; a layer that did not run has none (in older records -1). MTP layers come last."""
    looks = [look for look in _events(record, "health") if look.get("max_violation")]
    if len(looks) < 2:
        return []
    xs = [tokens_at.get(look["step"], 0) for look in looks]
    num_layers = len(looks[0]["max_violation"])
    names = [f"MoE layer {layer}" if layer < num_layers - num_mtp else "MTP layer" for layer in range(num_layers)]
    series = {
        name: (xs, [math.nan if value is None or value < 0 else value for value in values])
        for name, values in zip(names, zip(*(look["max_violation"] for look in looks), strict=True), strict=True)
    }
    return [
        lines(series, "Expert balance: MaxVio (0 is even)", "tokens", "MaxVio", marks=marks),
        heat_map(
            {name: values for name, (_, values) in series.items()},
            "Expert balance by layer over time",
            "tokens",
            extent=(xs[0], xs[-1]),
        ),
    ]


def _alarms(page: Page, record: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]]) -> None:
    alarms, skipped = _events(record, "alarm"), [line for line in record if "skipped" in line]
    rollbacks = _events(record, "rollback")
    page.text(
        f"{len(steps)} steps, {steps[-1]['tokens']:,} tokens; {len(alarms)} alarms, {len(skipped)} steps skipped, "
        f"{len(rollbacks)} returns to an earlier checkpoint."
    )
    if alarms:
        page.table(["step", "alarm"], [[line["step"], line["message"]] for line in alarms[-8:]], numbers_from=9)


def _samples(page: Page, folder: Path) -> None:
    files = sorted((folder / "samples").glob("step-*.json"))
    if not files:
        return
    page.heading("What it writes")
    first, last = (json.loads(file.read_text()) for file in (files[0], files[-1]))
    for prompt in last:
        titles = [f"step {int(file.stem.split('-')[1]):,}" for file in dict.fromkeys((files[0], files[-1]))]
        texts = [first.get(prompt, ""), last[prompt]][-len(titles) :]
        page.columns(titles, [{"text": prompt + text} for text in texts])
