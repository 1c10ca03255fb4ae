"""What `tokprune methods NAME` prints of one method: idea, source, needs, options."""

from __future__ import annotations

import inspect
import re
import typing
from dataclasses import MISSING, Field, fields
from typing import Any, Literal

from ..methods import ALIAS_SOURCES, METHODS
from ..methods.base import Method

FIELD = re.compile(r"^(Source|Faithful|Differs|Needs|Args):[ \t]*", re.MULTILINE)


def method_page(spec: str) -> str:
    """Of a name, or of a reference to a class of one's own.

    Raises:
        TokPruneError: there is no such method.
    """
    name, *given = METHODS.parts(METHODS.aliases.get(spec, spec))
    cls: type[Method] = METHODS.load(name)
    idea, *found = FIELD.split(written(cls))
    parts = dict(zip(found[::2], found[1::2], strict=True))
    needs, _, cost = parts.get("Needs", "").partition("Cost:")
    facts = {
        "source": ALIAS_SOURCES.get(spec, parts.get("Source", "")),
        "faithful": parts.get("Faithful", ""),
        "differs": parts.get("Differs", ""),
        "needs": needs,
        "cost": cost,
        "no [CLS]": f"use {spec}:{cls.if_missing}" if cls.if_missing else "",
    }
    head = f"{spec} is {METHODS.aliases[spec]}" if spec in METHODS.aliases else spec
    lines = [head, "", idea.strip(), "", *(_fact(title, text) for title, text in facts.items() if text.strip())]
    options = _options(cls, parts.get("Args", ""), dict(part.split("=", 1) for part in given))
    return "\n".join([*lines, "", *(options or ["It has no options."])])


def written(cls: type) -> str:
    """The docstring of a class; dataclasses without one get a signature, which is none."""
    doc = inspect.getdoc(cls) or ""
    return "" if doc.startswith(f"{cls.__name__}(") else doc


def _fact(title: str, text: str) -> str:
    return f"{title + ':':10} {' '.join(text.split())}"


def _options(cls: type[Method], args: str, given: dict[str, str]) -> list[str]:
    """A heading, then each option with its values, default, range and meaning."""
    entries = re.split(r"^(?=\w[\w, ]*: )", inspect.cleandoc(args), flags=re.MULTILINE)
    meanings: dict[str, str] = {}
    for names, _, meaning in (entry.partition(": ") for entry in entries if entry.strip()):
        meanings |= dict.fromkeys(names.split(", "), " ".join(meaning.split()))
    hints = typing.get_type_hints(cls)
    lines = []
    for option in fields(cls):
        if option.init:
            default = given.get(option.name, _default(option))
            limits = cls.limits.get(option.name)
            reach = f", from {limits[0]:g} to {limits[1]:g}" if limits else ""
            lines.append(f"  {option.name}={_values(hints[option.name])}{reach} (default {default})")
            lines += [f"      {meanings[option.name]}"] if option.name in meanings else []
    return ["options, as NAME:OPTION=VALUE:", *lines] if lines else []


def _default(option: Field) -> str:
    if option.default is not MISSING:
        return str(option.default).lower() if option.default in (None, True, False) else str(option.default)
    return str(option.default_factory()) if option.default_factory is not MISSING else "none; it has to be given"


def _values(hint: Any) -> str:
    """The values of a type as they are typed: "error|received", "INT|none"."""
    if typing.get_origin(hint) is Literal:
        return "|".join(map(str, typing.get_args(hint)))
    inner = typing.get_args(hint)
    if inner and type(None) in inner:
        return "|".join([*(_values(kind) for kind in inner if kind is not type(None)), "none"])
    if hint is bool:
        return "true|false"
    return getattr(hint, "__name__", str(hint)).upper()
