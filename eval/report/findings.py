"""What a comparison says in words: what each budget loses, and whether the task can tell methods apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from ..run.rows import DOWNSAMPLE, LESS, NONE, SHUFFLED, Row, is_graded, pooled
from .tables import (
    FLOORS,
    budget,
    has_collapsed,
    in_points,
    is_control,
    is_unchanged,
    most_lost,
    order,
    table,
    times,
    visual,
)
from .terminal import Grid

NBSP = "\u00a0"
_FEW = 100  # questions
SAFE_POINTS = 5.0  # a method is safe if it loses at most so many percentage points, at 95 %
UNEQUAL = 1.1  # how many times the FLOPs of another make a comparison at one budget unfair
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
    if not is_share(bare):
        return (
            f"Unpruned, {first.model} gets {bare.value:.4g} by the metric {bare.metric}, the mean over "
            f"{bare.n_samples} questions (95{NBSP}% interval: {low:.4g} to {high:.4g})."
        )
    return (
        f"Unpruned, {first.model} answers {_percent(bare.value)} of {bare.n_samples} questions right "
        f"(95{NBSP}% interval: {_percent(low)} to {_percent(high)})."
    )


def is_share(row: Row) -> bool:
    """Whether a value is the share of right answers, and not a mean of what answers are worth."""
    return 0 <= row.value <= 1 and not is_graded(row)


def recommended(rows: Sequence[Row], points: float = SAFE_POINTS) -> Row | None:
    """The cheapest by prefill FLOPs of the methods that lose at most so many points at 95 %; None if none do.

    Where FLOPs are not known, the mean number of visual tokens over decoder layers counts. Of equally cheap ones it is
    the one that may lose least. Controls and floors are never recommended.

    Args:
        rows: of one task.
        points: lost at most, by the lower end of the interval of the difference from the unpruned run.
    """
    safe = [r for r in _candidates(rows) if (most_lost(r) or 0) <= points]
    return min(safe, key=lambda r: (*_price(r), most_lost(r) or 0), default=None)


def _candidates(rows: Sequence[Row]) -> list[Row]:
    """Methods that were compared with the unpruned run, without controls."""
    return [r for r in pooled(rows) if r.method not in FLOORS and not is_control(r.method) and most_lost(r) is not None]


def _price(row: Row) -> tuple[float, float]:
    """Prefill FLOPs, of the unpruned run's, then visual tokens; unknown FLOPs count alike."""
    after, before = row.costs.prefill_flops_after, row.costs.prefill_flops_before
    return (1.0 if after is None or not before else after / before), row.n_visual_mean


def verdict(rows: Sequence[Row], question_only: float | None, points: float = SAFE_POINTS) -> str:
    """Which method to use, in a sentence; empty where none was compared with the unpruned run.

    Args:
        rows: of one task.
        question_only: the share of questions that the most frequent training answer gets right.
        points: as in `recommended`.
    """
    candidates = _candidates(rows)
    if not candidates:
        return ""
    if _against_floors(pooled(rows), question_only)[1]:
        return f"No method can be recommended: without the right picture the model does as well. {_CANNOT_TELL}"
    found = recommended(rows, points)
    if found is None:
        nearest = min(candidates, key=lambda r: most_lost(r) or 0)
        return (
            f"No method is safe at {points:g} points (95 %): the nearest, {_at(nearest)}, may lose "
            f"{most_lost(nearest):.1f}. More questions narrow this; a larger budget loses less."
        )
    c = found.costs
    saved = {
        "prefill FLOPs": times(c.prefill_flops_after, c.prefill_flops_before),
        "KV": times(c.kv_bytes_after, c.kv_bytes_before),
        "time": times(found.prefill_ratio, 1),
    }
    shown = ", ".join(f"{what} {ratio}" for what, ratio in saved.items() if ratio)
    return (
        f"Use {_at(found)}: {shown + '; ' if shown else ''}loses at most {most_lost(found):.1f} points (the cheapest "
        f"of those that lose at most {points:g}, at 95 %)."
    )


def _at(row: Row) -> str:
    """As "vtc_cls at 0.25"."""
    return f"{row.method} at {budget(row)}" if budget(row) else row.method


def unequal(rows: Sequence[Row]) -> str:
    """What to know where methods spend different FLOPs at one budget of tokens, and how to match; empty elsewhere.

    The budget at which they differ most is named. FLOPs are those of the language model, which `--match flops` equals.
    """
    by_budget: dict[str, list[tuple[float, Row]]] = {}
    for row in pooled(rows):
        after, before = row.costs.llm_flops_after, row.costs.llm_flops_before
        if row.flops_ratio is None and budget(row) and row.method not in LESS and after and before:
            by_budget.setdefault(budget(row), []).append((after / before, row))
    ends = {
        name: (min(some, key=lambda pair: pair[0]), max(some, key=lambda pair: pair[0]))
        for name, some in by_budget.items()
    }
    apart = {name: high[0] / low[0] for name, (low, high) in ends.items()}
    if not apart or max(apart.values()) <= UNEQUAL:
        return ""
    name = max(apart, key=lambda key: apart[key])
    (least, cheap), (most, dear) = ends[name]
    return (
        f"Equal budgets are not equal costs: at {in_words(name)}, {dear.method} spends LLM FLOPs x {most:.2f} and "
        f"{cheap.method} x {least:.2f}. To compare at equal FLOPs, use --match flops."
    )


def alarms(rows: Sequence[Row]) -> list[str]:
    """What makes a run's figures doubtful: answers that pruning did not change at all, or made all alike.

    Args:
        rows: of one task.
    """
    found: list[str] = []
    for row in pooled(rows):
        if is_unchanged(row):
            found.append(
                f"{_at(row)} changed none of {row.n_samples} answers, although {visual(row)} visual tokens: either "
                "nothing was pruned, or these questions are too few or too easy to show it"
            )
        if has_collapsed(row):
            found.append(
                f"{_at(row)} collapsed: {100 * (row.commonest or 0):.0f} % of its answers are one and the same, "
                f"{100 * (row.commonest_bare or 0):.0f} % unpruned"
            )
    return found


def named_alarms(rows: Sequence[Row]) -> list[str]:
    """The alarms of all tasks, each with the name of its task."""
    tasks = dict.fromkeys(r.task for r in rows)
    return [f"{task}: {text}" for task in tasks for text in alarms([r for r in rows if r.task == task])]


def not_equal(rows: Sequence[Row]) -> str:
    """Which controls do not have the tokens that their budget asks for, and how many they have; empty elsewhere."""
    told = []
    for row in pooled(rows):
        if row.method in LESS and budget(row):
            share = min(row.keep_ratio or 0, 1) * row.n_visual_before
            asked = max(1, int(share + 0.5)) if row.keep_tokens is None else min(row.keep_tokens, row.n_visual_before)
            if not asked / UNEQUAL <= row.n_visual_after <= asked * UNEQUAL:
                told.append(f"{_at(row)} has {row.n_visual_after:.4g} visual tokens, not {asked:.4g}")
    return f"Not at equal tokens: {'; '.join(told)}." if told else ""


def warnings(rows: Sequence[Row]) -> list[str]:
    """What no reader of one task's table may miss: alarms, and controls that are not at equal tokens."""
    return [*(f"Alarm: {text}." for text in alarms(rows)), *filter(None, [not_equal(rows)])]


def task_table(task: str, rows: Sequence[Row], question_only: float | None) -> Grid:
    """One task's table for the terminal; under it alarms, whether budgets cost the same, and the verdict."""
    notes = [*warnings(rows), *(text for text in (unequal(rows), verdict(rows, question_only)) if text)]
    return replace(table(task, rows, question_only), notes=notes)


def findings(rows: Sequence[Row], question_only: float | None) -> list[Finding]:
    """Floors and alarms, then every budget from the largest, then how small a difference the run can detect.

    Args:
        rows: of one task.
        question_only: the share of questions that the most frequent training answer gets right.
    """
    shown = pooled(rows)
    found = [_floors(shown, question_only)]
    found += [Finding("Alarm", f"{text[0].upper()}{text[1:]}.", True) for text in alarms(rows)]
    budgets = dict.fromkeys(budget(r) for r in sorted(shown, key=order))
    if _one(rows, NONE) is not None:
        found += [f for name in budgets if (f := _budget(name, [r for r in shown if budget(r) == name])) is not None]
        found += _resolution(shown)
    if text := " ".join(filter(None, (not_equal(rows), unequal(rows)))):
        found.append(Finding("Costs", text, True))
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
        return f"No difference is seen between the unpruned model and {' and '.join(alike)}. {_CANNOT_TELL}", True
    bare = _one(rows, NONE)
    above = [r.method for r in floors if (r.difference or 0) > 0]
    if bare is not None and question_only is not None and question_only >= bare.low:
        above.append(_GUESS)
    if above:
        return f"The unpruned model is not measurably better than {' or '.join(above)}. {_CANNOT_TELL}", True
    return ("The unpruned model is clearly better, so it uses the pictures." if floors else ""), False


def _budget(name: str, rows: Sequence[Row]) -> Finding | None:
    """Which methods show no loss at one budget, and whether random tokens are among them."""
    pruned = [r for r in rows if r.method not in (*FLOORS, NONE) and r.difference is not None]
    if not pruned:
        return None
    ranked = sorted(pruned, key=lambda r: -r.value)
    alike = [r for r in ranked if r.is_noise]
    better = [r.method for r in ranked if (r.difference_low or 0) > 0]
    texts = _alike(alike) if alike else [_apart(ranked)]
    if better:
        texts.append(f"Measurably better than unpruned: {'; '.join(better)}.")
    return Finding(in_words(name).replace("keep", "Keep") or "Own budget", " ".join(texts))


def _alike(alike: Sequence[Row]) -> list[str]:
    best, *others = alike
    texts = [f"No loss is seen with {_described(best)}."]
    if others:
        texts.append(f"Nor with {'; '.join(r.method for r in others)}.")
    if any(r.method.startswith("random") for r in alike):
        texts.append("Random tokens are among these: at this budget the run does not show that the choice matters.")
    return texts


def _apart(ranked: Sequence[Row]) -> str:
    best = min(ranked, key=lambda r: abs(r.difference or 0))
    if len(ranked) == 1:
        return f"A difference from unpruned is measured: {_described(best)}."
    return f"All {len(ranked)} methods differ measurably from unpruned. The nearest is {_described(best)}."


def in_words(name: str) -> str:
    """A budget as tables show it ("0.25", "FLOPs 0.5"), with its unit: "keep 0.25", "FLOPs 0.5"."""
    return f"keep {name}" if name[:1].isdigit() else name


def _described(row: Row) -> str:
    control = " (a control)" if is_control(row.method) else ""
    points = f"{in_points(row.difference or 0, row.difference_low, row.difference_high)}{NBSP}points"
    if row.is_noise:
        points = f"at most {most_lost(row):.1f}{NBSP}points lost (95{NBSP}%)"
    return f"{row.method}{control} with {_percent(row.value)}, {points}"


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
