"""What a comparison says, in plain words: what is lost at each budget, and whether the task can tell methods apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ..run.rows import DOWNSAMPLE, NONE, SHUFFLED, Row, pooled
from .pareto import FLOORS, is_control
from .tables import budget

NBSP = "\u00a0"
_FEW = 100  # questions


@dataclass(frozen=True)
class Finding:
    """A heading of one or two words with what there is to say; `is_warning` where no reader should miss it."""

    label: str
    text: str
    is_warning: bool = False


def headline(rows: Sequence[Row]) -> str:
    """What the unpruned model answers, of the rows of one task."""
    bare = _one(rows, NONE)
    first = rows[0]
    if bare is None:
        return f"{first.model} was not run unpruned, so nothing here says what pruning costs."
    return (
        f"Unpruned, {first.model} answers {_percent(bare.value)} of {bare.n_samples} questions right, "
        f"95{NBSP}% interval {_percent(bare.ends[0])} to {_percent(bare.ends[1])}."
    )


def findings(rows: Sequence[Row], question_only: float | None) -> list[Finding]:
    """Floors, then every budget from the largest, then how fine a difference the run can see.

    Args:
        rows: of one task.
        question_only: the share of questions that the most frequent training answer gets right.
    """
    shown = pooled(rows)
    found = [_floors(shown, question_only)]
    budgets = dict.fromkeys(budget(r) for r in sorted(shown, key=lambda r: -(r.keep_ratio or r.flops_ratio or 0)))
    if _one(rows, NONE) is not None:
        found += [f for name in budgets if (f := _budget(name, [r for r in shown if budget(r) == name])) is not None]
        found += _resolution(shown)
    return found + _missing(rows)


def _floors(rows: Sequence[Row], question_only: float | None) -> Finding:
    parts = [] if question_only is None else [f"the most frequent training answer {_percent(question_only)}"]
    for name, words in (("blind", "no visual token"), (SHUFFLED, "pictures of other questions")):
        row = _one(rows, name)
        parts += [] if row is None else [f"{words} {_percent(row.value)}"]
    if not parts:
        return Finding("Floors", "none was run, so whether this task needs pictures at all is not known.", True)
    text = f"{', '.join(parts)}. "
    alike = [r.method for r in rows if r.method in FLOORS and r.is_noise]
    if alike:
        text += (
            f"The difference between {' or '.join(alike)} and the unpruned model is inside the noise: this task cannot "
            "tell methods apart."
        )
        return Finding("Floors", text[0].upper() + text[1:], True)
    bare = _one(rows, NONE)
    above = [r.method for r in rows if r.method in FLOORS and (r.difference or 0) > 0]
    if bare is not None and question_only is not None and question_only >= bare.low:
        above.append("the most frequent training answer")
    if above:
        text += (
            f"The unpruned model is not measurably better than {' or '.join(above)}: this task cannot tell methods "
            "apart."
        )
    elif any(r.method in FLOORS and r.difference is not None for r in rows):
        text += "The unpruned model stands clear of them, so it does use the pictures."
    return Finding("Floors", text[0].upper() + text[1:].strip(), bool(above))


def _budget(name: str, rows: Sequence[Row]) -> Finding | None:
    """What stays within the noise of the unpruned run at one budget, and whether chance does so as well."""
    pruned = [r for r in rows if r.method not in (*FLOORS, NONE) and r.difference is not None]
    if not pruned:
        return None
    ranked = sorted(pruned, key=lambda r: -r.value)
    alike = [r for r in ranked if r.is_noise]
    better = [r.method for r in ranked if (r.difference_low or 0) > 0]
    label = in_words(name).replace("keep", "Keep") or "Own budget"
    if not alike:
        best = min(ranked, key=lambda r: abs(r.difference or 0))
        head = f"None of {len(pruned)} is within the noise of the unpruned run; nearest is " if len(pruned) > 1 else ""
        text = f"{head}{_described(best)}{'' if head else ': not noise'}."
        return Finding(label, text + _above(better))
    best, *others = alike
    text = f"Best of those not distinguishable from unpruned: {_described(best)}."
    if others:
        text += f" Also not distinguishable: {', '.join(r.method for r in others)}."
    chance = [r.method for r in alike if r.method.startswith("random")]
    if chance:
        text += " Chance is among them: at this budget the run cannot show that choosing tokens well matters."
    return Finding(label, text + _above(better))


def _above(methods: Sequence[str]) -> str:
    return f" More than noise better than unpruned: {', '.join(methods)}." if methods else ""


def in_words(name: str) -> str:
    """A budget as tables show it, "0.25" or "FLOPs 0.5", with what it is a budget of."""
    return f"keep {name}" if name[:1].isdigit() else name


def _described(row: Row) -> str:
    control = " (a control)" if is_control(row.method) else ""
    return (
        f"{row.method}{control}, {_percent(row.value)}, {100 * (row.difference or 0):+.1f}{NBSP}points{_interval(row)}"
    )


def _interval(row: Row) -> str:
    if row.difference_low is None or row.difference_high is None:
        return ""
    return f" [{100 * row.difference_low:+.1f}, {100 * row.difference_high:+.1f}]"


def _resolution(rows: Sequence[Row]) -> list[Finding]:
    widths = [
        (r.difference_high - r.difference_low) / 2
        for r in rows
        if r.method not in FLOORS and r.difference_low is not None and r.difference_high is not None
    ]
    if not widths:
        return []
    n = rows[0].n_samples
    text = f"With {n} questions the interval of a difference is ±{NBSP}{100 * median(widths):.1f} points here (median)."
    if n < _FEW:
        text += f" {n} questions are few: read nothing into a ranking."
    return [Finding("Resolution", text, n < _FEW)]


def _missing(rows: Sequence[Row]) -> list[Finding]:
    methods = {r.method for r in rows}
    seeds = [m for m in methods if m.partition(":")[0] == "random"]
    missing = [name for name in (NONE, "blind") if name not in methods]
    if len(seeds) < 3:
        missing.append("random" if not seeds else f"random with three seeds ({len(seeds)} here)")
    if not any(m.partition(":")[0] in ("pool", DOWNSAMPLE) for m in methods):
        missing.append(f"pool or {DOWNSAMPLE}")
    if not missing:
        return []
    return [Finding("Missing", f"Controls that this run lacks: {', '.join(missing)}.", True)]


def _one(rows: Sequence[Row], method: str) -> Row | None:
    return next((r for r in rows if r.method == method), None)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}{NBSP}%"
