"""What a configuration costs against what it answers: the points, the Pareto front, and the plots of both."""

from __future__ import annotations

import base64
import contextlib
import io
import math
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from tokprune.core.files import replacing

from ..run.rows import NONE, SHUFFLED, Row, pooled
from .tables import FLOORS, QUESTION_ONLY, budget, is_control

# Okabe and Ito's colours without yellow, which is too pale on white.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_INK, _GRID, _GREY = "#1c1e21", "#d9dadb", "#5f6368"
_SMALL = 8.5  # points, of what is written into a plot
_LONG = 24  # letters; a legend of longer names has one column, so that a phone can show it
_ALIKE = 0.035  # of the width of a plot: points of one budget that are closer have one label
_FLOOR_LINES = {QUESTION_ONLY: ":", SHUFFLED: "--", "blind": "-."}
_FRONT: dict[str, Any] = {"color": _INK, "alpha": 0.55, "linewidth": 1}
_DPI = 150
_RC = {
    "font.size": 10,
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
}


@dataclass(frozen=True)
class Axis:
    """A cost: its name, the label of its axis, and its value for a row (None if it is not known)."""

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
COSTS = ("prefill FLOPs", "LLM FLOPs", "prefill time", "visual tokens")


def points(rows: Sequence[Row]) -> list[Row]:
    """Configurations that are points: seeds of `random` are pooled, floors are left out."""
    return [r for r in pooled(rows) if r.method not in FLOORS]


def axes_of(rows: Sequence[Row]) -> list[Axis]:
    """The costs that are known for every point. Time is in milliseconds if it is not known relative to the unpruned."""

    def known(axis: Axis) -> bool:
        return all(axis.of(r) is not None for r in points(rows))

    time = TIME if known(TIME) else MILLISECONDS
    return [axis for axis in (PREFILL_FLOPS, LLM_FLOPS, time, TOKENS) if known(axis)]


def front(rows: Sequence[Row], cost: Callable[[Row], float | None]) -> list[Row]:
    """The rows that no other row beats, by rising cost. A row beats another if it is better in one and worse in none.

    The front goes by the measured means. A step that is smaller than the intervals may be chance, which the plots show.
    Such steps stay: "within the noise of" is not transitive, so without them the front would depend on the order in
    which configurations are compared.
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
        """As keywords of matplotlib."""
        face = self.colour if self.filled else "white"  # lines and bands do not show through
        size = 8 if self.marker == "*" else 5
        look = dict(color=self.colour, marker=self.marker, markeredgecolor=self.colour, markersize=size)
        return look | {"markerfacecolor": face}


def styles(rows: Sequence[Row]) -> dict[str, Style]:
    """A style for every method with points, in the order of the rows: 48 differ. Controls are grey and hollow."""
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
    """A configuration as fronts list it: method and budget."""
    return f"{row.method} {budget(row)}".strip()


# ---- drawing


def _draw(canvas, rows: Sequence[Row], floors: Mapping[str, float], axis: Axis, looks: Mapping[str, Style]) -> None:
    """One plot."""
    shown = points(rows)
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in shown:
        lines[row.method].append(row)
        if row.method == NONE:
            canvas.axhspan(*row.ends, color=_GREY, alpha=0.08, linewidth=0, zorder=0.5)
            for end in row.ends:
                canvas.axhline(end, color=_GREY, alpha=0.5, linewidth=0.6, zorder=0.6)
    best = front(shown, axis.of)
    canvas.step([axis.of(r) for r in best], [r.value for r in best], where="post", zorder=2, **_FRONT)
    for name, mine in lines.items():
        look, mine = looks[name], sorted(mine, key=lambda r: axis.of(r) or 0)
        xs, ys = [axis.of(r) for r in mine], [r.value for r in mine]
        below, above = ([max(side, 0) for side in sides] for sides in zip(*map(_bars, mine), strict=True))  # rounding
        canvas.plot(xs, ys, color=look.colour, linewidth=0.8, alpha=0.5)
        canvas.errorbar(xs, ys, [below, above], fmt="none", ecolor=look.colour, elinewidth=0.8, alpha=0.45)
        canvas.plot(xs, ys, **look.line, linestyle="", zorder=3)
    _frame(canvas, shown, floors, axis)
    _write_budgets(canvas, shown, axis)


def _bars(row: Row) -> tuple[float, float]:
    """How far the interval reaches below and above the value."""
    low, high = row.ends
    return row.value - low, high - row.value


def _write_budgets(canvas, shown: Sequence[Row], axis: Axis) -> None:
    """The budget at the highest of the points that have it and lie close beside each other, where there is room."""
    (left, right), (bottom, top) = canvas.get_xlim(), canvas.get_ylim()
    found = budget_labels([(budget(r), axis.of(r) or 0, r.value) for r in shown], _ALIKE * (right - left))
    inches = [0.8 * side for side in canvas.figure.get_size_inches() / _shape(canvas)]
    letter = _SMALL / 72 / inches[0] * (right - left) * 0.62
    line = _SMALL / 72 / inches[1] * (top - bottom) * 1.2
    for name, x, y, above in without_overlaps(found, letter, line):
        canvas.annotate(
            *(name, (x, y)),
            xytext=(0, 4 if above else -4),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=_SMALL,
            zorder=4,
            bbox={"facecolor": "white", "alpha": 0.55, "edgecolor": "none", "pad": 0.6},
            parse_math=False,
        )


def _shape(canvas) -> tuple[int, int]:
    """Columns and lines of plots in the figure."""
    grid = canvas.get_gridspec()
    return (grid.ncols, grid.nrows) if grid else (1, 1)


Label = tuple[str, float, float]


def without_overlaps(labels: Sequence[Label], letter: float, line: float) -> list[tuple[str, float, float, bool]]:
    """Labels above their points, else below them, else left out, so that none lies on another.

    Args:
        labels: text, x and y.
        letter: width of a letter in units of x.
        line: height of a line in units of y.
    """
    boxes: list[tuple[float, float, float, float]] = []
    found = []
    for name, x, y in labels:
        half = letter * len(name) / 2
        for is_above in (True, False):
            low = y + 0.4 * line if is_above else y - 1.4 * line
            box = x - half, x + half, low, low + line
            if not any(box[0] < b[1] and b[0] < box[1] and box[2] < b[3] and b[2] < box[3] for b in boxes):
                boxes.append(box)
                found.append((name, x, y, is_above))
                break
    return found


def budget_labels(placed: Sequence[tuple[str, float, float]], reach: float) -> list[Label]:
    """Where budgets are written: at the highest point of every row of points that are at most `reach` apart.

    Args:
        placed: budget (empty where there is none), x and y of every point.
        reach: in units of x.
    """
    found: list[Label] = []
    for name in dict.fromkeys(name for name, _, _ in placed if name):
        group: list[tuple[float, float]] = []
        for x, y in [*sorted((x, y) for other, x, y in placed if other == name), (math.inf, 0.0)]:
            if group and x - group[-1][0] > reach:
                found.append((name, *max(group, key=lambda point: point[1])))
                group = []
            group.append((x, y))
    return found


def _frame(canvas, shown: Sequence[Row], floors: Mapping[str, float], axis: Axis) -> None:
    """Limits that fit the points. Floors are lines; floors far below the points are named instead."""
    low, high = min(r.ends[0] for r in shown), max(r.ends[1] for r in shown)
    margin = max(0.04 * (high - low), 0.005)
    within = {name: value for name, value in floors.items() if value >= low - 0.1}
    for name, value in within.items():
        canvas.axhline(value, color=_GREY, linestyle=_FLOOR_LINES[name], linewidth=1, zorder=1)
    below = {name: value for name, value in floors.items() if name not in within}
    if below:
        text = "below: " + ", ".join(f"{name} {100 * value:.0f} %" for name, value in below.items())
        lines = textwrap.wrap(text, 42)
        canvas.text(0.99, 0.015, "\n".join(lines), transform=canvas.transAxes, ha="right", va="bottom", fontsize=_SMALL)
        margin = max(margin, (0.03 + 0.07 * len(lines)) * (high - low))
    lowest = min([low, *within.values()])
    bottom = max(lowest - margin, -0.02)
    canvas.set_ylim(bottom, min(high + margin, 1.02))
    canvas.set_xlim(0, 1.04 * max(axis.of(r) or 0 for r in shown) or 1)
    cut = f" (the axis begins at {100 * bottom:.0f} %)" if bottom > 0.005 else ""
    canvas.set(xlabel=axis.label, ylabel=f"accuracy{cut}")
    canvas.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def floors_of(rows: Sequence[Row], question_only: float | None) -> dict[str, float]:
    """The share of answers that are right without the picture, by name of the floor."""
    asked = {} if question_only is None else {QUESTION_ONLY: question_only}
    return asked | {r.method: r.value for r in rows if r.method in FLOORS}


def write_png(rows: Sequence[Row], question_only: Mapping[str, float | None], path: Path) -> None:
    """`figure_of` as a file; without points, none is written."""
    figure = figure_of(rows, question_only)
    if figure is not None:
        with _drawing(), replacing(path) as new:
            figure.savefig(new, dpi=_DPI, format="png")


class NotebookFigure(Figure):
    """A figure that a notebook shows without pyplot's magic."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def figure_of(rows: Sequence[Row], question_only: Mapping[str, float | None]) -> Figure | None:
    """All plots of a run in one picture: a column for each task, or two columns for one task; None without points.

    Args:
        rows: of all tasks.
        question_only: that floor by task.
    """
    tasks = {t: [r for r in rows if r.task == t] for t in dict.fromkeys(r.task for r in points(rows))}
    looks, kinds = styles(rows), axes_of(rows)
    if not tasks:
        return None
    floors = {task: floors_of(mine, question_only.get(task)) for task, mine in tasks.items()}
    cells = [(task, axis) for axis in kinds for task in tasks]
    n_columns = len(tasks) if len(tasks) > 1 else min(2, len(kinds))
    n_lines = -(-len(cells) // n_columns)
    with _drawing():
        size = (6 * n_columns, 3.9 * n_lines + 0.25 * len(looks) / n_columns)
        figure = NotebookFigure(figsize=size, layout="constrained")
        canvases = figure.subplots(n_lines, n_columns, squeeze=False).flatten().tolist()
        for canvas in canvases[len(cells) :]:
            canvas.remove()
        for canvas, (task, axis) in zip(canvases, cells, strict=False):
            _draw(canvas, tasks[task], floors[task], axis, looks)
            canvas.set_title(f"{task} ({tasks[task][0].n_samples} questions)", parse_math=False)
        _legend(figure, looks, {name for some in floors.values() for name in some}, 2 * n_columns)
    return figure


@contextlib.contextmanager
def _drawing() -> Iterator[None]:
    """How figures look; names in scripts that the font lacks are no reason for a warning."""
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def _legend(figure: Figure, looks: Mapping[str, Style], floors: Collection[str], n_columns: int) -> Legend:
    """Methods, floors and the front, below the plots."""
    handles = [Line2D([], [], label=name, linestyle="", **look.line) for name, look in looks.items()]
    handles += [
        Line2D([], [], label=name, color=_GREY, linestyle=style, linewidth=1)
        for name, style in _FLOOR_LINES.items()
        if name in floors
    ]
    handles.append(Line2D([], [], label="Pareto front", **_FRONT))
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=n_columns)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return legend


@dataclass(frozen=True)
class Plot:
    """One picture for a page: PNG as base64, and what it shows, in words."""

    png: str
    alt: str
    front: Sequence[str] = ()


def plots(
    rows: Sequence[Row], question_only: float | None, looks: Mapping[str, Style]
) -> tuple[dict[str, Plot], Plot | None]:
    """The plots of one task by the name of their cost, and their legend; none if only floors were run.

    Args:
        rows: of the task.
        question_only: that floor.
        looks: `styles` of all tasks.
    """
    shown, floors = points(rows), floors_of(rows, question_only)
    if not shown:
        return {}, None
    found = {}
    with _drawing():
        for axis in axes_of(rows):
            figure = Figure(figsize=(4.9, 3.7), layout="constrained")
            _draw(figure.subplots(), rows, floors, axis, looks)
            best = [described(r) for r in front(shown, axis.of)]
            found[axis.name] = Plot(_encoded(figure), _alt(shown, floors, axis), best)
        methods = {r.method for r in shown}
        mine = {name: look for name, look in looks.items() if name in methods}
        figure = Figure(figsize=(9.8, 1))
        longest = max(map(len, mine), default=0)
        legend = _legend(figure, mine, floors, 1 if longest > _LONG else 2)
        words = "; ".join(text.get_text() for text in legend.get_texts())
        return found, Plot(_encoded(figure, bbox_inches="tight"), f"Legend: {words}")


def _alt(shown: Sequence[Row], floors: Mapping[str, float], axis: Axis) -> str:
    """What a plot shows, for who cannot see it."""
    values, costs = [100 * r.value for r in shown], [axis.of(r) or 0 for r in shown]
    text = (
        f"Accuracy of {len(shown)} configurations, {min(values):.1f} % to {max(values):.1f} %, against {axis.label}, "
        f"{min(costs):.4g} to {max(costs):.4g}."
    )
    if floors:
        text += f" Floors: {', '.join(f'{name} {100 * value:.1f} %' for name, value in floors.items())}."
    return f"{text} The table below has the figures."


def _encoded(figure: Figure, **options: Any) -> str:
    file = io.BytesIO()
    figure.savefig(file, dpi=_DPI, format="png", **options)
    return base64.b64encode(file.getvalue()).decode()
