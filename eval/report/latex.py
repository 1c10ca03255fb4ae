"""A comparison as a LaTeX table: booktabs, the best of every budget in bold, a mark where no loss is seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tokprune.core.own_code import short

from ..run.rows import LESS, NONE, Row, pooled
from .tables import FLOORS, QUESTION_ONLY, budget, order, times

_ESCAPES = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
_UNSEEN = r"$^{\circ}$"


def escaped(text: str) -> str:
    """A text that LaTeX prints as it is."""
    return "".join(_ESCAPES.get(c, c) for c in text)


_COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "Method": lambda r: escaped(short(r.method)),
    "Keep": lambda r: escaped(budget(r)),
    r"Accuracy (\%)": lambda r: _percent(r),
    r"$\Delta$": lambda r: _points(r),
    "Tokens": lambda r: f"{r.n_visual_after:.4g}",
    "LLM FLOPs": lambda r: _times(r.costs.llm_flops_after, r.costs.llm_flops_before),
    "Prefill FLOPs": lambda r: _times(r.costs.prefill_flops_after, r.costs.prefill_flops_before),
    "KV": lambda r: _times(r.costs.kv_bytes_after, r.costs.kv_bytes_before),
}


def latex_table(rows: Sequence[Row], floors: Mapping[str, float | None]) -> str:
    r"""One `tabular` for each task; needs \usepackage{booktabs}.

    Args:
        rows: of all tasks.
        floors: accuracy of the question alone, by task.
    """
    tasks = dict.fromkeys(r.task for r in rows)
    return "\n".join(_of_task([r for r in rows if r.task == task], floors.get(task)) for task in tasks)


def _of_task(rows: Sequence[Row], floor: float | None) -> str:
    shown = sorted(pooled(rows), key=order)
    best = _best(shown)
    first = shown[0]
    groups: dict[str, list[str]] = {}
    for row in shown:
        cells = [cell(row) for cell in _COLUMNS.values()]
        if row.method not in LESS and row.value == best.get(budget(row)):
            cells[2] = rf"\textbf{{{cells[2]}}}"
        groups.setdefault("" if row.method in (NONE, *FLOORS) else budget(row), []).append(" & ".join(cells) + r" \\")
    if floor is not None:
        groups.setdefault("", []).insert(
            0, f"{QUESTION_ONLY} & & {100 * floor:.1f}" + " &" * (len(_COLUMNS) - 3) + r" \\"
        )
    body = "\n\\midrule\n".join("\n".join(lines) for lines in groups.values())
    return (
        f"% {first.task}: {first.n_samples} questions, {first.model}; 95 % intervals; {_UNSEEN}: no loss seen; "
        "\\usepackage{booktabs}\n"
        f"\\begin{{tabular}}{{l{'r' * (len(_COLUMNS) - 1)}}}\n\\toprule\n{' & '.join(_COLUMNS)} \\\\\n\\midrule\n"
        f"{body}\n\\bottomrule\n\\end{{tabular}}\n"
    )


def _best(rows: Sequence[Row]) -> dict[str, float]:
    """By budget, the highest value, where there are several methods; no control of other tokens."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if budget(row) and row.method not in LESS:
            found.setdefault(budget(row), []).append(row)
    return {key: max(r.value for r in some) for key, some in found.items() if len(some) > 1}


def _percent(row: Row) -> str:
    if row.low is None or row.high is None:
        return f"{100 * row.value:.1f}"
    return f"{100 * row.value:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]"


def _points(row: Row) -> str:
    if row.difference is None or row.difference_low is None or row.difference_high is None:
        return ""
    low, high = 100 * row.difference_low, 100 * row.difference_high
    return f"${100 * row.difference:+.1f}$ [${low:+.1f}$, ${high:+.1f}$]{_UNSEEN if row.is_noise else ''}"


def _times(after: float | None, before: float | None) -> str:
    return times(after, before).replace("x ", r"$\times$")
