"""torch, imported when something of it is used: names, options and costs of methods need none of it.

Modules of the library take `torch`, `nn` and `F` (torch.nn.functional) from here, and `Tensor` for type checkers alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
    import torch.nn.functional as F
    from torch import nn as nn
else:

    class _Module:
        def __init__(self, name: str):
            self._name = name

        def __getattr__(self, name: str) -> Any:
            """A name of the module, which is found at once from then on."""
            if name.startswith("__"):  # asked for by tools that look at modules
                raise AttributeError(name)
            found = getattr(importlib.import_module(self._name), name)
            self.__dict__[name] = found
            return found

    torch, nn, F = map(_Module, ("torch", "torch.nn", "torch.nn.functional"))

__all__ = ["F", "nn", "torch"]
