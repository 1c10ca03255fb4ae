"""Tables of a run for other programs: Markdown, and one flat CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..run.rows import Row
from .render import markdown
from .tables import body, caption, unpruned

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the beginning of a formula
_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*_[]<>|#~"} | {c: " " for c in "\r\n\t"})


def markdown_tables(rows: Sequence[Row], question_only: Mapping[str, float | None]) -> str:
    """One Markdown table a task with its conditions, as in the README.

    Args:
        rows: of all tasks.
        question_only: that floor by task.
    """
    parts = []
    for task in dict.fromkeys(r.task for r in rows):
        mine = [r for r in rows if r.task == task]
        header, lines = body(mine, question_only.get(task))
        escaped = [[cell.translate(_MARKDOWN) for cell in line] for line in lines]
        head = f"**{task.translate(_MARKDOWN)}**: {caption(mine[0])}. {unpruned(mine[0])}".translate({10: " ", 13: " "})
        parts.append(f"{head.strip()}\n\n{markdown(header, escaped)}")
    return "\n".join(parts)


def csv_table(rows: Sequence[Row], question_only: Mapping[str, float | None]) -> str:
    """One line a configuration and task with every figure of `Row`; seeds stay apart, floors of questions come first.

    Costs are columns of their own, options and kinds are JSON, `is_noise` is added. What is not known is empty. Texts
    that a spreadsheet would take for a formula begin with an apostrophe.
    """
    lines: list[dict[str, Any]] = [
        {"task": task, "method": "question only", "value": value}
        for task, value in question_only.items()
        if value is not None
    ]
    lines += [_flat(row) for row in rows]
    file = io.StringIO()
    names = dict.fromkeys(name for line in reversed(lines) for name in line)
    writer = csv.DictWriter(file, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in line.items()} for line in lines)
    return file.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    fields = asdict(row)
    fields |= fields.pop("costs")
    for name in ("params", "by_kind"):
        fields[name] = json.dumps(fields[name], ensure_ascii=False)
    return fields | {"is_noise": None if row.difference is None else str(row.is_noise).lower()}


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return value
