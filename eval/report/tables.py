"""The cells that every table shares, and the table for the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from tokprune.core.own_code import short

from ..run.rows import DOWNSAMPLE, EXACT_MATCH, FRAMES, NONE, SHUFFLED, Row, pooled
from ..stats import wilson
from ..tasks.prompted import name_of
from .terminal import Grid

FLOORS = (SHUFFLED, "blind")  # answers without the right picture
CONTROLS = (NONE, DOWNSAMPLE, FRAMES, "random", "uniform", "pool")
QUESTION_ONLY = "question only"
LOSS = "against unpruned [95 %]"

# What leaves a table that is too wide, the least important first. Accuracy, what is lost and the price stay.
HARD, CHANGED, COMMONEST = "hard questions [95 %]", "answers changed", "commonest answer"
LEAVING = (
    *("stop", "words", COMMONEST, "visual tokens", "LLM FLOPs", "KV bytes", "prefill time"),
    *(HARD, CHANGED),
)


def is_control(method: str) -> bool:
    """Whether a row's method is one that methods have to beat, whatever its options and seeds."""
    return re.split("[:,]", method)[0] in CONTROLS


# ---- alarms


def is_unchanged(row: Row) -> bool:
    """Whether tokens left and no answer changed: nothing was pruned, or the questions do not show it."""
    return row.n_changed == 0 and min(row.n_visual_after, row.n_visual_mean) < row.n_visual_before


def has_collapsed(row: Row) -> bool:
    """Whether one answer came instead of many: its share closed half of the distance from the unpruned run's to all.

    The lower end of its 95 % interval has to be above the unpruned share, too. Without a picture, that is no wonder.
    """
    if row.commonest is None or row.commonest_bare is None or row.method in FLOORS or not 0 <= row.commonest <= 1:
        return False
    low, _ = wilson(row.commonest * row.n_samples, row.n_samples)
    return low > row.commonest_bare and row.commonest >= (1 + row.commonest_bare) / 2


# ---- cells


def times(after: float | None, before: float | None) -> str:
    """A ratio as "x 0.30"; empty where it is not known."""
    return "" if after is None or not before else f"x {after / before:.2f}"


def interval(value: float, low: float | None, high: float | None, form: str = ".3f") -> str:
    """A value with its interval, if it has one: "0.865 [0.839, 0.887]"."""
    ends = "" if low is None or high is None else f" [{low:{form}}, {high:{form}}]"
    return f"{value:{form}}{ends}"


def in_points(share: float, low: float | None, high: float | None) -> str:
    """A difference of shares in percentage points: "-4.1 [-6.3, -1.9]"."""
    return interval(100 * share, *(None if end is None else 100 * end for end in (low, high)), form="+.1f")


def budget(row: Row) -> str:
    """The ratio of tokens or of FLOPs that was asked for; empty for a method that takes no budget."""
    if row.flops_ratio is not None:
        return f"FLOPs {row.flops_ratio:g}"
    if row.keep_tokens is not None:
        return f"{row.keep_tokens} tokens"
    return "" if row.keep_ratio is None else f"{row.keep_ratio:g}"


def accuracy(row: Row) -> str:
    """The value with its interval, if it has one."""
    return interval(row.value, row.low, row.high)


def difference(row: Row) -> str:
    """Percentage points from the unpruned run on the same questions: "-4.1 [-6.3, -1.9]"; empty if not known."""
    if row.difference is None or row.difference_low is None or row.difference_high is None:
        return ""
    return in_points(row.difference, row.difference_low, row.difference_high)


def most_lost(row: Row) -> float | None:
    """The most percentage points that a row loses against the unpruned run, at 95 %; never below 0."""
    return None if row.difference_low is None else max(0.0, -100 * row.difference_low)


def not_seen(row: Row) -> str:
    """What can be said where no difference is seen, "no loss seen; at most 5.3 points (95 %)"; empty elsewhere."""
    return f"no loss seen; at most {most_lost(row):.1f} points (95 %)" if row.is_noise else ""


def loss(row: Row) -> str:
    """The same where the interval holds 0, else how many points are lost: "-4.1 points [-6.3, -1.9]"."""
    if not difference(row):
        return ""
    value, _, ends = difference(row).partition(" ")
    return not_seen(row) or f"{value} points {ends}"


def visual(row: Row) -> str:
    """Visual tokens before and after the last cut, and their mean over decoder layers if it differs."""
    mean = "" if abs(row.n_visual_mean - row.n_visual_after) < 1e-6 else f" (mean {row.n_visual_mean:.4g})"
    return f"{row.n_visual_before:.4g} -> {row.n_visual_after:.4g}{mean}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def hard(row: Row) -> str:
    """The value over the questions that a smaller picture of about as many tokens gets wrong, and their number."""
    if row.hard_value is None:
        return "" if row.hard_n is None else "n = 0"
    return f"{interval(row.hard_value, row.hard_low, row.hard_high)} n = {row.hard_n}"


def changed(row: Row) -> str:
    """How many answers are not the unpruned run's; "!" where that is an alarm."""
    if row.n_changed is None:
        return ""
    return f"{row.n_changed:.4g} of {row.n_samples}{' !' if is_unchanged(row) else ''}"


def commonest(row: Row) -> str:
    """The share of the commonest answer, and of the unpruned run's; "!" where that is an alarm."""
    if row.commonest is None or row.commonest_bare is None:
        return ""
    return f"{row.commonest:.2f} ({row.commonest_bare:.2f}){' !' if has_collapsed(row) else ''}"


Cells = Mapping[str, Callable[[Row], str]]

CHECKS: Cells = {HARD: hard, CHANGED: changed, COMMONEST: commonest}  # in every form of a report

COLUMNS: Cells = {
    "method": lambda r: short(r.method),
    "keep": budget,
    "accuracy [95 %]": accuracy,
    LOSS: loss,
    **CHECKS,
    "words": lambda r: _share(r.words_value),
    "stop": lambda r: _share(r.stop_rate),
    "visual tokens": visual,
    "LLM FLOPs": lambda r: times(r.costs.llm_flops_after, r.costs.llm_flops_before),
    "prefill FLOPs": lambda r: times(r.costs.prefill_flops_after, r.costs.prefill_flops_before),
    "KV bytes": lambda r: times(r.costs.kv_bytes_after, r.costs.kv_bytes_before),
    "prefill time": lambda r: times(r.prefill_ratio, 1),
}


def columns(rows: Sequence[Row], cells: Cells = COLUMNS) -> list[str]:
    """The columns that say something about these rows.

    Empty columns are left out. So are "words" and "stop" if every answer was whole and ended by itself.
    """
    whole = all(r.words_value in (None, r.value) and r.stop_rate in (None, 1) for r in rows)
    filled = [name for name, cell in cells.items() if any(cell(r) for r in rows)]
    return [name for name in filled if not (whole and name in ("words", "stop"))]


def order(row: Row) -> tuple:
    """Floors first, then by budget."""
    first = [*FLOORS, NONE]
    return (
        first.index(row.method) if row.method in first else len(first),
        -(row.keep_ratio or row.flops_ratio or 0),
        -(row.keep_tokens or 0),
    )


# ---- tables


def unpruned(row: Row) -> str:
    """What one question costs without pruning, in words; empty where it is not known."""
    c = row.costs
    if c.llm_flops_before is None or c.prefill_flops_before is None or c.kv_bytes_before is None:
        return ""
    tower = 1 - c.llm_flops_before / c.prefill_flops_before
    return (
        f"Unpruned, one question costs {c.llm_flops_before / 1e9:.3g} GFLOPs in the language model, "
        f"{c.prefill_flops_before / 1e9:.3g} GFLOPs up to the first token and {c.kv_bytes_before / 2**20:.3g} MiB of "
        f"KV cache. Vision tower and projector are {100 * tower:.0f} % of the prefill FLOPs; only methods that act "
        "before the tower save some of it."
    )


def caption(row: Row) -> str:
    """The conditions of a task's rows."""
    metric = "" if row.metric == EXACT_MATCH else f"metric {row.metric}, "
    prompt = f"suffix {row.suffix!r}, " if row.suffix and name_of(row.task, row.suffix) == row.task else ""
    return (
        f"{row.n_samples} questions of the {row.split or 'whole'} split, {metric}{prompt}{row.model}, {row.device}, "
        f"{row.dtype}, {row.attn_implementation}, batch {row.batch_size}, transformers {row.transformers}, "
        f"torch {row.torch}, {row.date}."
    )


def conditions(row: Row) -> str:
    """`caption` and `unpruned` in one paragraph."""
    return f"{caption(row)} {unpruned(row)}".strip()


def body(rows: Sequence[Row], floor: float | None) -> tuple[list[str], list[list[str]]]:
    """Header and lines of one task's table, floors first."""
    shown = sorted(pooled(rows), key=order)
    header = columns(shown)
    lines = [[COLUMNS[name](row) for name in header] for row in shown]
    if floor is not None:
        first = {"method": QUESTION_ONLY, "accuracy [95 %]": f"{floor:.3f}"}
        lines.insert(0, [first.get(name, "") for name in header])
    return header, lines


def table(task: str, rows: Sequence[Row], floor: float | None) -> Grid:
    """One task's table for the terminal."""
    header, lines = body(rows, floor)
    broken = {name: name.replace(" [", "\n[") if "[" in name else name.replace(" ", "\n") for name in header}
    return Grid(
        [broken[name] for name in header],
        lines,
        title=f"{task}: {caption(rows[0])}\n{unpruned(rows[0])}".strip(),
        names=sum(name in ("method", "keep") for name in header),
        leaving=[broken[name] for name in LEAVING if name in broken],
        text=[broken[LOSS]] if LOSS in broken else [],
    )


def of_kinds(row: Row, kinds: Sequence[str]) -> tuple[float, float, float, int]:
    """Value, 95 % interval and number of questions over some of the kinds of a row."""
    parts = [row.by_kind[kind] for kind in kinds]
    n = int(sum(p["n_samples"] for p in parts))
    right = sum(p["value"] * p["n_samples"] for p in parts)
    return right / n, *wilson(right, n), n
