"""A built corpus as one HTML page: where it comes from, what was dropped and why, buckets, lengths, texts to read."""

import html
import json
import math
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import fsspec

from glm45.corpus.document import FOUND_KINDS

NUM_SAMPLES = 3  # texts shown of each dataset
SAMPLE_CHARACTERS = 900
BUCKET_ORDER = {"high": 0, "medium": 1, "low": 2, "heldout": 3}


@dataclass
class Reading:
    """What a pass over the documents gives: lengths, and a few texts of each dataset."""

    lengths: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))


def write_report(folder: Path) -> Path:
    """Write `report.html` into a corpus folder and return its path.

    Raises FileNotFoundError if the corpus is not built.
    """
    manifest_path = folder / "manifest.json"
    if not manifest_path.exists():
        raise FileNotFoundError(f"{folder} has no manifest.json: run glm45 data build first")
    manifest = json.loads(manifest_path.read_text())
    reading = read_documents(folder / manifest["documents"])
    template = resources.files("glm45.corpus").joinpath("report.html").read_text()
    sections = [
        _summary(manifest),
        _funnel(manifest),
        _sources(manifest),
        _datasets(manifest),
        _scorers(manifest),
        _lengths(reading),
        _drops(manifest),
        _samples(reading),
        _inputs(manifest),
    ]
    path = folder / "report.html"
    path.write_text(template.replace("{{name}}", html.escape(folder.name)).replace("{{body}}", "\n".join(sections)))
    return path


def read_documents(folder: Path) -> Reading:
    """Read every document file of a corpus once; the samples are the same every time."""
    reading = Reading()
    for path in sorted(folder.glob("*.jsonl.zst")):
        dataset = path.name.removesuffix(".jsonl.zst").rpartition("-")[0]
        random_source = random.Random(path.name)
        with fsspec.open(str(path), "rt", compression="infer", encoding="utf-8") as stream:
            for line in stream:
                record = json.loads(line)
                text = record.get("text") or json.dumps(record["messages"], ensure_ascii=False, indent=1)
                reading.lengths[dataset.partition(".")[0].replace("-long", "")][_octave(len(text))] += 1
                _keep_sample(reading.samples[dataset], record | {"text": text}, random_source)
    return reading


def _octave(length: int) -> int:
    return int(math.log2(max(length, 1)))


def _keep_sample(samples: list[dict[str, Any]], record: dict[str, Any], random_source: random.Random) -> None:
    """Keep a few records, each equally likely enough for reading."""
    if len(samples) < NUM_SAMPLES:
        samples.append(record)
    elif random_source.random() < 0.02:
        samples[random_source.randrange(NUM_SAMPLES)] = record


def _section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{title}</h2><p class=lead>{text}</p>{body}</section>"


def _table(head: list[str], rows: list[list[Any]], numeric: set[int]) -> str:
    def cell(tag: str, index: int, value: Any) -> str:
        return f"<{tag} class=n>{value}</{tag}>" if index in numeric else f"<{tag}>{value}</{tag}>"

    lines = ["".join(cell("th", i, v) for i, v in enumerate(head))]
    lines += ["".join(cell("td", i, v) for i, v in enumerate(row)) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _bar(share: float, label: str = "", kind: str = "") -> str:
    width = f"calc((100% - 76px) * {min(max(share, 0), 1):.4f})"
    return f"<div class=track><div class='bar {kind}' style='width:{width}'></div><span>{label}</span></div>"


def _count(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):,.1f} {unit}"
    return f"{value:,.0f}"


def _characters(rows: list[dict[str, Any]]) -> int:
    return sum(row["characters"] for row in rows)


def _documents(rows: list[dict[str, Any]]) -> int:
    return sum(row["documents"] for row in rows)


def _summary(manifest: dict[str, Any]) -> str:
    datasets = manifest["datasets"]
    trained = {name: entry for name, entry in datasets.items() if not name.endswith(".heldout")}
    figures = [
        ("characters read", _count(_characters(manifest["steps"][0]["out"]))),
        ("documents kept", _count(sum(entry["documents"] for entry in trained.values()))),
        ("tokens to train on", _count(sum(entry["tokens"] for entry in trained.values()))),
        ("tokens held out", _count(sum(e["tokens"] for n, e in datasets.items() if n.endswith(".heldout")))),
        *([("vocabulary", _count(manifest["tokenizer"]["vocab_size"]))] if "tokenizer" in manifest else []),
        ("seconds", f"{manifest['seconds']:.0f}"),
    ]
    return "<div class=figures>" + "".join(f"<div><b>{value}</b>{name}</div>" for name, value in figures) + "</div>"


def _funnel(manifest: dict[str, Any]) -> str:
    steps = manifest["steps"]
    top = max(_characters(step["out"]) for step in steps)
    rows = []
    for step in steps:
        dropped = sum(entry["documents"] for entry in step["dropped"].values())
        size = _characters(step["out"])
        rows.append([step["step"], _count(_documents(step["out"])), _bar(size / top, _count(size)), _count(dropped)])
    table = _table(["after", "documents", "characters", "dropped here"], rows, {1, 3})
    return _section("Step by step", "The last step drops the lowest bucket and adds repository contexts.", table)


def _sources(manifest: dict[str, Any]) -> str:
    first, last = manifest["steps"][0]["out"], manifest["steps"][-1]["out"]
    units = Counter(unit["source"] for unit in manifest["units"])
    rows = []
    names = sorted({(row["source"], row["kind"]) for row in [*first, *last]})
    for source, kind in names:
        read = [row for row in first if (row["source"], row["kind"]) == (source, kind)]
        kept = [row for row in last if (row["source"], row["kind"]) == (source, kind)]
        share = _characters(kept) / _characters(read) if read else 0
        bar = _bar(share, f"{100 * share:.0f} %") if kind in FOUND_KINDS else "made, not found"
        rows.append([source, units[source], kind, _count(_characters(read)), _count(_characters(kept)), bar])
    table = _table(["source", "units", "kind", "characters read", "kept", "share kept"], rows, {1, 3, 4})
    languages: Counter[str] = Counter()
    for row in last:
        if row["kind"] in FOUND_KINDS:
            languages[row["language"]] += row["characters"]
    top = languages.most_common(12)
    bars = [[language, _bar(size / top[0][1], _count(size))] for language, size in top]
    return _section("Sources", "Characters by source and kind, and how much of them stayed.", table) + _section(
        "Languages",
        "Of prose (identified) and of code (by file type), in characters kept.",
        _table(["language", "characters"], bars, set()),
    )


def _datasets(manifest: dict[str, Any]) -> str:
    datasets, repeats = manifest["datasets"], manifest["mixture"]["repeats"]
    top = max((entry["tokens"] for entry in datasets.values()), default=0)
    rows = []
    for name in sorted(
        datasets, key=lambda name: (name.partition(".")[0], BUCKET_ORDER.get(name.partition(".")[2], 9))
    ):
        entry, bucket = datasets[name], name.partition(".")[2]
        times = "–" if bucket == "heldout" else f"{repeats.get(f'*.{bucket}', 1.0):g} ×"
        bar = _bar(entry["tokens"] / top, _count(entry["tokens"]), bucket)
        rows.append(
            [name, _count(entry["documents"]), bar, times, f"{entry['text_bytes'] / max(entry['tokens'], 1):.2f}"]
        )
    table = _table(["dataset", "documents", "tokens", "epochs", "bytes a token"], rows, {1, 3, 4})
    text = (
        "Every dataset that can be mixed, by bucket; epochs relative to a bucket at its natural rate. <i>-long</i> are "
        "long documents, <i>codeweb</i> pages about code."
    )
    return _section("Datasets and mixture", text, table)


def _scorers(manifest: dict[str, Any]) -> str:
    rows = []
    for name, entry in manifest["scorers"].items():
        auc = "no labels here" if entry["auc"] is None else f"{entry['auc']:.3f}"
        edges = ", ".join(f"{edge:.3g}" for edge in manifest["thresholds"].get(name, [])) or "–"
        rows.append([name, entry["examples"], entry["good"], entry["bad"], auc, edges, _strip(entry["judged"])])
    head = [
        "scorer",
        "trained on",
        "good",
        "bad",
        "AUC",
        "buckets part at",
        "scores of labelled documents: good above, bad below",
    ]
    text = "Each scorer is measured on documents that it was not trained on, of packages that it has not seen."
    return _section("Quality scorers", text, _table(head, rows, {1, 2, 3, 4}))


def _strip(judged: list[dict[str, Any]]) -> str:
    dots = []
    for row in judged[:200]:
        kind, height = ("good", 9) if row["label"] else ("bad", 23)
        title = f"<title>{html.escape(row['path'])} {row['score']:.3f}</title>"
        dots.append(f"<circle cx='{4 + 252 * row['score']:.1f}' cy='{height}' r=3 class={kind}>{title}</circle>")
    return f"<svg width=260 height=32><line x1=0 x2=260 y1=16 y2=16 />{''.join(dots)}</svg>" if judged else "–"


def _lengths(reading: Reading) -> str:
    blocks = []
    for name, counts in sorted(reading.lengths.items()):
        top, low, high = max(counts.values()), min(counts), max(counts)
        columns = "".join(
            f"<div title='{2**octave:,}–{2 ** (octave + 1):,} characters: {counts[octave]:,} documents'>"
            f"<i style='height:{100 * counts[octave] / top:.0f}%'></i><span>{_power(octave)}</span></div>"
            for octave in range(low, high + 1)
        )
        caption = f"<figcaption>{name} · {sum(counts.values()):,}</figcaption>"
        blocks.append(f"<figure>{caption}<div class=columns>{columns}</div></figure>")
    text = "Documents by length in characters; each column is twice as long as the one before."
    return _section("Lengths", text, "<div class=grid>" + "".join(blocks) + "</div>")


def _power(octave: int) -> str:
    value = 2**octave
    return f"{value // 1024}k" if value >= 1024 else str(value)


def _drops(manifest: dict[str, Any]) -> str:
    blocks = []
    for step in manifest["steps"]:
        if not step["dropped"]:
            continue
        rows = []
        top = max(entry["documents"] for entry in step["dropped"].values())
        most_first = sorted(step["dropped"].items(), key=lambda item: -item[1]["documents"])
        for reason, entry in most_first:
            examples = "".join(
                f"<dt>{html.escape(example['id'])}</dt><dd>{html.escape(example['text'][:300]) or '–'}</dd>"
                for example in entry["examples"]
            )
            details = f"<details><summary>{len(entry['examples'])} examples</summary><dl>{examples}</dl></details>"
            bar = _bar(entry["documents"] / top, _count(entry["documents"]), "low")
            rows.append([html.escape(reason), bar, _count(entry["characters"]), details])
        blocks.append(f"<h3>{step['step']}</h3>" + _table(["reason", "documents", "characters", ""], rows, {2}))
    return _section(
        "What was dropped, and why", "Every reason with its count and up to five examples.", "".join(blocks)
    )


def _samples(reading: Reading) -> str:
    blocks = []
    for name in sorted(
        reading.samples, key=lambda name: (name.partition(".")[0], BUCKET_ORDER.get(name.partition(".")[2], 9))
    ):
        texts = []
        for record in reading.samples[name]:
            metadata, text = record["metadata"], record["text"]
            score = f" · quality {metadata['quality']:.3f}" if "quality" in metadata else ""
            mathematics = f" · mathematics {metadata['mathematics']:.2f}" if "mathematics" in metadata else ""
            about = f"{html.escape(record['id'])} · {len(text):,} characters{score}{mathematics}"
            cut = html.escape(text[:SAMPLE_CHARACTERS]) + (" …" if len(text) > SAMPLE_CHARACTERS else "")
            texts.append(f"<div class=sample><div>{about}</div><pre>{cut}</pre></div>")
        bucket = name.partition(".")[2]
        blocks.append(
            f"<details class=dataset><summary><b class={bucket}>{bucket}</b> {name}</summary>{''.join(texts)}</details>"
        )
    return _section("Texts to read", "A few documents of every dataset, as they are trained on.", "".join(blocks))


def _inputs(manifest: dict[str, Any]) -> str:
    rows = [
        [unit["source"], unit["package"], unit["version"], html.escape(unit["license"])] for unit in manifest["units"]
    ]
    table = _table(["source", "package", "version", "licence"], rows, set())
    recipe = html.escape(json.dumps(manifest["recipe"], indent=1))
    body = f"<details><summary>{len(rows)} units with versions and licences</summary>{table}</details>"
    body += f"<details><summary>the recipe</summary><pre>{recipe}</pre></details>"
    return _section("Inputs", "What it was built from; hashes are in the manifest.", body)
