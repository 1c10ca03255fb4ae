"""Triton kernels for loops and sums that are many small operations on a GPU, each with the results of its torch code.

Read this module first: who uses a kernel, and what happens where one fails. `greedy` and `attention` hold the kernels.
They never ran on a GPU yet, so they are off until you ask for them: set TOKPRUNE_KERNELS=auto, or use
`with kernels.use("auto"):`. Then they run on CUDA tensors where Triton is installed, as it is with CUDA builds of torch
for Linux.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import OptionError
from ..lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "TOKPRUNE_KERNELS"
Use = Literal["off", "auto", "always"]
_USE: contextvars.ContextVar[Use | None] = contextvars.ContextVar("tokprune_kernels", default=None)
_FAILED: set[str] = set()  # kernels that failed in this process


@contextlib.contextmanager
def use(how: Use) -> Iterator[None]:
    """Choose within a `with` block, in this thread.

    Args:
        how: "off" runs torch alone; "auto" runs kernels on CUDA tensors and falls back to torch where one fails;
            "always" runs kernels on any tensor, in Triton's interpreter on a CPU, and raises where one fails.
    """
    before = _USE.set(_checked(how))
    try:
        yield
    finally:
        _USE.reset(before)


def setting() -> Use:
    """What `use` says here, else the environment variable, else "off"."""
    return _USE.get() or _checked(os.environ.get(VARIABLE) or "off")


def _checked(how: str) -> Any:
    if how not in get_args(Use):
        raise OptionError(f"invalid {VARIABLE} {how!r}: use {', '.join(get_args(Use))}")
    return how


def farthest(distance: Tensor, first: Tensor, n_keep: int) -> Tensor | None:
    """(G, n_keep): after `first` (G,), always the token farthest from those chosen; None where torch has to do it.

    Args:
        distance: (G, N, N) float32.
        first: indices.
        n_keep: 1..N.
    """
    return _run("greedy", "farthest", distance, first, n_keep)


def determinant(kernel: Tensor, relevance: Tensor, n_keep: int, least: float) -> Tensor | None:
    """(G, n_keep): always the token with the largest residual; None where torch has to do it.

    Args:
        kernel: (G, N, N) float32, symmetric.
        relevance: (G, N) float32, decides where no residual is above `least`.
        n_keep: 1..N.
        least: residuals up to here are rounding.
    """
    return _run("greedy", "determinant", kernel, relevance, n_keep, least)


def column_sums(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """Softmax attention summed over heads and queries, (B, K), and its log-sum-exp, (B, H, Q); None for torch.

    Args:
        q: (B, H, Q, d), any strides.
        k: (B, H, K, d), any strides.
        scale: of the logits.
    """
    return _run("attention", "column_sums", q, k, scale)


def _run(module: str, name: str, x: Tensor, *rest: Any) -> Any:
    how = setting()
    if how == "always":
        return _kernel(module, name)(x, *rest)
    if how == "off" or not _fits(x) or name in _FAILED:
        return None
    try:
        with torch.cuda.device(x.device):
            return _kernel(module, name)(x, *rest)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a compiler, a driver or a version of Triton; torch gives the same result
        _FAILED.add(name)
        first = (str(error).strip().splitlines() or [""])[0]
        warnings.warn(
            f"the Triton kernel {name!r} failed, torch is used instead, which is slower: {type(error).__name__}: "
            f"{first}. Set {VARIABLE}=off to leave kernels out",
            stacklevel=3,
        )
        return None


def _fits(x: Tensor) -> bool:
    """Whether kernels are for this tensor: values on a CUDA device, outside of tracing, with Triton installed."""
    if x.device.type != "cuda" or x.numel() == 0 or torch.compiler.is_compiling():
        return False
    if type(x) is not torch.Tensor:  # without values, as in FakeTensorMode, or with a dispatch of its own
        return False
    return importlib.util.find_spec("triton") is not None


def _kernel(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
