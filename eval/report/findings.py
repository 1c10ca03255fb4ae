"""What a comparison says in words: what each budget loses, and whether the task can tell methods apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ..run.rows import DOWNSAMPLE, NONE, SHUFFLED, Row, pooled
from .tables import FLOORS, budget, in_points, is_control, order

NBSP = "\u00a0"
_FEW = 100  # questions
_GUESS = "the most frequent training answer"
_CANNOT_TELL = "So this task cannot tell methods apart."


@dataclass(frozen=True)
class Finding:
    """A short heading and its text. `is_warning` marks what every reader should see."""

    label: str
    text: str
    is_warning: bool = False


def headline(rows: Sequence[Row]) -> str:
    """The accuracy of the unpruned model, from the rows of one task."""
    bare, first = _one(rows, NONE), rows[0]
    if bare is None:
        return f"{first.model} was not run unpruned, so this report cannot say what pruning costs."
    low, high = bare.ends
    return (
        f"Unpruned, {first.model} answers {_percent(bare.value)} of {bare.n_samples} questions right "
        f"(95{NBSP}% interval: {_percent(low)} to {_percent(high)})."
    )


def findings(rows: Sequence[Row], question_only: float | None) -> list[Finding]:
    """Floors, then every budget from the largest, then how small a difference the run can detect.

    Args:
        rows: of one task.
        question_only: the share of questions that the most frequent training answer gets right.
    """
    shown = pooled(rows)
    found = [_floors(shown, question_only)]
    budgets = dict.fromkeys(budget(r) for r in sorted(shown, key=order))
    if _one(rows, NONE) is not None:
        found += [f for name in budgets if (f := _budget(name, [r for r in shown if budget(r) == name])) is not None]
        found += _resolution(shown)
    return found + _missing(rows)


def _floors(rows: Sequence[Row], question_only: float | None) -> Finding:
    known = [] if question_only is None else [f"{_GUESS}: {_percent(question_only)}"]
    for name, words in (("blind", "no visual token"), (SHUFFLED, "pictures of other questions")):
        row = _one(rows, name)
        known += [] if row is None else [f"{words}: {_percent(row.value)}"]
    if not known:
        return Finding("Floors", "No floor was run, so it is not known whether this task needs pictures.", True)
    text, is_warning = _against_floors(rows, question_only)
    head = "; ".join(known)
    return Finding("Floors", f"{head[0].upper()}{head[1:]}. {text}".strip(), is_warning)


def _against_floors(rows: Sequence[Row], question_only: float | None) -> tuple[str, bool]:
    """Whether the unpruned model is better than the floors, and whether that is a warning."""
    floors = [r for r in rows if r.method in FLOORS and r.difference is not None]
    alike = [r.method for r in floors if r.is_noise]
    if alike:
        return f"The unpruned model is within the noise of {' and '.join(alike)}. {_CANNOT_TELL}", True
    bare = _one(rows, NONE)
    above = [r.method for r in floors if (r.difference or 0) > 0]
    if bare is not None and question_only is not None and question_only >= bare.low:
        above.append(_GUESS)
    if above:
        return f"The unpruned model is not measurably better than {' or '.join(above)}. {_CANNOT_TELL}", True
    return ("The unpruned model is clearly better, so it uses the pictures." if floors else ""), False


def _budget(name: str, rows: Sequence[Row]) -> Finding | None:
    """What is within the noise of the unpruned run at one budget, and whether random tokens are among it."""
    pruned = [r for r in rows if r.method not in (*FLOORS, NONE) and r.difference is not None]
    if not pruned:
        return None
    ranked = sorted(pruned, key=lambda r: -r.value)
    alike = [r for r in ranked if r.is_noise]
    better = [r.method for r in ranked if (r.difference_low or 0) > 0]
    texts = _alike(alike) if alike else [_apart(ranked)]
    if better:
        texts.append(f"Better than unpruned, by more than noise: {'; '.join(better)}.")
    return Finding(in_words(name).replace("keep", "Keep") or "Own budget", " ".join(texts))


def _alike(alike: Sequence[Row]) -> list[str]:
    best, *others = alike
    texts = [f"The best method within the noise of unpruned is {_described(best)}."]
    if others:
        texts.append(f"Also within the noise: {'; '.join(r.method for r in others)}.")
    if any(r.method.startswith("random") for r in alike):
        texts.append("Random tokens are among these: at this budget the run does not show that the choice matters.")
    return texts


def _apart(ranked: Sequence[Row]) -> str:
    best = min(ranked, key=lambda r: abs(r.difference or 0))
    if len(ranked) == 1:
        return f"The difference from unpruned is larger than noise: {_described(best)}."
    return f"All {len(ranked)} methods differ from unpruned by more than noise. The nearest is {_described(best)}."


def in_words(name: str) -> str:
    """A budget as tables show it ("0.25", "FLOPs 0.5"), with its unit: "keep 0.25", "FLOPs 0.5"."""
    return f"keep {name}" if name[:1].isdigit() else name


def _described(row: Row) -> str:
    control = " (a control)" if is_control(row.method) else ""
    points = in_points(row.difference or 0, row.difference_low, row.difference_high)
    return f"{row.method}{control} with {_percent(row.value)}, {points}{NBSP}points"


def _resolution(rows: Sequence[Row]) -> list[Finding]:
    widths = [
        (r.difference_high - r.difference_low) / 2
        for r in rows
        if r.method not in FLOORS and r.difference_low is not None and r.difference_high is not None
    ]
    if not widths:
        return []
    n = rows[0].n_samples
    text = f"With {n} questions, the interval of a difference is ±{NBSP}{100 * median(widths):.1f} points (median)."
    if n < _FEW:
        text += f" {n} questions are too few to rank methods."
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
    return [Finding("Missing", f"This run lacks these controls: {', '.join(missing)}.", True)]


def _one(rows: Sequence[Row], method: str) -> Row | None:
    return next((r for r in rows if r.method == method), None)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}{NBSP}%"
