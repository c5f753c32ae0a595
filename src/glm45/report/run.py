"""The report of a whole run: one HTML file from the folder of its steps."""

import contextlib
import json
import os
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from glm45.evaluation.runner import ACCEPTANCE, RESULT, TRANSCRIPTS
from glm45.files import write_atomically
from glm45.page import Page, bars, graph
from glm45.pipeline import RECORD
from glm45.report.reinforcement import add_reinforcement
from glm45.report.training import add_training

REPORT = "report.html"
CONFIGURATION = "run.json"
"""File of a whole run with its resolved configuration."""

LIMITS = (
    "At this size much of what reinforcement learning gains is choice of strategy: the model learns to prefer the "
    "careful of the ways that fine-tuning taught it. The share of careful answers is reported beside the accuracy.",
    "Held-out prompts are split by hash from the same generators as the training prompts: these figures show learning "
    "within a family of tasks, not transfer to others.",
    "An expert may be weaker than the unified model, as in the demo: the unified model learns from more examples than "
    "any expert, so what it keeps of an expert says little about unification at scale.",
    "Intervals are bootstrap intervals over tasks for one trained model; they do not cover other seeds.",
)
"""What the numbers do not show."""


def write_report(run: Path, out: Path | None = None, *, stale: Collection[str] = ()) -> Path:
    """Write the report of a run folder (default: its `report.html`) and return its path.

    Steps in `stale` are named but not shown: they belong to another configuration or to other inputs. Raises
    FileNotFoundError if the folder holds no other finished step.
    """
    finished = dict(_records(run))
    records = {name: record for name, record in finished.items() if name not in stale}
    if not records:
        raise FileNotFoundError(f"{run} holds no finished step that is up to date: run `glm45 run` first")
    page = Page(f"glm45: {run.name}", f"{len(records)} steps, {_hours(records)}")
    if left_out := ", ".join(name for name in finished if name in stale):
        page.text(f"Not shown, since made with another configuration or from other inputs: {left_out}.")
    _add_costs(page, records)
    if (run / CONFIGURATION).exists():
        page.sample("configuration", "", folded=(run / CONFIGURATION).read_text(), name="resolved, as JSON")
    tokens: dict[str, dict[str, int]] = {}  # of each dataset, by the step that made the data
    for name, record in records.items():
        folder = run / "steps" / name
        if (folder / "manifest.json").exists():
            manifest = json.loads((folder / "manifest.json").read_text())
            if manifest["datasets"]:  # a corpus that a later step tokenizes is told there
                _add_corpus(page, manifest)
                tokens[name] = {key: entry["tokens"] for key, entry in manifest["datasets"].items()}
        if (folder / "metrics.jsonl").exists() and (folder / "policy").exists():
            page.section(f"Reinforcement learning: {name}")
            add_reinforcement(page, folder)
        elif (folder / "metrics.jsonl").exists():
            page.section(f"Training: {name}")
            add_training(page, folder, next((tokens[need] for need in record["tokens"] if need in tokens), {}))
    _add_evaluation(page, run, list(records))
    _add_lineage(page, records)
    page.section("What the numbers do not show")
    for limit in LIMITS:
        page.text(limit)
    path = out or run / REPORT
    write_atomically(path, page.html())
    return path


def _records(run: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield finished steps in the order in which they finished."""
    found = [(file.parent.name, json.loads(file.read_text())) for file in (run / "steps").glob(f"*/{RECORD}")]
    yield from sorted(found, key=lambda pair: pair[1]["finished"])


def _hours(records: Mapping[str, Mapping[str, Any]]) -> str:
    wall = sum(record["wall_seconds"] for record in records.values())
    cpu = sum(record["cpu_seconds"] for record in records.values())
    return f"{wall / 60:.1f} minutes of steps, {cpu / 60:.1f} core-minutes"


def _add_costs(page: Page, records: Mapping[str, Mapping[str, Any]]) -> None:
    page.section("What was run", _machine())
    page.table(
        ["step", "wall s", "CPU s", "peak MB", "made from"],
        [
            [
                name,
                f"{record['wall_seconds']:.1f}",
                f"{record['cpu_seconds']:.1f}",
                f"{record['peak_memory_bytes'] / 1e6:.0f}",
                ", ".join(record["tokens"]) or "–",
            ]
            for name, record in records.items()
        ],
        numbers_to=4,
    )
    page.plots(bars({name: record["wall_seconds"] for name, record in records.items()}, "Time by step", "seconds"))


PACKAGES = ("glm45", "torch", "numpy", "tokenizers", "safetensors", "datatrove", "scikit-learn", "math-verify")
"""Whose versions are told."""


def _machine() -> str:
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} not installed")
    system = f"{platform.system()} {platform.machine()}, {_processor()}, Python {platform.python_version()}"
    return f"{system}, {', '.join(versions)}."


def _processor() -> str:
    """The processor's name, cores and memory, as far as the system tells."""
    name, memory = platform.processor() or "unknown processor", ""
    with contextlib.suppress(OSError, IndexError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name")).split(":")[1].strip()
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = f", {total / 2**30:.0f} GiB of memory"
    return f"{name}, {os.cpu_count()} cores{memory}"


def _add_corpus(page: Page, manifest: Mapping[str, Any]) -> None:
    page.section("Data")
    tokens = {key: entry["tokens"] for key, entry in manifest["datasets"].items()}
    page.plots(bars({key: value / 1e6 for key, value in tokens.items()}, "Tokens by dataset", "million tokens"))
    if sources := manifest.get("recipe", {}).get("sources", []):
        page.table(
            ["source", "read as", "what", "licences"], [_source_row(each, manifest) for each in sources], numbers_from=9
        )
    steps = manifest.get("steps", [])
    if steps:
        page.table(["step", "documents left", "dropped for"], [_step_row(step) for step in steps], numbers_to=2)


def _source_row(source: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    """Return a source with the packages it gave, where it was fetched with their versions, and their licences."""
    units = [unit for unit in manifest.get("units", []) if unit["source"] == source["name"]]
    what = ", ".join(f"{unit['package']} {unit['version']}".strip() for unit in units)
    fetched = len(manifest.get("downloads", {}).get(source["name"], {}))
    licences = sorted({unit["license"] for unit in units}) or [source["license"]]
    return [source["name"], source["reader"], what + (f" ({fetched} fetched)" if fetched else ""), "; ".join(licences)]


def _step_row(step: Mapping[str, Any]) -> list[str]:
    dropped = step.get("dropped", {})
    reasons = ", ".join(f"{reason} {entry['documents']:,}" for reason, entry in sorted(dropped.items()))
    return [step["step"], f"{sum(tally['documents'] for tally in step['out']):,}", reasons or "–"]


def _add_evaluation(page: Page, run: Path, order: Sequence[str]) -> None:
    """Add the table of every model's score on every suite, with samples side by side; models in the run's order."""
    results: dict[str, dict[str, Any]] = {}
    for model in order:
        for file in sorted((run / "steps").glob(f"*/{model}/*/{RESULT}")):
            results.setdefault(file.parent.name, {})[model] = json.loads(file.read_text())
    if not results:
        return
    page.section("Evaluation", "Means over held-out tasks with 95 % bootstrap intervals.")
    models = [model for model in order if any(model in row for row in results.values())]
    page.table(
        ["suite", *models], [[suite, *(_score(row.get(model)) for model in models)] for suite, row in results.items()]
    )
    page.plots(*(_bars(suite, row) for suite, row in results.items()), _acceptance(run))
    for suite, row in results.items():
        page.heading(suite)
        _add_answers(page, run, suite, list(row))


def _bars(suite: str, row: Mapping[str, Mapping[str, Any]]) -> str:
    scores = {model: result["metrics"]["score"] for model, result in row.items() if "score" in result["metrics"]}
    means = {model: score["mean"] for model, score in scores.items()}
    intervals = {model: (score["low"], score["high"]) for model, score in scores.items()}
    return bars(means, suite, "score", intervals=intervals, most=1.0) if means else ""


def _acceptance(run: Path) -> str:
    """Draw how often each model's MTP layer guessed the next token of its own greedy answers."""
    shares: dict[str, float] = {}
    for file in sorted((run / "steps").glob(f"*/{ACCEPTANCE}")):
        shares |= {name: share for name, share in json.loads(file.read_text()).items() if share is not None}
    return bars(shares, "Drafts of the MTP layer that greedy decoding accepts", "share", most=1.0) if shares else ""


def _score(result: Mapping[str, Any] | None) -> str:
    score = (result or {}).get("metrics", {}).get("score")
    return f"{score['mean']:.1%} [{score['low']:.1%}, {score['high']:.1%}]" if score else "–"


def _add_answers(page: Page, run: Path, suite: str, models: list[str], num_tasks: int = 2) -> None:
    """Add the models' answers to the same tasks, side by side, with reasoning folded."""
    answers: dict[str, dict[str, Any]] = {}
    for model in models:
        for file in (run / "steps").glob(f"*/{model}/{suite}/{TRANSCRIPTS}"):
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            answers[model] = {row["task_id"]: row for row in rows}
    shared = set.intersection(*(set(rows) for rows in answers.values())) if answers else set()
    for task_id in sorted(shared)[:num_tasks]:
        rows = [answers[model][task_id] for model in answers]
        page.text(str(rows[0]["prompt"][-1]["content"]))
        page.columns(list(answers), [_shown(row) for row in rows])


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    message = row["message"]
    calls = [call["function"] for call in message.get("tool_calls") or []]
    text = (message.get("content") or "") + "".join(f"\n{call['name']}({call['arguments']})" for call in calls)
    note = "cut by the cap" if row["finish_reason"] == "length" else ""
    return {"text": text, "folded": message.get("reasoning_content") or "", "note": note}


def _add_lineage(page: Page, records: Mapping[str, Mapping[str, Any]]) -> None:
    page.section("Lineage", "Every dataset and checkpoint, by the identity of the step that made it and of its inputs.")
    known = {name: [need for need in record["tokens"] if need in records] for name, record in records.items()}
    page.wide(graph(known, "What was made from what"))
    page.table(
        ["step", "made as", "by", "from"],
        [
            [
                name,
                record["token"],
                record["function"],
                ", ".join(f"{n} {t}" for n, t in record["tokens"].items()) or "–",
            ]
            for name, record in records.items()
        ],
        numbers_from=9,
    )
