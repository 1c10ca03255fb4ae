"""Names to classes: lazy "module:Class" tables, aliases, entry points, and the string form of a method."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from importlib.metadata import entry_points
from typing import Any, Literal

from .errors import OptionError, UnknownNameError, shown


class Registry:
    """A table of names that imports a class only when its name is asked for.

    Args:
        what: the kind of thing that is named, used in messages.
        table: name to "module:Class".
        aliases: name to another spelling of a whole specification ("vtc_cls:start_layer=-2").
        group: entry-point group through which other packages add names.
        listing: the call that lists all names, used in messages.
    """

    def __init__(
        self,
        what: str,
        table: Mapping[str, str],
        aliases: Mapping[str, str] | None = None,
        group: str | None = None,
        listing: str = "",
    ):
        self.what, self.table, self.aliases = what, dict(table), dict(aliases or {})
        self.group, self.listing = group, listing

    def names(self) -> list[str]:
        return sorted({*self.table, *self.aliases, *self._plugins()})

    def load(self, name: str) -> type:
        """The class of a name.

        Raises:
            UnknownNameError: no such name; the message offers the nearest.
        """
        if name in self.table:
            module, _, attribute = self.table[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        plugins = self._plugins()
        if name in plugins:
            return plugins[name].load()
        raise UnknownNameError(self._unknown(name))

    def name_of(self, cls: type) -> str | None:
        """The name under which `load` returns this class, or None.

        Plug-ins are imported to find out; one that cannot be imported is skipped.
        """
        written = f"{cls.__module__}:{cls.__qualname__}"
        found = [name for name, place in self.table.items() if place == written]
        for name, entry in self._plugins().items():
            with contextlib.suppress(Exception):
                found += [name] if entry.load() is cls else []
        return next((name for name in found if self.load(name) is cls), None)

    def _plugins(self) -> dict[str, Any]:
        return {e.name: e for e in entry_points(group=self.group)} if self.group else {}

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        listing = f" ({self.listing})" if self.listing else ""
        return f"no {self.what} named {name!r}.{hint} Available: {', '.join(self.names())}{listing}"

    def build(self, spec: str, options: Mapping[str, Any] | None = None) -> Any:
        """An object from `name:option=value:option=value`; `options` add to the string's own.

        Raises:
            UnknownNameError: no such name.
            OptionError: no such option, an option twice, or a value that does not fit its declared type.
        """
        name, *parts = spec.split(":")
        own: list[str] = []
        if name in self.aliases:
            name, *own = self.aliases[name].split(":")
        cls, pairs = self.load(name), [_split(part, spec) for part in parts]
        _check_once([key for key, _ in pairs] + list(options or {}), spec)
        texts = dict([_split(part, spec) for part in own] + pairs)
        given = {**{key: parse(cls, key, text) for key, text in texts.items()}, **(options or {})}
        for key, value in given.items():
            check(cls, key, value)
        return cls(**given)


def _split(part: str, spec: str) -> tuple[str, str]:
    key, equals, value = part.partition("=")
    if not equals:
        raise OptionError(f"invalid option {part!r} in {spec!r}: use name:option=value:option=value")
    return key, value


def _check_once(keys: list[str], spec: str) -> None:
    for key in keys:
        if keys.count(key) > 1:
            raise OptionError(f"{key} is given twice, in {spec!r}; use it once")


@functools.cache  # needed for every option that is checked
def _option_types(cls: type) -> Mapping[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


def _shown_as(cls: type) -> str:
    return getattr(cls, "shown_as", cls.__name__)


def _option_type(cls: type, key: str) -> Any:
    known = _option_types(cls)
    if key not in known:
        raise OptionError(unknown_option(cls, key))
    return known[key]


def unknown_option(cls: type, key: str) -> str:
    """The message for an option that a class does not have."""
    known = _option_types(cls)
    near = difflib.get_close_matches(key, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{_shown_as(cls)} has no option {key!r}.{hint} Options: {', '.join(known) or 'none'}"


def _alternatives(declared: Any) -> Iterable[Any]:
    union = typing.get_origin(declared) in (typing.Union, types.UnionType)
    return typing.get_args(declared) if union else (declared,)


def parse(cls: type, key: str, text: str) -> Any:
    """The value of an option from its text, by the option's declared type.

    A tuple is read from "0.5/0.25" or "0.5,0.25", None from "none".

    Raises:
        OptionError: the class has no such option, or the text does not fit its type.
    """
    declared = _option_type(cls, key)
    kinds = _alternatives(declared)
    for kind in sorted(kinds, key=lambda k: k is not type(None)):  # "none" first
        value = _parse_as(kind, text)
        if value is not MISSING:
            return value
    raise _unfit(cls, key, text)


def _unfit(cls: type, key: str, value: Any) -> OptionError:
    """The error for a value of another type, with the example that the field's metadata may hold."""
    (example,) = (f.metadata.get("example") for f in fields(cls) if f.name == key)
    use = f"; use {key}={example}" if example else ""
    return OptionError(f"{_shown_as(cls)}: {key}={shown(value)} is not {describe(_option_type(cls, key))}{use}")


_BOOLEANS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


def _parse_as(kind: Any, text: str) -> Any:
    if kind is type(None) or kind is dict:
        return None if text.lower() == "none" else MISSING
    if kind is bool:
        return _BOOLEANS.get(text.lower(), MISSING)
    if typing.get_origin(kind) is Literal:
        return text if text in typing.get_args(kind) else MISSING
    if typing.get_origin(kind) is tuple:
        values = [_parse_as(typing.get_args(kind)[0], part) for part in re.split("[/,]", text.strip("[]()"))]
        return MISSING if MISSING in values else tuple(values)
    if hasattr(kind, "parse"):  # it raises its own error
        return kind.parse(text)
    try:
        return kind(text)
    except (TypeError, ValueError):
        return MISSING


def check(cls: type, key: str, value: Any) -> None:
    """Raise OptionError unless the value fits the option's declared type."""
    declared = _option_type(cls, key)
    if not any(_fits(kind, value) for kind in _alternatives(declared)):
        raise _unfit(cls, key, value)
    if isinstance(value, (int, float)) and not abs(value) < 2**63:
        raise OptionError(f"{_shown_as(cls)}: {key}={shown(value)} is out of range: use a number that fits 64 bits")


def _fits(kind: Any, value: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(typing.get_args(kind)[0], part) for part in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


_WORDS = {type(None): "None", bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def describe(declared: Any) -> str:
    """A declared type in words: "a whole number or None", "one of 'rank', 'row'"."""
    kinds = list(_alternatives(declared))
    values = [v for kind in kinds if typing.get_origin(kind) is Literal for v in typing.get_args(kind)]
    names = ["one of " + ", ".join(map(repr, values))] if values else []
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            names.append("several joined by '/'")
        elif typing.get_origin(kind) is not Literal:
            names.append(_WORDS.get(kind) or getattr(kind, "described", kind.__name__))
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
