"""The questions of a folder: lines of `metadata.jsonl` or rows of `metadata.csv`, as fields by name."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokprune.core.errors import TaskError

from ..run.lines import Damaged, parsed, shortened

FILES = ("metadata.jsonl", "metadata.csv")
FIELDS = ("file_name", "question", "answer")
ANSWERS = ("answer", "answers")  # names of one field
OPTIONAL = ("kind", "choices", "metric")
_LISTS = (*ANSWERS, "choices")

Record = tuple[int, dict[str, Any] | Damaged]  # number of the line, from 1, and its fields


class Digits(str):
    """A whole number as it was written."""


def is_task_folder(folder: Path) -> bool:
    """Whether a folder has questions."""
    return any((folder / name).is_file() for name in FILES)


def metadata_file(folder: Path) -> Path:
    """The file with the questions of a folder.

    Raises:
        TaskError: there is none, or both are there.
    """
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise TaskError(f"{folder} has both {' and '.join(FILES)}; remove one of them")
    raise TaskError(
        f"{folder} has no {' and no '.join(FILES)}; write one line a question: "
        '{"file_name": "a.png", "question": "what is it?", "answer": "a cat"}, or a table with the columns '
        f"{', '.join(FIELDS)}"
    )


def records(path: Path) -> Iterator[Record]:
    """The questions of a file in order; blank lines are none.

    Raises:
        TaskError: it is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    return _rows(text) if path.suffix == ".csv" else _lines(text)


def _lines(text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also cut at U+2028
        if line.strip():
            try:
                yield number, parsed(line, integer=Digits)
            except Damaged as damaged:
                yield number, damaged


def _rows(text: str) -> Iterator[Record]:
    """Rows of a table whose first row names the columns; between columns is a comma, a semicolon or a tab."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield number, Damaged(f'is not a row of a table ({error}); double each quote inside quotes, as "say ""a"""')
            return
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if damaged := _header_fault(header):
                yield number, damaged
                return
            continue
        yield number, _fields(header, cells)


def _header_fault(header: list[str]) -> Damaged | None:
    """What is wrong with the names of columns."""
    missing = [f for f in FIELDS if f not in header and not (f in ANSWERS and ANSWERS[1] in header)]
    if missing:
        return Damaged(
            f"names the columns {shortened(header)} and lacks {', '.join(missing)}; a table needs {', '.join(FIELDS)} "
            f"(or answers), and may have {', '.join(OPTIONAL)}"
        )
    twice = [name for name in header if name and header.count(name) > 1]
    return Damaged(f"names the column {twice[0]!r} twice") if twice else None


def _fields(header: list[str], cells: list[str]) -> dict[str, Any] | Damaged:
    if len(cells) != len(header):
        return Damaged(
            f"has {len(cells)} cells, and the first row names {len(header)} columns; put a text that holds a comma in "
            'quotes, as "red, green"'
        )
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    try:
        values = {name: _listed(name, cell) if name in _LISTS else cell for name, cell in row.items()}
    except Damaged as damaged:
        return damaged
    return {name: value for name, value in values.items() if name not in OPTIONAL or _is_filled(value)}


def _is_filled(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else bool(value)


def _listed(name: str, cell: str) -> Any:
    """The texts of a cell: a JSON list, or separated by |; a single text as it is."""
    if not cell.strip().startswith("["):
        parts = [part.strip() for part in cell.split("|")]
        return cell if len(parts) == 1 else parts
    try:
        return json.loads(cell, parse_int=Digits)
    except (ValueError, RecursionError) as error:
        raise Damaged(
            f"has the {name} {shortened(cell)}, which begins as a JSON list and is none; separate texts by |, as "
            'a cat|a dog, or write ["a cat", "a dog"], with every quote doubled inside quotes'
        ) from error
