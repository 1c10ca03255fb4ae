"""Classes and functions of a user's own: "./file.py:Class" and "module:Class"."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import PluginError

_PLACE = re.compile(r"(^|\+)[^+:]+:(?=[A-Za-z_]\w*(?:[:+]|$))")  # what follows is a class and no option


def is_reference(text: str) -> bool:
    """Whether a text has the form of one: a file or a module, a colon, and a name."""
    place, colon, name = text.partition(":")
    return bool(place and colon) and name.isidentifier()


def short(label: str) -> str:
    """A method's label without the files and modules of own code: "./my.py:Norm:power=1" is "Norm:power=1"."""
    return _PLACE.sub(r"\1", label)


def load(reference: str, what: str, base: type | None = None) -> type:
    """The class that a reference names; its file or module is run.

    Args:
        reference: "./file.py:Class" or "module:Class".
        what: the kind of thing that it is, for messages.
        base: what it has to be a subclass of; None for no such check.

    Raises:
        PluginError: no such file, module or class; it cannot be imported, or is something else.
    """
    found = _attribute(reference, what, inspect.isclass)
    if not inspect.isclass(found) or (base and not issubclass(found, base)):
        wanted = f"a subclass of {base.__module__}.{base.__name__}" if base else "a class"
        raise PluginError(f"{what} {reference!r} is not {wanted}")
    return found


def load_function(reference: str, what: str) -> Callable[..., Any]:
    """The function that a reference names, as `load`."""
    found = _attribute(reference, what, inspect.isfunction)
    if not callable(found):
        raise PluginError(f"{what} {reference!r} is not a function")
    return found


def _attribute(reference: str, what: str, alike: Callable[[Any], bool]) -> Any:
    """What a reference names; where it is not there, the message lists others like it."""
    place, _, name = reference.partition(":")
    module = _module(place, f"{what} {reference!r}")
    if not hasattr(module, name):
        own = (n for n, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
        there = [n for n in own if alike(getattr(module, n)) and not n.startswith("_")]
        raise PluginError(f"{what} {reference!r}: {place} has no {name}; it has: {', '.join(there) or 'none'}")
    return getattr(module, name)


def checksum(reference: str) -> int:
    """Of the source of the file or module that a reference names, so that a change is noticed."""
    place = reference.partition(":")[0]
    file = place if place.endswith(".py") else getattr(_module(place, reference), "__file__", None)
    return zlib.crc32(Path(file).read_bytes()) if file else 0


def _module(place: str, head: str) -> ModuleType:
    try:
        return _of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever somebody's module raises when it is imported
        said = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        beside = Path(*place.split(".")).with_suffix(".py")
        hint = f"; for the file in this folder use ./{beside}" if not place.endswith(".py") and beside.is_file() else ""
        raise PluginError(f"{head} cannot be imported: {type(error).__name__}: {said}{hint}") from error


def _of_file(path: Path) -> ModuleType:
    """The module that a file makes, run once for each content."""
    content = path.read_bytes()
    name = f"tokprune_own_{path.stem}_{hashlib.sha256(str(path.resolve()).encode() + content).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
