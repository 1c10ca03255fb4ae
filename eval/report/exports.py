"""Tables of a run for other programs: Markdown, and one flat CSV."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
from tabulate import tabulate

from ..run.rows import Row
from .findings import warnings
from .latex import latex_table
from .rankings import rankings
from .tables import QUESTION_ONLY, body, conditions
from .terminal import Grid

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet reads a formula where a text begins with one of these
_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*_[]<>|#~"} | {c: " " for c in "\r\n\t"})


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return tabulate(rows, header, tablefmt="github", disable_numparse=True) + "\n"


def escaped(text: str) -> str:
    """A text that Markdown shows as it is, in one line."""
    return text.translate(_MARKDOWN)


def markdown_tables(
    rows: Sequence[Row], question_only: Mapping[str, float | None], text: Callable[[str], str] = escaped
) -> str:
    """One Markdown table a task with its conditions and warnings; then ranks, where there are several prompts.

    Args:
        rows: of all tasks.
        question_only: that floor by task.
        text: what to do with names and cells; by default, escape them.
    """
    parts = []
    for task in dict.fromkeys(r.task for r in rows):
        mine = [r for r in rows if r.task == task]
        header, lines = body(mine, question_only.get(task))
        head = f"**{text(task)}**: {conditions(mine[0])}".translate({10: " ", 13: " "})
        below = "".join(f"\n{text(said)}\n" for said in warnings(mine))
        parts.append(f"{head}\n\n{markdown(header, [[text(cell) for cell in line] for line in lines])}{below}")
    parts += [_ranking(grid, text) for grid in rankings(rows)]
    return "\n".join(parts)


def _ranking(grid: Grid, text: Callable[[str], str]) -> str:
    lines = [[text(cell) for cell in line] for line in grid.lines]
    return "\n\n".join([text(grid.title), markdown(grid.header, lines).strip(), *map(text, grid.notes)]) + "\n"


def csv_table(rows: Sequence[Row], question_only: Mapping[str, float | None]) -> str:
    """One line for each configuration and task, with every figure of `Row`; question-only floors come first.

    Seeds have a line each. Costs are columns of their own, options and kinds are JSON, `is_noise` is added. What is not
    known is empty. Texts that a spreadsheet would read as a formula begin with an apostrophe.
    """
    lines = _lines(rows, question_only)
    names = dict.fromkeys(name for line in reversed(lines) for name in line)
    cells = [{name: _no_formula(value) for name, value in line.items()} for line in lines]
    frame = pd.DataFrame(cells, columns=list(names), dtype=object)  # as floats, whole numbers would get a ".0"
    return frame.to_csv(index=False, lineterminator="\n")


def text_of(form: str, rows: Sequence[Row], question_only: Mapping[str, float | None]) -> str:
    """The tables as text for a paper or a program: latex, markdown or csv."""
    if form == "latex":
        return latex_table(rows, question_only)
    return csv_table(rows, question_only) if form == "csv" else markdown_tables(rows, question_only, text=str)


def frame_of(rows: Sequence[Row], question_only: Mapping[str, float | None]) -> pd.DataFrame:
    """The lines of `csv_table` as a data frame."""
    return pd.DataFrame(_lines(rows, question_only))


def _lines(rows: Sequence[Row], question_only: Mapping[str, float | None]) -> list[dict[str, Any]]:
    floors: list[dict[str, Any]] = [
        {"task": task, "method": QUESTION_ONLY, "value": value}
        for task, value in question_only.items()
        if value is not None
    ]
    return [*floors, *map(_flat, rows)]


def _flat(row: Row) -> dict[str, Any]:
    fields = asdict(row)
    fields |= fields.pop("costs")
    for name in ("params", "by_kind"):
        fields[name] = json.dumps(fields[name], ensure_ascii=False)
    return fields | {"is_noise": None if row.difference is None else str(row.is_noise).lower()}


def _no_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
