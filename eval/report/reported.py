"""Scores that others published, with where each comes from, and what was reproduced of them.

`eval/results/reported.csv` has a row for each published score; `eval/results/reproduced/*.jsonl` what people measured
with `tokprune reproduce`.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import pandas as pd

from tokprune.core.errors import RunError
from tokprune.methods import METHODS

from ..run.lines import Damaged, rows_of, typed
from .benchmarks import BENCHMARKS, USUAL
from .exports import markdown

RESULTS = Path(__file__).resolve().parent.parent / "results"
KINDS = {
    "re-run": "measured anew by somebody other than the method's authors",
    "authors table": "by the method's authors",
    "copied": "taken over from another table",
}
ELSEWHERE = ("trim", "visionselector", "idpruner", "prumerge_plus (fixed)")
MOST = {"MME": 2800, "MME-P": 2000}  # the highest score; 100 elsewhere
BUDGET = re.compile(r"\d+(\.\d+)?%?")


@dataclass(frozen=True)
class Reported:
    """A published score.

    Args:
        model, benchmark, method: by their names; "none" is the unpruned model.
        budget: visual tokens kept of an image, or a percentage of them.
        score: in percent, or in points for MME.
        metric: where the benchmark has several.
        source: where it is printed.
        date: year, or year and month.
        kind: one of `KINDS`.
        wrong: why it is known or likely to be wrong; empty elsewhere.
    """

    model: str
    benchmark: str
    method: str
    budget: str
    score: float
    metric: str
    source: str
    date: str
    kind: str
    wrong: str = ""


@dataclass(frozen=True)
class Reproduced:
    """A score that `tokprune reproduce` measured, as a line of its file.

    Args:
        model, benchmark, method, budget, score: as in `Reported`.
        n: questions.
        low, high: ends of the 95 % interval, where the metric has one.
        task: of lmms-eval.
        checkpoint: folder or hub id.
        versions: of packages, and the device.
        date: day.
        paired: by method, of this run: how much more this score is on the same questions at the same budget, or than
            that of "none", and the ends of the 95 % interval.
    """

    model: str
    benchmark: str
    method: str
    budget: str
    score: float
    n: int
    low: float | None
    high: float | None
    task: str
    checkpoint: str
    versions: dict[str, str]
    date: str
    paired: dict[str, list[float]] = field(default_factory=dict)


def read_reported(path: Path = RESULTS / "reported.csv") -> list[Reported]:
    """The published scores.

    Raises:
        RunError: a row breaks the form, with its line.
    """
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    names = [f.name for f in fields(Reported)]
    if list(frame.columns) != names:
        raise RunError(f"{path} has the columns {', '.join(frame.columns)}; use {', '.join(names)}")
    rows = []
    for number, values in enumerate(frame.to_dict("records"), 2):
        if fault := _fault(values):
            raise RunError(f"line {number} of {path}: {fault}")
        rows.append(Reported(**{**values, "score": float(values["score"])}))
    keys = [(r.model, r.benchmark, r.method, r.budget, r.source) for r in rows]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise RunError(f"{path} has {' / '.join(twice)} twice; leave one out")
    return rows


def _fault(values: Mapping[str, str]) -> str:
    """What is wrong with a row of the file; empty where nothing is."""
    known = (*METHODS.names(), *ELSEWHERE, "none")
    if values["method"] not in known:
        return f"no method {values['method']!r}; use one of {', '.join(known)}"
    if not BUDGET.fullmatch(values["budget"]):
        return f"budget {values['budget']!r} is neither a number of tokens nor a percentage, such as 128 or 25%"
    if values["kind"] not in KINDS:
        return f"kind {values['kind']!r} is not one of {', '.join(KINDS)}"
    if not re.fullmatch(r"20\d\d(-\d\d)?", values["date"]):
        return f"date {values['date']!r} is not a year or a year and a month, such as 2026-02"
    if not values["source"] or not values["model"] or not values["benchmark"]:
        return "source, model and benchmark are needed"
    try:
        score = float(values["score"])
    except ValueError:
        return f"score {values['score']!r} is no number"
    most = MOST.get(values["benchmark"], 100)
    return "" if 0 <= score <= most else f"score {score:g} is not between 0 and {most}"


def read_reproduced(folder: Path = RESULTS / "reproduced") -> list[Reproduced]:
    """What people measured.

    Raises:
        RunError: a line breaks the form, with its file and number.
    """
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(rows_of(path, functools.partial(typed, Reproduced)), 1):
            if isinstance(line, Damaged):
                raise RunError(f"line {number} of {path} {line}; write it with tokprune reproduce")
            if fault := _misfit(line):
                raise RunError(f"line {number} of {path}: {fault}; write it with tokprune reproduce")
            found.append(line)
    return found


def _misfit(row: Reproduced) -> str:
    """What is wrong with a measured score; empty where nothing is."""
    if not BUDGET.fullmatch(row.budget):
        return f"budget {row.budget!r} is neither a number of tokens nor a percentage"
    if (row.low is None) != (row.high is None) or (row.low or 0.0) > (row.high or 0.0):
        return f"{row.low} to {row.high} is no interval"
    if wrong := next((name for name, ends in row.paired.items() if len(ends) != 3 or ends[1] > ends[2]), None):
        return f"the difference from {wrong!r} is not a value with the ends of an interval"
    try:
        datetime.date.fromisoformat(row.date)
    except ValueError:
        return f"date {row.date!r} is no day, such as 2026-12-31"
    return ""


def unfit_to_share(row: Reproduced) -> str:
    """Why a measured score cannot be added to the repository; empty where it can."""
    if row.model not in USUAL:
        return f"nobody published scores of {row.model!r}"
    known = next((b for b in BENCHMARKS.values() if b.name == row.benchmark), None)
    if known is None:
        return f"nobody published scores of {row.benchmark!r}"
    if row.n < known.documents:
        return f"{row.n} of {known.documents} questions of {row.benchmark}: run it without --limit"
    if row.method.partition(":")[0].partition("+")[0] not in (*METHODS.names(), "none"):
        return f"no method {row.method!r}"
    most = MOST.get(row.benchmark, 100)
    return "" if 0 <= row.score <= most else f"score {row.score:g} is not between 0 and {most}"


def tables(model: str) -> str:
    """A model's published scores: one table for each budget, a line for each method, a column for each benchmark.

    A cell holds the range over sources and how many there are. What is known to be wrong is struck out and not in the
    range.
    """
    rows = [r for r in read_reported() if r.model == model]
    mine = [r for r in read_reproduced() if r.model == model]
    parts = []
    for budget in sorted({r.budget for r in rows}, key=size_of, reverse=True):
        own = [r for r in rows if r.budget == budget]
        parts += [f"**{in_words(budget)}**", _table(own, [r for r in mine if r.budget == budget])]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Reported], reproduced: Sequence[Reproduced]) -> str:
    benchmarks = list(dict.fromkeys(r.benchmark for r in rows))
    lines = []
    for method in sorted({r.method for r in rows}, key=lambda name: (name != "none", name)):
        own = [r for r in rows if r.method == method]
        measured = ", ".join(f"{r.benchmark} {r.score:.1f}" for r in reproduced if r.method == method)
        cells = [_cell([r for r in own if r.benchmark == name]) for name in benchmarks]
        lines.append([f"`{method}`" if method in METHODS.names() else method, *cells, measured])
    return markdown(["method", *benchmarks, "reproduced"], lines)


def _cell(rows: Sequence[Reported]) -> str:
    right, wrong = [r.score for r in rows if not r.wrong], [f"~~{r.score:g}~~" for r in rows if r.wrong]
    if not right:
        return " ".join(wrong)
    low, high = f"{min(right):g}", f"{max(right):g}"
    spread = low if low == high else f"{low} to {high}"
    return " ".join([spread + (f" ({len(right)})" if len(right) > 1 else ""), *wrong])


def size_of(budget: str) -> float:
    """To order budgets."""
    return float(budget.rstrip("%"))


def in_words(budget: str) -> str:
    """A budget in words."""
    share = f"{budget[:-1]} % of the visual tokens" if budget.endswith("%") else f"{budget} visual tokens"
    return {"0": "no visual token", "100%": "all visual tokens"}.get(budget, share)


def sources() -> str:
    """A line for each source: how many scores, of which kind and date."""
    rows = read_reported()
    lines = []
    for source in dict.fromkeys(r.source for r in rows):
        own = [r for r in rows if r.source == source]
        kinds, models = dict.fromkeys(r.kind for r in own), dict.fromkeys(r.model for r in own)
        lines.append([source, own[0].date, ", ".join(kinds), ", ".join(models), str(len(own))])
    return markdown(["source", "date", "kind", "models", "scores"], lines) + "\n"


def struck() -> str:
    """Scores that are struck out, with the reason."""
    rows = [r for r in read_reported() if r.wrong]
    lines = []
    for key in dict.fromkeys((r.source, r.method, r.model, r.wrong) for r in rows):
        own = [r for r in rows if (r.source, r.method, r.model, r.wrong) == key]
        lines.append([key[0], f"`{key[1]}` on {key[2]}", str(len(own)), key[3]])
    return markdown(["source", "what", "scores", "why"], lines) + "\n"


def lines_of(rows: Sequence[Reproduced]) -> str:
    """As the file to send back."""
    return "".join(json.dumps(asdict(row)) + "\n" for row in rows)
