"""Rows as people read them: tables for the terminal, for Markdown and for pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..run.rows import NONE, SHUFFLED, Row, pooled
from ..stats import wilson


def times(after: float | None, before: float | None) -> str:
    """A ratio as "x 0.30"; empty where it is not known."""
    return "" if after is None or not before else f"x {after / before:.2f}"


def budget(row: Row) -> str:
    """A ratio of the tokens, or of the FLOPs; empty for what decides by itself."""
    if row.flops_ratio is not None:
        return f"FLOPs {row.flops_ratio:g}"
    return "" if row.keep_ratio is None else f"{row.keep_ratio:g}"


def accuracy(row: Row) -> str:
    """The value with its interval, where there is one."""
    known = "" if row.low is None or row.high is None else f" [{row.low:.3f}, {row.high:.3f}]"
    return f"{row.value:.3f}{known}"


def difference(row: Row) -> str:
    """Points more than the unpruned run on the same questions, and whether that is noise."""
    if row.difference is None or row.difference_low is None or row.difference_high is None:
        return ""
    numbers = (row.difference, row.difference_low, row.difference_high)
    points, low, high = (f"{100 * number:+.1f}" for number in numbers)
    return f"{points} [{low}, {high}]{' noise' if row.is_noise else ''}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda r: r.method,
    "keep": budget,
    "accuracy [95 %]": accuracy,
    "points from none [95 %]": difference,
    "words": lambda r: _share(r.words_value),
    "stop": lambda r: _share(r.stop_rate),
    "visual tokens": lambda r: visual(r),
    "LLM FLOPs": lambda r: times(r.costs.llm_flops_after, r.costs.llm_flops_before),
    "prefill FLOPs": lambda r: times(r.costs.prefill_flops_after, r.costs.prefill_flops_before),
    "KV bytes": lambda r: times(r.costs.kv_bytes_after, r.costs.kv_bytes_before),
    "prefill time": lambda r: times(r.prefill_ratio, 1),
}


def columns(rows: Sequence[Row]) -> list[str]:
    """The columns that say something about these rows.

    "words" and "stop" are left out where every answer was whole and ended, and whatever is empty everywhere.
    """
    whole = all(r.words_value in (None, r.value) and r.stop_rate in (None, 1) for r in rows)
    filled = [name for name, cell in COLUMNS.items() if any(cell(r) for r in rows)]
    return [name for name in filled if not (whole and name in ("words", "stop"))]


def visual(row: Row) -> str:
    """Visual tokens before and after the last cut, and in the mean over decoder layers where that differs."""
    mean = "" if abs(row.n_visual_mean - row.n_visual_after) < 1e-6 else f" (mean {row.n_visual_mean:.4g})"
    return f"{row.n_visual_before:.4g} -> {row.n_visual_after:.4g}{mean}"


def unpruned(row: Row) -> str:
    """What one question costs without pruning, in words; empty where it is not known."""
    c = row.costs
    if c.llm_flops_before is None or c.prefill_flops_before is None or c.kv_bytes_before is None:
        return ""
    tower = 1 - c.llm_flops_before / c.prefill_flops_before
    return (
        f"Unpruned, one question costs {c.llm_flops_before / 1e9:.3g} GFLOPs in the language model, "
        f"{c.prefill_flops_before / 1e9:.3g} GFLOPs up to the first token and {c.kv_bytes_before / 2**20:.3g} MiB of "
        f"KV cache; vision tower and projector, {100 * tower:.0f} % of the prefill's FLOPs, cannot be saved."
    )


def caption(row: Row) -> str:
    """The conditions of a task's rows."""
    return (
        f"{row.n_samples} questions of the {row.split or 'whole'} split, {row.model}, {row.device}, {row.dtype}, "
        f"{row.attn_implementation}, batch {row.batch_size}, transformers {row.transformers}, torch {row.torch}, "
        f"{row.date}"
    )


def body(rows: Sequence[Row], floor: float | None) -> tuple[list[str], list[list[str]]]:
    """Header and lines of one task's table, floors first."""
    shown = sorted(pooled(rows), key=order)
    header = columns(shown)
    lines = [[COLUMNS[name](row) for name in header] for row in shown]
    if floor is not None:
        first = {"method": "question only", "accuracy [95 %]": f"{floor:.3f}"}
        lines.insert(0, [first.get(name, "") for name in header])
    return header, lines


def order(row: Row) -> tuple:
    """Floors first, then by budget."""
    floors = [SHUFFLED, "blind", NONE]
    return (
        floors.index(row.method) if row.method in floors else len(floors),
        -(row.keep_ratio or row.flops_ratio or 0),
    )


def table(task: str, rows: Sequence[Row], floor: float | None) -> Table:
    """One task's table for the terminal."""
    out = Table(title=f"{task}: {caption(rows[0])}\n{unpruned(rows[0])}", title_justify="left", box=SIMPLE_HEAD)
    header, lines = body(rows, floor)
    for name in header:
        wrapped = name.replace(" [", "\n[") if "[" in name else name.replace(" ", "\n")
        first = name == "method"
        out.add_column(wrapped, justify="left" if first else "right", no_wrap=not first, overflow="fold")
    for line in lines:
        out.add_row(*line)
    return out


def of_kinds(row: Row, kinds: Sequence[str]) -> tuple[float, float, float, int]:
    """Value, 95 % interval and number of questions over some of the kinds of a row."""
    parts = [row.by_kind[kind] for kind in kinds]
    n = int(sum(p["n_samples"] for p in parts))
    right = sum(p["value"] * p["n_samples"] for p in parts)
    return right / n, *wilson(right, n), n
