"""Lines of JSON files: one object each, read strictly; and rows out of them, checked against the types of their fields.

A line of these files may have been cut off, changed by hand or overwritten by a failing disk. What cannot be a row is
`Damaged` here, in one kind of error, so that whoever reads decides what it costs.
"""

from __future__ import annotations

import functools
import json
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar

Row = TypeVar("Row")
MOST_DIGITS = 20
MOST_DEEP = 20  # objects and lists inside each other
UNTIMED = ("prefill_ms_p20", "prefill_ms_p50", "prefill_ms_p80")  # NaN where nothing was timed
AT_LEAST_ONE = ("size", "n_samples", "batch_size", "n")


class Damaged(ValueError):
    """A line that is no row; the message goes on after "the line"."""


def parsed(line: bytes | str, integer: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """The JSON object of a line.

    Args:
        line: as UTF-8, or as text.
        integer: what to make of whole numbers; by default int, of at most 20 digits.

    Raises:
        Damaged: it is something else, cut off, too deep, or names a field twice.
    """
    try:
        text = line if isinstance(line, str) else line.decode("utf-8")
        values = json.loads(text, object_pairs_hook=_object, parse_int=integer or _integer)
    except Damaged:
        raise
    except RecursionError as error:
        raise Damaged("is nested too deep") from error
    except ValueError as error:
        raise Damaged(f"is not JSON ({getattr(error, 'msg', None) or error})") from error
    if not isinstance(values, dict):
        raise Damaged("is no JSON object")
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Damaged(f"names {twice!r} twice")
    return found


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise Damaged(f"holds the number {text[:MOST_DIGITS]}..., which is out of range")
    return int(text)


def typed(kind: type[Row], values: Mapping[str, Any], others: bool = False) -> Row:
    """A dataclass from the values of a line.

    Values have the types that the fields declare, whole numbers do for floats, and numbers are finite. Fields without
    a default have to be there.

    Args:
        kind: the dataclass.
        values: by field.
        others: let fields be that it does not have, and leave them out.

    Raises:
        Damaged: a field is missing, unknown, or of another type.
    """
    checks, needed = _checks(kind)
    if missing := needed - values.keys():
        raise Damaged(f"lacks {', '.join(sorted(missing))}")
    if not others and (unknown := values.keys() - checks.keys()):
        raise Damaged(f"has {', '.join(sorted(unknown))}, which {kind.__name__} has not")
    return kind(**{name: check(values[name]) for name, check in checks.items() if name in values})


@functools.cache
def _checks(kind: type) -> tuple[dict[str, Callable[[Any], Any]], frozenset[str]]:
    """Of every field what checks and builds its value, and the names of those without a default."""
    hints = typing.get_type_hints(kind)
    own = fields(kind)
    needed = {f.name for f in own if f.default is MISSING and f.default_factory is MISSING}
    return {f.name: functools.partial(_value, f.name, hints[f.name]) for f in own}, frozenset(needed)


def _value(name: str, kind: Any, value: Any) -> Any:
    """A value as a field of this type takes it."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (UnionType, typing.Union):
        if value is None and NoneType in inner:
            return None
        (kind,) = (k for k in inner if k is not NoneType)
        return _value(name, kind, value)
    if kind is Any:
        return _shallow(name, value)
    if kind in (int, float):
        return _number(name, kind, value)
    if origin is dict and isinstance(value, dict):
        return {key: _value(name, inner[1], item) for key, item in value.items()}
    if origin in (tuple, list) and isinstance(value, list):
        return origin(_value(name, inner[0], item) for item in value)
    if is_dataclass(kind) and isinstance(value, dict):
        return typed(kind, value)  # type: ignore[type-var]
    if kind in (str, bool) and type(value) is kind:
        return value
    raise _other(name, value)


def _number(name: str, kind: type, value: Any) -> Any:
    if type(value) not in (int, kind):
        raise _other(name, value)
    if not math.isfinite(value) and name not in UNTIMED:
        raise _other(name, value)
    if value < (name in AT_LEAST_ONE) and kind is int:
        raise _other(name, value)
    return value


def _shallow(name: str, value: Any, depth: int = 0) -> Any:
    """Any JSON value that is not too deep for what walks through it later."""
    if depth > MOST_DEEP:
        raise Damaged(f"has a {name} that is nested too deep")
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inside:
        _shallow(name, item, depth + 1)
    return value


def _other(name: str, value: Any) -> Damaged:
    return Damaged(f"has the {name} {shortened(value)}")


def shortened(value: Any, most: int = 60) -> str:
    """A value of a line as JSON, cut to so many characters, for a message."""
    text = json.dumps(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def rows_of(path: Path, make: Callable[[dict[str, Any]], Row], torn: bool = False) -> Iterator[Row | Damaged]:
    """What the lines of a file hold, in order: rows, and what is wrong with lines that are none.

    Args:
        path: of the file; one that does not exist has no lines.
        make: a row from the object of a line; may raise Damaged.
        torn: leave a last line out that does not end: whoever wrote it was killed.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if torn or not lines[-1].strip():
        lines.pop()
    for line in lines:
        try:
            yield make(parsed(line))
        except Damaged as damaged:
            yield damaged


def counted(n: int, name: str | Path, then: str) -> str:
    """How many lines of a file are damaged, and what becomes of them, for a person."""
    return f"{n} line{'s' * (n > 1)} of {name} {'are' if n > 1 else 'is'} damaged: {then}"
