"""One self-contained HTML page: sections, tables and plots that read in light and dark, with nothing loaded.

Plots are matplotlib figures written as inline SVG. Text and axes take the page's own colour, so one drawing serves
both themes; series have colours that keep their contrast on either.
"""

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SERIES = ("#3b82f6", "#e8710a", "#15a37f", "#c2418f", "#8b6cef", "#a3820b", "#0e9bb5", "#dc4a3d")
"""Colours of series, distinguishable by people who do not see red and green, on white and on near-black."""

INK = "#010203"
"""Stands for the page's text colour inside a drawing."""

Line = tuple[Sequence[float], Sequence[float]]


@dataclass
class Page:
    """A page that grows section by section."""

    title: str
    subtitle: str = ""
    _parts: list[str] = field(default_factory=list)
    _contents: list[tuple[str, str]] = field(default_factory=list)

    def section(self, title: str, intro: str = "") -> None:
        """Begin a section; it appears in the contents."""
        anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        self._contents.append((anchor, title))
        self._parts.append(f'<h2 id="{anchor}">{html.escape(title)}</h2>')
        if intro:
            self.text(intro)

    def text(self, paragraph: str) -> None:
        """Add a paragraph of plain text."""
        self._parts.append(f"<p>{html.escape(paragraph)}</p>")

    def heading(self, title: str) -> None:
        """Add a small heading inside a section."""
        self._parts.append(f"<h3>{html.escape(title)}</h3>")

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[object]],
        *,
        numbers_from: int = 1,
        numbers_to: int = 99,
        folded: str = "",
    ) -> None:
        """Add a table; the columns from `numbers_from` up to `numbers_to` are set right-aligned.

        One that is `folded` is hidden until that name is opened.
        """
        cell = lambda tag, i, value: (  # noqa: E731
            f'<{tag} class="{"n" if numbers_from <= i < numbers_to else "t"}">{html.escape(str(value))}</{tag}>'
        )
        head = "".join(cell("th", i, name) for i, name in enumerate(header))
        body = "".join("<tr>" + "".join(cell("td", i, v) for i, v in enumerate(row)) + "</tr>" for row in rows)
        table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        if folded:
            table = f"<details><summary>{html.escape(folded)}</summary>{table}</details>"
        self._parts.append(table)

    def wide(self, drawing: str) -> None:
        """Add a drawing as wide as the page."""
        self._parts.append(f'<figure class="wide">{drawing}</figure>')

    def plots(self, *drawings: str) -> None:
        """Add drawings side by side, as many to a row as the window holds."""
        figures = "".join(f"<figure>{drawing}</figure>" for drawing in drawings if drawing)
        self._parts.append(f'<div class="plots">{figures}</div>')

    def sample(self, title: str, body: str, *, folded: str = "", name: str = "reasoning", note: str = "") -> None:
        """Add a piece of text to read; `folded` is hidden until its `name` is opened."""
        thinking = (
            f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(folded)}</pre></details>"
            if folded
            else ""
        )
        small = f"<small>{html.escape(note)}</small>" if note else ""
        self._parts.append(
            f'<div class="sample"><b>{html.escape(title)}</b> {small}{thinking}<pre>{html.escape(body)}</pre></div>'
        )

    def columns(self, titles: Sequence[str], bodies: Sequence[Mapping[str, str]]) -> None:
        """Add texts side by side; each body has `text` and optionally `folded` and `note`."""
        cells = []
        for title, body in zip(titles, bodies, strict=True):
            inner = Page("")
            inner.sample(title, body.get("text", ""), folded=body.get("folded", ""), note=body.get("note", ""))
            cells.append(inner._parts[0])
        self._parts.append(f'<div class="columns">{"".join(cells)}</div>')

    def html(self) -> str:
        """Return the page."""
        links = "".join(f'<a href="#{anchor}">{html.escape(title)}</a>' for anchor, title in self._contents)
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{STYLE}</style></head><body>"
            f"<header><h1>{html.escape(self.title)}</h1><p>{html.escape(self.subtitle)}</p><nav>{links}</nav>"
            f'<button id="theme" title="light or dark">◐</button></header><main>{"".join(self._parts)}</main>'
            f"<script>{SCRIPT}</script></body></html>\n"
        )


# --- plots -----------------------------------------------------------------------------------------------------------


def lines(
    series: Mapping[str, Line],
    title: str,
    x: str,
    y: str,
    *,
    marks: Mapping[str, float] | None = None,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    log: bool = False,
) -> str:
    """Draw named lines; `marks` are vertical lines with a label, `bands` low and high values of a series."""
    figure, axes = _axes(title, x, y)
    for index, (name, (xs, ys)) in enumerate(series.items()):
        colour = SERIES[index % len(SERIES)]
        axes.plot(xs, ys, label=name, color=colour, linewidth=1.6, marker="o" if len(xs) < 25 else None, markersize=3)
        if bands and name in bands:
            axes.fill_between(xs, *bands[name], color=colour, alpha=0.18, linewidth=0)
    if log:
        axes.set_yscale("log")
    for name, position in (marks or {}).items():
        axes.axvline(position, color=INK, alpha=0.35, linewidth=0.8, linestyle=":")
        axes.annotate(
            name, (position, 1), xycoords=("data", "axes fraction"), xytext=(3, -4), textcoords="offset points",
            fontsize=6.5, color=INK, alpha=0.7, rotation=90, va="top",
        )  # fmt: skip
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=7, labelcolor=INK)
    return _svg(figure)


def bars(
    values: Mapping[str, float],
    title: str,
    x: str,
    *,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    most: float | None = None,
) -> str:
    """Draw horizontal bars from 0 (to `most`), the first on top, with 95 % intervals where given."""
    names = list(values)[::-1]
    figure, axes = _axes(title, x, "", height=max(1.6, 0.26 * len(names) + 0.9))
    axes.barh(names, [values[name] for name in names], color=SERIES[0], height=0.7)
    for row, name in enumerate(names):
        if intervals and name in intervals:
            axes.plot(intervals[name], [row, row], color=INK, linewidth=1)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, most)
    return _svg(figure)


def heat_map(rows: Mapping[str, Sequence[float]], title: str, x: str, *, extent: tuple[float, float]) -> str:
    """Draw named rows of a matrix, the first at the bottom; `extent` is the range of x, what is NaN stays empty."""
    figure, axes = _axes(title, x, "")
    image = axes.imshow(
        list(rows.values()),
        aspect="auto",
        origin="lower",
        cmap="viridis",
        extent=(*extent, -0.5, len(rows) - 0.5),
        interpolation="nearest",
    )
    axes.grid(visible=False)
    axes.set_yticks(range(len(rows)), list(rows))
    bar = figure.colorbar(image, ax=axes, fraction=0.05)
    bar.ax.tick_params(colors=INK, labelsize=7)
    bar.outline.set_visible(False)
    return _svg(figure)


def graph(needs: Mapping[str, Sequence[str]], title: str) -> str:
    """Draw a graph without circles from left to right; `needs` are the nodes that each node's arrows come from."""
    depth: dict[str, int] = {}
    for name in needs:  # what a node needs comes before it
        depth[name] = 1 + max((depth[need] for need in needs[name]), default=-1)
    columns: dict[int, list[str]] = {}
    for name, column in depth.items():
        columns.setdefault(column, []).append(name)
    place = {
        name: (column, (len(names) - 1) / 2 - row)
        for column, names in columns.items()
        for row, name in enumerate(names)
    }
    tallest = max(map(len, columns.values()))
    figure, axes = _axes(title, "", "", height=0.6 + 0.5 * tallest, width=1.45 * len(columns))
    axes.axis("off")
    for name, sources in needs.items():
        for source in sources:
            arrow = {"arrowstyle": "->", "color": INK, "alpha": 0.3, "linewidth": 0.8, "shrinkA": 22, "shrinkB": 22}
            axes.annotate("", place[name], place[source], arrowprops=arrow)
    for name, (x, y) in place.items():
        box = {"boxstyle": "round,pad=0.35", "facecolor": "none", "edgecolor": SERIES[0], "linewidth": 1}
        label = name.replace("-", "-\n", 1) if len(name) > 12 else name
        axes.text(x, y, label, ha="center", va="center", fontsize=7, color=INK, bbox=box)
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylim(-tallest / 2, tallest / 2)
    return _svg(figure)


def histogram(values: Sequence[float], title: str, x: str, *, log_x: bool = False) -> str:
    """Draw a histogram, with logarithmic bins if asked for."""
    import numpy as np

    figure, axes = _axes(title, x, "count")
    data = np.asarray(values, dtype=float)
    if log_x:
        data = data[data > 0]
        bins = np.geomspace(max(data.min(), 1), max(data.max(), 2), 40) if len(data) else 10
        axes.set_xscale("log")
    else:
        bins = 40
    axes.hist(data, bins=bins, color=SERIES[0])
    return _svg(figure)


def _axes(title: str, x: str, y: str, height: float = 2.7, width: float = 5.2) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=9, color=INK, loc="left", fontweight="bold")
    axes.set_xlabel(x, fontsize=8, color=INK)
    axes.set_ylabel(y, fontsize=8, color=INK)
    axes.tick_params(colors=INK, labelsize=7)
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
        spine.set_alpha(0.4)
    return figure, axes


def _svg(figure: Any) -> str:
    """Return a figure as inline SVG in the page's colours; equal figures give equal text."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "glm45", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # The drawing scales with its column instead of having a size of its own.
    for size in ("width", "height"):
        text = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", text, count=1)
    return text


STYLE = """
:root{--ink:#1b1f24;--soft:#5b6470;--paper:#fff;--raised:#f5f6f8;--rule:#dfe3e8;--accent:#2563eb}
@media(prefers-color-scheme:dark){:root:not(.light){--ink:#e6e9ee;--soft:#9aa4b2;--paper:#12151a;--raised:#1b2027;
--rule:#2c333d;--accent:#7aa7ff}}
:root.dark{--ink:#e6e9ee;--soft:#9aa4b2;--paper:#12151a;--raised:#1b2027;--rule:#2c333d;--accent:#7aa7ff}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
header,main{max-width:1180px;margin:0 auto;padding:0 20px}header{position:relative;padding-top:28px}
h1{font-size:1.7rem;margin:0}header p{color:var(--soft);margin:.2rem 0 1rem}
nav{display:flex;flex-wrap:wrap;gap:.2rem .9rem;border-bottom:1px solid var(--rule);padding-bottom:.8rem;
font-size:.88rem}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
h2{font-size:1.25rem;margin:2.4rem 0 .4rem;padding-top:.4rem}h3{font-size:1rem;margin:1.4rem 0 .3rem}
p{max-width:78ch}.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:16px}
figure{margin:0 0 12px;background:var(--raised);border:1px solid var(--rule);border-radius:10px;padding:10px}
svg{width:100%;height:auto;display:block}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.86rem;margin:.5rem 0 1rem;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .7rem;border-bottom:1px solid var(--rule);white-space:nowrap}th{color:var(--soft);font-weight:600}
.n{text-align:right}.t{text-align:left}td.t{white-space:normal}
td.t:first-child{min-width:14ch}td.t:last-child:not(:first-child){min-width:30ch}
.sample{background:var(--raised);border:1px solid var(--rule);border-radius:10px;padding:10px 14px;margin:.6rem 0;
min-width:0}.sample small{color:var(--soft)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace;margin:.4rem 0 0;
max-height:24rem;overflow:auto}
summary{cursor:pointer;color:var(--soft);font-size:.85rem}.columns{display:grid;
grid-template-columns:repeat(auto-fit,minmax(min(100%,190px),1fr));gap:12px}
#theme{position:absolute;right:20px;top:24px;border:1px solid var(--rule);background:var(--raised);color:var(--ink);
border-radius:8px;width:34px;height:34px;cursor:pointer;font-size:1rem}
@media print{nav,#theme{display:none}}
"""

SCRIPT = """
document.getElementById('theme').onclick=()=>{const r=document.documentElement,
d=r.classList.contains('dark')||(!r.classList.contains('light')&&matchMedia('(prefers-color-scheme: dark)').matches);
r.classList.remove('dark','light');r.classList.add(d?'light':'dark')};
"""
