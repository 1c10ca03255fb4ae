"""Lines of JSON files: one object each, read strictly; and rows out of them, checked against the types of their fields.

A line of these files may have been cut off, changed by hand or overwritten by a failing disk. What cannot be a row is
`Damaged` here, in one kind of error, so that whoever reads decides what it costs.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar

from tokprune.core.errors import RunError

Row = TypeVar("Row")
MOST = 10**20  # no whole number of a row is as large
MOST_DEEP = 20  # objects and lists inside each other
UNTIMED = ("prefill_ms_p20", "prefill_ms_p50", "prefill_ms_p80")  # NaN where nothing was timed
SIGNED = ("seed",)  # other whole numbers are counts
POSITIVE = ("prefill_s",)  # other times are divided by it
AT_LEAST_ONE = ("size", "n_samples", "batch_size", "n")


class Damaged(ValueError):
    """A line that is no row; the message goes on after "the line"."""


def parsed(line: bytes | str, integer: Callable[[str], Any] | None = None, foreign: bool = False) -> dict[str, Any]:
    """The JSON object of a line.

    Args:
        line: as UTF-8, or as text.
        integer: what to make of whole numbers; by default int.
        foreign: of another program, whose data may name a field twice and hold numbers of any length.

    Raises:
        Damaged: it is something else, cut off, too deep, or not as strict as it has to be.
    """
    decoder = _FOREIGN if foreign else _STRICT
    if integer is not None:
        decoder = json.JSONDecoder(object_pairs_hook=_object, parse_int=integer)
    try:
        values = decoder.decode(line if isinstance(line, str) else line.decode("utf-8"))
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


# Making one takes longer than reading a line.
_STRICT = json.JSONDecoder(object_pairs_hook=_object)
_FOREIGN = json.JSONDecoder(parse_int=lambda text: int(text) if len(text) <= 20 else float(text))


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
    if not needed <= values.keys():
        raise Damaged(f"lacks {', '.join(sorted(needed - values.keys()))}")
    if not others and not values.keys() <= checks.keys():
        unknown = values.keys() - checks.keys()
        raise Damaged(f"has {', '.join(sorted(unknown))}, which {kind.__name__} has not")
    return kind(**{name: checks[name](value) for name, value in values.items() if name in checks})


Check = Callable[[Any], Any]


@functools.cache
def _checks(kind: type) -> tuple[dict[str, Check], frozenset[str]]:
    """Of every field what checks and builds its value, and the names of those without a default."""
    hints = typing.get_type_hints(kind)
    own = fields(kind)
    needed = {f.name for f in own if f.default is MISSING and f.default_factory is MISSING}
    return {f.name: _check(f.name, hints[f.name]) for f in own}, frozenset(needed)


def _check(name: str, kind: Any) -> Check:
    """What takes a value as a field of this type does."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (UnionType, typing.Union):
        (some,) = (_check(name, k) for k in inner if k is not NoneType)
        return lambda value: None if value is None else some(value)
    if kind is Any:
        return functools.partial(_shallow, name)
    if kind in (int, float):
        return _number(name, kind)
    if kind in (str, bool):
        return _of(name, kind, lambda value: value)
    if origin is dict:
        item = _check(name, inner[1])
        return _of(name, dict, lambda value: {key: item(v) for key, v in value.items()})
    if origin in (tuple, list):
        item = _check(name, inner[0])
        return _of(name, list, lambda value: origin(map(item, value)))
    return _of(name, dict, functools.partial(typed, kind))


def _of(name: str, kind: type, build: Check) -> Check:
    """What takes values that are of one type in JSON."""

    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise _other(name, value)
        return build(value)

    return check


def _number(name: str, kind: type) -> Check:
    """What takes finite numbers in the range of a field; NaN where nothing was timed."""
    least = -sys.float_info.max
    if kind is int and name not in SIGNED:
        least = name in AT_LEAST_ONE
    elif name in POSITIVE:
        least = math.ulp(0)

    def check(value: Any) -> Any:
        if type(value) is int:
            good = least <= value < MOST
        elif type(value) is kind:
            good = least <= value < math.inf
            good = good or (name in UNTIMED and math.isnan(value))
        else:
            good = False
        if not good:
            raise _other(name, value)
        return value

    return check


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


def rows_of(
    path: Path, make: Callable[[dict[str, Any]], Row], torn: bool = False, foreign: bool = False
) -> Iterator[Row | Damaged]:
    """What the lines of a file hold, in order: rows, and what is wrong with lines that are none.

    Args:
        path: of the file; one that does not exist has no lines.
        make: a row from the object of a line; may raise Damaged.
        torn: leave a last line out that does not end: whoever wrote it was killed.
        foreign: as `parsed` takes it.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if torn or not lines[-1].strip():
        lines.pop()
    for line in lines:
        try:
            yield make(parsed(line, foreign=foreign))
        except Damaged as damaged:
            yield damaged


def counted(n: int, path: Path, then: str, of_several: str = "") -> str:
    """How many lines of a file are damaged and what becomes of them, in a line for a person."""
    if n == 1:
        return f"1 line of {path} is damaged: {then}"
    return f"{n} lines of {path} are damaged: {of_several or then}"


def settings_of(path: Path, again: str) -> dict[str, Any]:
    """The settings of a run, from its run.json.

    Args:
        path: of the file.
        again: what to type where it cannot be read.

    Raises:
        RunError: it is no JSON object.
    """
    try:
        return parsed(path.read_bytes())
    except Damaged as damaged:
        raise RunError(f"{path} cannot be read as the settings of a run: it {damaged}; {again}") from damaged
