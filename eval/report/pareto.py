"""What a configuration costs against what it answers: the points, the Pareto front, and the plots of both."""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from tokprune.core.files import replacing

from ..run.rows import DOWNSAMPLE, NONE, SHUFFLED, Row, pooled
from .tables import accuracy, budget

FLOORS = (SHUFFLED, "blind")  # lines; whatever else was run is a point
CONTROLS = (NONE, DOWNSAMPLE, "random", "uniform", "pool")
QUESTION_ONLY = "question only"

# Okabe and Ito's colours without yellow, which is too pale on white; a grey that is seen on white and on black.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_GREY = "#7d7d7d"
_FLOOR_LINES = {QUESTION_ONLY: ":", SHUFFLED: "--", "blind": "-."}
_INK, _GRID = "#010203", "#d9dadb"
# What inline SVG says instead, so that a page has them fit its own colours.
_PAGE = {_INK: "currentColor", _GRID: "var(--line)", _GREY: "var(--control)"}
_PAGE |= {colour: f"var(--c{i})" for i, colour in enumerate(_COLOURS)}
_RC = {
    "font.size": 8.5,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Axis:
    """A cost: its name, the label of its axis, and what it is of a row (None where it is not known)."""

    name: str
    label: str
    of: Callable[[Row], float | None]


def _percent(after: str, before: str) -> Callable[[Row], float | None]:
    def of(row: Row) -> float | None:
        a, b = getattr(row.costs, after), getattr(row.costs, before)
        return None if a is None or not b else 100 * a / b

    return of


def _number(value: float | None, factor: float = 1) -> float | None:
    return None if value is None or math.isnan(value) else factor * value


PREFILL_FLOPS = Axis(
    "prefill FLOPs",
    "FLOPs up to the first token, % of the unpruned",
    _percent("prefill_flops_after", "prefill_flops_before"),
)
LLM_FLOPS = Axis(
    "LLM FLOPs", "FLOPs of the LLM's prefill, % of the unpruned", _percent("llm_flops_after", "llm_flops_before")
)
TIME = Axis(
    "prefill time", "time to the first token, % of the unpruned", lambda row: _number(row.prefill_ratio, factor=100)
)
MILLISECONDS = Axis("prefill time", "time to the first token of a batch, ms", lambda row: _number(row.prefill_ms_p50))
TOKENS = Axis("visual tokens", "visual tokens, mean over decoder layers", lambda row: _number(row.n_visual_mean))


def is_control(method: str) -> bool:
    """Whether a row's method is one that methods have to beat, whatever its options and seeds."""
    return re.split("[:,]", method)[0] in CONTROLS


def points(rows: Sequence[Row]) -> list[Row]:
    """Configurations that are points: seeds of `random` together, floors left out."""
    return [r for r in pooled(rows) if r.method not in FLOORS]


def axes_of(rows: Sequence[Row]) -> list[Axis]:
    """The costs that are known of every point; milliseconds only where nothing relates times to the unpruned run's."""

    def known(axis: Axis) -> bool:
        return all(axis.of(r) is not None for r in points(rows))

    time = TIME if known(TIME) else MILLISECONDS
    return [axis for axis in (PREFILL_FLOPS, LLM_FLOPS, time, TOKENS) if known(axis)]


def front(rows: Sequence[Row], cost: Callable[[Row], float | None]) -> list[Row]:
    """The rows that no other row beats, by rising cost: none costs as little and answers as many, one of both better.

    It goes by the measured means. A step of the front that is smaller than the intervals may be chance, which the plots
    show; leaving such steps out would make the front depend on the order in which configurations are compared, since
    "within the noise of" is not transitive.
    """
    priced = [(price, row) for row in rows if (price := cost(row)) is not None]

    def beaten(price: float, row: Row) -> bool:
        return any(
            p <= price and r.value >= row.value and (p < price or r.value > row.value)
            for p, r in priced
            if r is not row
        )

    return [row for price, row in sorted(priced, key=lambda pair: pair[0]) if not beaten(price, row)]


# ---- how a method looks


@dataclass(frozen=True)
class Style:
    """Colour and marker of a method, the same in every plot of a run."""

    colour: str
    marker: str
    filled: bool = True

    @property
    def line(self) -> dict[str, Any]:
        """What matplotlib calls it."""
        face = self.colour if self.filled else "none"
        size = 8 if self.marker == "*" else 5
        look = dict(color=self.colour, marker=self.marker, markeredgecolor=self.colour, markersize=size)
        return look | {"markerfacecolor": face}


def styles(rows: Sequence[Row]) -> dict[str, Style]:
    """A style for every method with points, in the order of the rows: 48 differ; controls are grey and hollow."""
    names = list(dict.fromkeys(r.method for r in points(rows)))
    n_colours, n_markers = len(_COLOURS), len(_MARKERS)
    found = {}
    for i, name in enumerate(n for n in names if not is_control(n)):
        found[name] = Style(_COLOURS[i % n_colours], _MARKERS[(i + i // n_colours) % n_markers])
    for i, name in enumerate(n for n in names if is_control(n)):
        marker = "*" if name == NONE else _MARKERS[i % n_markers]
        found[name] = Style(_GREY, marker, filled=False)
    return {name: found[name] for name in names}


def described(row: Row) -> str:
    """A configuration in words, as fronts list it."""
    return f"{row.method} {budget(row)}".strip()


# ---- drawing


def _draw(canvas, rows: Sequence[Row], floors: Mapping[str, float], axis: Axis, looks: Mapping[str, Style]) -> dict:
    """One plot; returns what its points say when they are pointed at, by the id of the point."""
    shown, notes = points(rows), {}
    for row in shown:
        if row.method == NONE:
            canvas.axhspan(*row.ends, color=_GREY, alpha=0.13, linewidth=0, zorder=0.5)
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in shown:
        lines[row.method].append(row)
    best = front(shown, axis.of)
    canvas.step(
        [axis.of(r) for r in best],
        [r.value for r in best],
        where="post",
        color=_INK,
        linewidth=1,
        alpha=0.55,
        zorder=2,
    )
    for name, mine in lines.items():
        look, mine = looks[name], sorted(mine, key=lambda r: axis.of(r) or 0)
        canvas.plot([axis.of(r) for r in mine], [r.value for r in mine], color=look.colour, linewidth=0.8, alpha=0.5)
        for row in mine:
            x, gid = axis.of(row) or 0, f"p{len(notes)}"
            spread = [[max(row.value - row.ends[0], 0)], [max(row.ends[1] - row.value, 0)]]  # rounding
            canvas.errorbar(x, row.value, spread, fmt="none", ecolor=look.colour, elinewidth=0.8, alpha=0.45)
            canvas.plot([x], [row.value], **look.line, linestyle="", zorder=3, gid=gid)
            notes[gid] = f"{described(row)}: {accuracy(row)}; {axis.name} {x:.4g}{' %' if '%' in axis.label else ''}"
    _frame(canvas, shown, floors, axis)
    return notes


def _frame(canvas, shown: Sequence[Row], floors: Mapping[str, float], axis: Axis) -> None:
    """Limits by the points; floors as lines where they are within, and named where they lie below."""
    low, high = min(r.ends[0] for r in shown), max(r.ends[1] for r in shown)
    margin = max(0.04 * (high - low), 0.005)
    within = {name: value for name, value in floors.items() if value >= low - 0.1}
    for name, value in within.items():
        canvas.axhline(value, color=_GREY, linestyle=_FLOOR_LINES[name], linewidth=1, zorder=1)
    below = {name: value for name, value in floors.items() if name not in within}
    if below:
        text = "below: " + ", ".join(f"{name} {100 * value:.0f} %" for name, value in below.items())
        canvas.text(0.99, 0.015, text, transform=canvas.transAxes, ha="right", va="bottom", fontsize=7.5)
        margin = max(margin, 0.09 * (high - low))
    lowest = min([low, *within.values()])
    canvas.set_ylim(max(lowest - margin, -0.02), min(high + margin, 1.02))
    canvas.set_xlim(0, 1.04 * max(axis.of(r) or 0 for r in shown) or 1)
    canvas.set(xlabel=axis.label, ylabel="accuracy")
    canvas.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def floors_of(rows: Sequence[Row], question_only: float | None) -> dict[str, float]:
    """What is answered without seeing the picture, by name."""
    asked = {} if question_only is None else {QUESTION_ONLY: question_only}
    return asked | {r.method: r.value for r in rows if r.method in FLOORS}


def write_png(rows: Sequence[Row], question_only: Mapping[str, float | None], path: Path) -> None:
    """All plots of a run in one picture: a column a task, or two columns of one task. No point, no picture.

    Args:
        rows: of all tasks.
        question_only: that floor by task.
        path: the file.
    """
    tasks = {t: [r for r in rows if r.task == t] for t in dict.fromkeys(r.task for r in points(rows))}
    looks, kinds = styles(rows), axes_of(rows)
    if not tasks:
        return
    cells = [(task, axis) for axis in kinds for task in tasks]
    n_columns = len(tasks) if len(tasks) > 1 else min(2, len(kinds))
    n_lines = -(-len(cells) // n_columns)
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in scripts that the font lacks
        size = (6 * n_columns, 3.9 * n_lines + 0.25 * len(looks) / n_columns)
        figure = Figure(figsize=size, layout="constrained")
        canvases = figure.subplots(n_lines, n_columns, squeeze=False).flatten().tolist()
        for canvas in canvases[len(cells) :]:
            canvas.remove()
        for canvas, (task, axis) in zip(canvases, cells, strict=False):
            mine = tasks[task]
            _draw(canvas, mine, floors_of(mine, question_only.get(task)), axis, looks)
            canvas.set_title(f"{task} ({mine[0].n_samples} questions)", parse_math=False)
        floors = {name for task, mine in tasks.items() for name in floors_of(mine, question_only.get(task))}
        legend = figure.legend(handles=_handles(looks, floors), loc="outside lower center", ncols=2 * n_columns)
        for text in legend.get_texts():
            text.set_parse_math(False)
        with replacing(path) as new:
            figure.savefig(new, dpi=150, format="png")


def _handles(looks: Mapping[str, Style], floors: Collection[str]) -> list[Line2D]:
    """Entries of matplotlib's own legend."""
    found = [Line2D([], [], label=name, linestyle="", **look.line) for name, look in looks.items()]
    found += [
        Line2D([], [], label=name, color=_GREY, linestyle=style, linewidth=1)
        for name, style in _FLOOR_LINES.items()
        if name in floors
    ]
    return [*found, Line2D([], [], label="Pareto front", color=_INK, alpha=0.55, linewidth=1)]


@dataclass(frozen=True)
class Plot:
    """One plot for a page: inline SVG, what it shows, and its front."""

    axis: Axis
    svg: str
    front: list[Row]


def plots(rows: Sequence[Row], question_only: float | None, looks: Mapping[str, Style], name: str) -> list[Plot]:
    """The plots of one task as inline SVG; none where nothing but floors was run.

    Args:
        rows: of the task.
        question_only: that floor.
        looks: `styles` of all tasks.
        name: unique within a page; ids of the SVG begin with it.
    """
    found = []
    for i, axis in enumerate(axes_of(rows) if points(rows) else []):
        with matplotlib.rc_context({**_RC, "svg.hashsalt": f"{name} {i}"}):
            figure = Figure(figsize=(4.9, 3.5), layout="constrained")
            notes = _draw(figure.subplots(), rows, floors_of(rows, question_only), axis, looks)
            found.append(Plot(axis, _inline(figure, f"{name}-{i}-", notes), front(points(rows), axis.of)))
    return found


def keys(
    looks: Mapping[str, Style], rows: Sequence[Row], question_only: float | None, name: str
) -> list[tuple[str, str]]:
    """The legend of a task: names with their markers or lines as inline SVG, whose ids begin with `name`."""
    methods = {r.method for r in points(rows)}
    shown = [(label, look.line | {"linestyle": ""}) for label, look in looks.items() if label in methods]
    floors = floors_of(rows, question_only)
    shown += [(floor, dict(color=_GREY, linestyle=_FLOOR_LINES[floor])) for floor in floors]
    shown += [("Pareto front", dict(color=_INK, alpha=0.55))]
    return [(label, _key(line, f"{name}-key{i}")) for i, (label, line) in enumerate(shown)]


def _key(line: Mapping[str, Any], name: str) -> str:
    with matplotlib.rc_context({**_RC, "svg.hashsalt": "key"}):
        figure = Figure(figsize=(0.3, 0.15))
        is_marker = "marker" in line
        x, y = ([0.5], [0.5]) if is_marker else ([0.05, 0.95], [0.5, 0.5])
        figure.add_artist(Line2D(x, y, linewidth=1.2, **line))
        return _inline(figure, f"{name}-", {})


_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def _inline(figure: Figure, prefix: str, notes: Mapping[str, str]) -> str:
    """A figure as an SVG element for a page: ids unique, the page's font and colours, notes on its points."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ET.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in (f"{_SVG}metadata", f"{_SVG}style")]:
            parent.remove(child)
    used = {v[1:] for e in root.iter() for v in e.attrib.values() if v.startswith("#")}
    used |= {m for e in root.iter() for v in e.attrib.values() for m in re.findall(r"url\(#(.*?)\)", v)}
    for element in list(root.iter()):
        name = element.attrib.pop("id", None)
        if name in notes:
            note = ET.Element(f"{_SVG}title")
            note.text = notes[name]
            element.insert(0, note)
        if name in used:
            element.set("id", prefix + name)
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            element.set(key.removeprefix(_XLINK), _of_the_page(value, prefix))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("aria-hidden", "true")
    ET.register_namespace("", _SVG[1:-1])
    return ET.tostring(root, encoding="unicode").replace(f' xmlns="{_SVG[1:-1]}"', "")


def _of_the_page(value: str, prefix: str) -> str:
    """An attribute with ids made unique, the page's colours and its font."""
    if value.startswith("#"):
        value = f"#{prefix}{value[1:]}"
    value = value.replace("url(#", f"url(#{prefix}")
    for colour, name in _PAGE.items():
        value = value.replace(colour, name)
    return re.sub(r"font-family: [^;]*(; )?", "", re.sub(r"font: ([\d.]+)px [^;]*", r"font-size: \1px", value))
