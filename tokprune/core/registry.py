"""Names to classes: lazy "module:Class" tables, aliases, entry points, and the string form of a method."""

from __future__ import annotations

import difflib
import functools
import importlib
import re
import types
import typing
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Literal

from . import own_code
from .errors import OptionError, PluginError, TokPruneError, UnknownNameError, UnknownOptionError, shown


class Registry:
    """A table of names that imports a class only when its name is asked for.

    Args:
        what: the kind of thing that is named, used in messages.
        table: name to "module:Class".
        aliases: name to another spelling of a whole specification ("vtc_cls:start_layer=-2").
        group: entry-point group through which other packages add names; names of the table come first.
        listing: the call that lists all names, used in messages.
        base: what classes of other packages have to be subclasses of; None for no such check.
    """

    def __init__(
        self,
        what: str,
        table: Mapping[str, str],
        aliases: Mapping[str, str] | None = None,
        group: str | None = None,
        listing: str = "",
        base: type | None = None,
    ):
        self.what, self.table, self.aliases = what, dict(table), dict(aliases or {})
        self.group, self.listing, self.base = group, listing, base
        self._looked = False  # entry points take milliseconds to read
        self._hidden: set[str] = set()  # names of other packages that were warned about

    def names(self) -> list[str]:
        """All names, those of other packages among them, whether these can be imported or not."""
        return sorted({*self.own_names(), *self._plugins()})

    def own_names(self) -> list[str]:
        """Names without those of other packages."""
        return sorted({*self.table, *self.aliases})

    def load(self, name: str) -> type:
        """The class of a name, or of a reference to a user's own ("./file.py:Class", "module:Class").

        Raises:
            UnknownNameError: no such name; the message offers the nearest.
            PluginError: it is another package's, or a user's own, and cannot be imported.
        """
        if name in self.table:
            if not self._looked:
                self._plugins()  # warns about a name that is taken
            module, _, attribute = self.table[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        plugins = self._plugins()
        if name in plugins:
            return self._imported(plugins[name])
        if own_code.is_reference(name):
            return own_code.load(name, self.what, self.base)
        raise UnknownNameError(self._unknown(name))

    def name_of(self, cls: type) -> str | None:
        """The name under which `load` returns this class, or None.

        Plug-ins are imported to find out; one that cannot be imported is skipped.
        """
        written = f"{cls.__module__}:{cls.__qualname__}"
        found = [name for name, place in self.table.items() if place == written]
        found += [name for name in self._plugins() if self._class_or_none(name) is cls]
        return next((name for name in found if self.load(name) is cls), None)

    def fault(self, name: str) -> str:
        """Why a name cannot be built without options, in one line; empty if it can.

        What another package does when it is imported or built is its own affair, so that any exception is a fault.
        """
        try:
            self.build(name)
        except TokPruneError as error:
            return str(error)
        except Exception as error:
            if name in self.own_names():
                raise
            return f"{self.what} {name!r} cannot be built: {type(error).__name__}: {error}"
        return ""

    def working(self) -> list[str]:
        """Names without those of other packages that cannot be built."""
        own = self.own_names()
        return [name for name in self.names() if name in own or not self.fault(name)]

    def importable(self) -> list[str]:
        """Names without those of other packages that cannot be imported."""
        own = self.own_names()
        return [name for name in self.names() if name in own or self._class_or_none(name)]

    def _class_or_none(self, name: str) -> type | None:
        try:
            return self.load(name)
        except PluginError:
            return None

    def _imported(self, entry: EntryPoint) -> type:
        """The class of an entry point, checked."""
        package = f", of {entry.dist.name}" if entry.dist else ""
        head = f"{self.what} {entry.name!r} ({entry.value}{package})"
        try:
            found = entry.load()
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise PluginError(
                f"{head} cannot be imported: {said}; correct the entry point or uninstall the package"
            ) from error
        if not isinstance(found, type) or (self.base and not issubclass(found, self.base)):
            wanted = f"a subclass of {self.base.__module__}.{self.base.__name__}" if self.base else "a class"
            raise PluginError(f"{head} is not {wanted}; correct the entry point or uninstall the package")
        return found

    def _plugins(self) -> dict[str, EntryPoint]:
        """Entry points by name; a name that is taken is left out, with a warning."""
        self._looked = True
        found: dict[str, EntryPoint] = {}
        for entry in entry_points(group=self.group) if self.group else ():
            taken = "tokprune itself" if entry.name in self.own_names() else ""
            if not taken and entry.name in found and found[entry.name].value != entry.value:
                taken = "another package"
            if taken:
                self._warn_once(entry, taken)
            else:
                found.setdefault(entry.name, entry)
        return found

    def _warn_once(self, entry: EntryPoint, taken: str) -> None:
        if entry.name in self._hidden:
            return
        self._hidden.add(entry.name)
        package = entry.dist.name if entry.dist else entry.value
        warnings.warn(
            f"{self.what} {entry.name!r} of {package} ({entry.value}) is ignored: {taken} has this name; "
            "rename the entry point",
            stacklevel=4,
        )

    def _unknown(self, name: str) -> str:
        near = nearest(name, self.names())
        hint = f" Did you mean {near!r}?" if near else ""
        if name.endswith(".py"):
            hint = f" For a class of a file use {name}:CLASS."
        listing = f" ({self.listing})" if self.listing else ""
        return f"no {self.what} named {name!r}.{hint} Available: {', '.join(self.names())}{listing}"

    def parts(self, spec: str) -> list[str]:
        """Name, or reference to a class, and options of a specification."""
        name, *parts = spec.split(":")
        if parts and "=" not in parts[0] and name not in self.names():
            return [f"{name}:{parts[0]}", *parts[1:]]
        return [name, *parts]

    def build(self, spec: str, options: Mapping[str, Any] | None = None) -> Any:
        """An object from `name:option=value:option=value`; `options` add to the string's own.

        Instead of a name, "./file.py:Class" or "module:Class".

        Raises:
            UnknownNameError: no such name.
            PluginError: it is another package's and cannot be imported.
            OptionError: no such option, an option twice, one without a value, or a value that does not fit its
                declared type.
        """
        name, *parts = self.parts(spec)
        own: list[str] = []
        if name in self.aliases:
            name, *own = self.aliases[name].split(":")
        cls, pairs = self.load(name), [_split(part, spec) for part in parts]
        _check_once([key for key, _ in pairs] + list(options or {}), spec)
        texts = dict([_split(part, spec) for part in own] + pairs)
        given = {**{key: parse(cls, key, text) for key, text in texts.items()}, **(options or {})}
        for key, value in given.items():
            check(cls, key, value)
        _check_complete(cls, given, name)
        return cls(**given)


def nearest(name: str, names: Iterable[str]) -> str:
    """The name that was probably meant: one that begins with what was typed, or one of few other letters; or ""."""
    known = sorted(names)
    begun = [other for other in known if len(name) > 1 and other.startswith(name)]
    return next(iter([*begun, *difflib.get_close_matches(name, known, n=1, cutoff=0.7)]), "")


def _check_complete(cls: type, given: Mapping[str, Any], name: str) -> None:
    """Raise if an option without a default is not given."""
    for option in fields(cls):
        if option.init and option.name not in given and option.default is option.default_factory is MISSING:
            raise OptionError(f"{_shown_as(cls)}: {option.name} has no default; use {name}:{option.name}=VALUE")


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
        raise UnknownOptionError(unknown_option(cls, key))
    return known[key]


def unknown_option(cls: type, key: str) -> str:
    """The message for an option that a class does not have."""
    known = _option_types(cls)
    near = nearest(key, known)
    hint = f" Did you mean {near!r}?" if near else ""
    lost = ", ".join(_no_fields(cls))
    if lost:
        hint += f" {lost} of {cls.__name__} is no option yet: decorate the class with @dataclass(frozen=True)."
    return f"{_shown_as(cls)} has no option {key!r}.{hint} Options: {', '.join(known) or 'none'}"


def _no_fields(cls: type) -> list[str]:
    """Annotated attributes that are no dataclass fields, because a decorator is missing."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    classwide = [name for name, hint in hints.items() if ClassVar in (hint, typing.get_origin(hint))]
    return [name for name in hints if name not in known and name not in classwide]


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
