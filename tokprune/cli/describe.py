"""What `tokprune methods NAME` prints of one method: idea, source, needs, options."""

from __future__ import annotations

import typing
from dataclasses import MISSING, Field, fields
from typing import Any, Literal

from ..core.tokens import Stage
from ..methods import ALIAS_SOURCES, METHODS
from ..methods.base import Method
from ..methods.described import options_of, parts_of


def method_page(spec: str) -> str:
    """Of a name, or of a reference to a class of one's own.

    Raises:
        TokPruneError: there is no such method.
    """
    name, *given = METHODS.parts(METHODS.aliases.get(spec, spec))
    cls: type[Method] = METHODS.load(name)
    parts = parts_of(cls)
    facts = {name.lower(): parts.get(name, "") for name in ("Source", "Faithful", "Differs", "Needs", "Cost")}
    facts["source"] = ALIAS_SOURCES.get(spec, facts["source"])
    facts["no [CLS]"] = f"use {spec}:{cls.if_missing}" if cls.if_missing else ""
    head = f"{spec} is {METHODS.aliases[spec]}" if spec in METHODS.aliases else spec
    lines = [head, "", parts.get("", ""), "", *(_fact(title, text) for title, text in facts.items() if text.strip())]
    options = _options(cls, parts.get("Args", ""), dict(part.split("=", 1) for part in given))
    return "\n".join([*lines, "", *(options or ["It has no options."]), *_calibration(cls)])


def _calibration(cls: type[Method]) -> list[str]:
    """The option that all methods before the language model share."""
    if cls.stage is Stage.DECODER or cls.is_filter:
        return []
    from ..methods.restore import Calibrate  # a method's module, imported when it is asked for

    values = "|".join(("true", *typing.get_args(Calibrate), "off"))
    return ["", f"as every method before the language model (RESTORE):\n  calibrate={values} (default off)"]


def _fact(title: str, text: str) -> str:
    return f"{title + ':':10} {' '.join(text.split())}"


def _options(cls: type[Method], args: str, given: dict[str, str]) -> list[str]:
    """A heading, then each option with its values, default, range and meaning."""
    meanings = {name: meaning for names, meaning in options_of(args) for name in names}
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
