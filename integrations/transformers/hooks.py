"""Hooks on a model, each with its undo, and whether the model is still the one that they were put on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tokprune.core.errors import ModelChangedError, NotCopyable

from .compat import cache_of, forget_compiled_code

Unless = Callable[[Mapping], bool]  # from the keywords of a call: whether a hook has nothing to do
_READY = "_tokprune_ready"  # on a cache: whether the passes over it need no hook
AGAIN = "call attachment.detach(), and attach again when the model is as it shall be"


class Hooks:
    """Hooks on the modules of one model and functions in place of its own, until `close`.

    torch.compile runs hooks and functions as they are, outside of what it compiles.

    Args:
        root: the model; every hooked module is a part of it.
    """

    def __init__(self, root: nn.Module):
        self.root = root
        forget_compiled_code()
        self._names = {id(module): name for name, module in root.named_modules()}
        self._undo = contextlib.ExitStack()
        self._edges: dict[tuple[int, str], tuple[nn.Module, str, nn.Module]] = {}  # from the root to hooked modules
        self._hooks: list[tuple[dict, int, str]] = []
        self._lengths: list[tuple[Any, int, str]] = []

    def before(self, module: nn.Module, hook: Callable[..., Any], unless: Unless | None = None) -> None:
        """Call hook(module, args, kwargs) before a module's forward, unless unless(kwargs)."""
        handle = module.register_forward_pre_hook(Hook(hook, unless), with_kwargs=True)
        self._keep(module, handle, module._forward_pre_hooks)

    def after(self, module: nn.Module, hook: Callable[..., Any], unless: Unless | None = None) -> None:
        """Call hook(module, args, kwargs, out) after a module's forward, unless unless(kwargs)."""
        handle = module.register_forward_hook(Hook(hook, unless), with_kwargs=True)
        self._keep(module, handle, module._forward_hooks)

    def replace(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Put a function in place of a module's own; it has the signature of the one that it stands for."""
        original, is_own = getattr(module, name), name in vars(module)
        placed = Untraced(function)
        functools.update_wrapper(placed, original)  # generate() reads the signature
        setattr(module, name, placed)
        self._undo.callback(setattr, module, name, original) if is_own else self._undo.callback(delattr, module, name)
        self._find(module)

    def count(self, modules: Any) -> None:
        """A list of modules whose length must stay."""
        self._lengths.append((modules, len(modules), self._names.get(id(modules), "")))

    def close(self) -> None:
        """Give the model back as it was; a second time does nothing."""
        self._undo.close()
        forget_compiled_code()

    def check(self) -> None:
        """Raise ModelChangedError where hooks would miss what the model runs now."""
        for parent, name, child in self._edges.values():
            if parent._modules.get(name) is not child:
                where = ".".join(filter(None, (self._names[id(parent)], name)))
                raise ModelChangedError(f"{where} was replaced after attach ({type(child).__name__} before); {AGAIN}")
        for placed, key, where in self._hooks:
            if key not in placed:
                raise ModelChangedError(f"hooks of {where or 'the model'} were removed after attach; {AGAIN}")
        for modules, length, where in self._lengths:
            if len(modules) != length:
                raise ModelChangedError(f"{where} had {length} modules at attach and has {len(modules)} now; {AGAIN}")

    def _keep(self, module: nn.Module, handle: Any, placed: dict) -> None:
        self._undo.callback(handle.remove)
        self._find(module)
        self._hooks.append((placed, handle.id, self._names[id(module)]))

    def _find(self, module: nn.Module) -> None:
        """Note the way from the root to a module."""
        parent = self.root
        for name in filter(None, self._names[id(module)].split(".")):
            child = parent._modules[name]
            self._edges[id(parent), name] = (parent, name, child)  # type: ignore[assignment]
            parent = child  # type: ignore[assignment]


class Untraced(NotCopyable, functools.partial):
    """A function that runs as it is, whatever torch.compile makes of its caller."""

    def __new__(cls, function: Callable[..., Any]) -> Untraced:
        """A partial, which torch.compile knows."""
        return super().__new__(cls, _outside(), function)


class Hook(NotCopyable):
    """A hook that runs as it is, but for passes that need none: torch.compile finds nothing in their way."""

    def __init__(self, hook: Callable[..., Any], unless: Unless | None = None):
        self._hook, self._unless = Untraced(hook), unless

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, *out: Any) -> Any:
        """Of a module, what it is called with and, after it, what it made."""
        if self._unless is not None and not torch.compiler.is_compiling() and self._unless(kwargs):
            return None
        if getattr(cache_of(kwargs), _READY, False):
            return None
        return self._hook(module, args, kwargs, *out)


def mark_ready(cache: Any, ready: bool) -> None:
    """Say whether the passes over a cache to come need no hook."""
    setattr(cache, _READY, ready)


@functools.cache
def _outside() -> Callable[..., Any]:
    return torch.compiler.disable(_call)


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)
