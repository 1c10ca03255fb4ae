"""What the docstring of a method says, by part: for the command line and for docs/methods.md."""

from __future__ import annotations

import inspect
import re

_FIELD = re.compile(r"^(Source|Faithful|Differs|Needs|Args):[ \t]*", re.MULTILINE)
_ENTRY = re.compile(r"^(?=\w[\w, ]*: )", re.MULTILINE)


def written(cls: type) -> str:
    """The docstring of a class; empty where Python wrote a signature there for a dataclass without one."""
    doc = inspect.getdoc(cls) or ""
    return "" if doc.startswith(f"{cls.__name__}(") else doc


def parts_of(cls: type) -> dict[str, str]:
    """The idea under "", then Source, Faithful, Differs, Needs, Cost and Args, where they are written."""
    idea, *found = _FIELD.split(written(cls))
    parts = {"": idea.strip(), **dict(zip(found[::2], found[1::2], strict=True))}
    needs, _, cost = parts.get("Needs", "").partition("Cost:")
    return {name: text for name, text in {**parts, "Needs": needs, "Cost": cost}.items() if text.strip()}


def options_of(args: str) -> list[tuple[list[str], str]]:
    """Names and meaning of every entry of "Args"."""
    entries = (entry.partition(": ") for entry in _ENTRY.split(inspect.cleandoc(args)) if entry.strip())
    return [(names.split(", "), " ".join(meaning.split())) for names, _, meaning in entries]
