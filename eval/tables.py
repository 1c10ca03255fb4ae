"""Rows as people read them: tables for the terminal and for Markdown, and the plot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from .rows import NONE, SHUFFLED, Row, pooled, wilson

COLUMNS = (
    "method",
    "keep",
    "accuracy [95 %]",
    "words",
    "stop",
    "visual tokens",
    "LLM FLOPs",
    "prefill FLOPs",
    "KV bytes",
    "prefill time",
)


def times(after: float | None, before: float | None) -> str:
    """A ratio as "x 0.30"; empty where it is not known."""
    return "" if after is None or not before else f"x {after / before:.2f}"


def cells(row: Row) -> tuple[str, ...]:
    """A row as shown in the terminal and in Markdown."""
    c = row.costs
    return (
        row.method,
        "" if row.keep_ratio is None else f"{row.keep_ratio:g}",
        f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]",
        f"{row.words_value:.3f}",
        f"{row.stop_rate:.3f}",
        visual(row),
        times(c.llm_flops_after, c.llm_flops_before),
        times(c.prefill_flops_after, c.prefill_flops_before),
        times(c.kv_bytes_after, c.kv_bytes_before),
        times(row.prefill_ratio, 1),
    )


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


def body(rows: Sequence[Row], floor: float | None) -> list[tuple[str, ...]]:
    """The lines of one task's table, floors first."""
    lines = [cells(row) for row in sorted(pooled(rows), key=order)]
    if floor is not None:
        lines.insert(0, ("question only", "", f"{floor:.3f}", *[""] * (len(COLUMNS) - 3)))
    return lines


def order(row: Row) -> tuple:
    """Floors first, then by budget."""
    floors = [SHUFFLED, "blind", NONE]
    return (floors.index(row.method) if row.method in floors else len(floors), -(row.keep_ratio or 0))


def table(task: str, rows: Sequence[Row], floor: float | None) -> Table:
    """One task's table for the terminal."""
    out = Table(title=f"{task}: {caption(rows[0])}\n{unpruned(rows[0])}", title_justify="left")
    for i, name in enumerate(COLUMNS):
        header = name if "[" in name else name.replace(" ", "\n")
        out.add_column(header, justify="left" if i == 0 else "right", no_wrap=True)
    for line in body(rows, floor):
        out.add_row(*line)
    return out


def of_kinds(row: Row, kinds: Sequence[str]) -> tuple[float, float, float, int]:
    """Value, 95 % interval and number of questions over some of the kinds of a row."""
    parts = [row.by_kind[kind] for kind in kinds]
    n = int(sum(p["n_samples"] for p in parts))
    right = sum(p["value"] * p["n_samples"] for p in parts)
    return right / n, *wilson(right, n), n


def plot(rows: Sequence[Row], floors: dict[str, float | None], path: Path) -> None:
    """Accuracy against visual tokens really kept and against the FLOPs up to the first token, a column a task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(r.task for r in rows))
    shown = pooled(rows)
    known = all(r.costs.prefill_flops_after is not None for r in shown)
    axes_of = [("visual tokens kept an image", lambda r: r.n_visual_after)]
    if known:
        axes_of.append(("prefill FLOPs, % of the unpruned", _prefill_percent))
    figure, axes = plt.subplots(
        len(axes_of), len(tasks), figsize=(6 * len(tasks), 4.2 * len(axes_of)), squeeze=False, sharey="col"
    )
    for line, (label, x_of) in zip(axes, axes_of, strict=True):
        for axis, task in zip(line, tasks, strict=True):
            mine = [r for r in shown if r.task == task]
            _plot_task(axis, mine, floors.get(task), x_of)
            axis.set(title=f"{task} ({mine[0].n_samples} questions)", xlabel=label, ylabel="accuracy")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _prefill_percent(row: Row) -> float:
    return 100 * (row.costs.prefill_flops_after or 0) / (row.costs.prefill_flops_before or 1)


def _plot_task(axis, rows: Sequence[Row], floor: float | None, x_of) -> None:
    flat = {r.method: r.value for r in rows if r.keep_ratio is None}
    if floor is not None:
        flat["question only"] = floor
    for style, (name, value) in zip(("-", "--", ":", "-.") * 2, flat.items(), strict=False):
        axis.axhline(value, color="0.6", linestyle=style, linewidth=1, label=name)
    curves: dict[str, list[Row]] = defaultdict(list)
    for r in rows:
        if r.keep_ratio is not None:
            curves[r.method].append(r)
    for name, points in curves.items():
        points.sort(key=x_of)
        spread = [[max(r.value - r.low, 0) for r in points], [max(r.high - r.value, 0) for r in points]]  # rounding
        axis.errorbar(
            [x_of(r) for r in points],
            [r.value for r in points],
            spread,
            marker="o",
            markersize=4,
            capsize=2,
            label=name,
        )
