"""Clocks and memory of one generation; on a GPU every reading waits for the device."""

from __future__ import annotations

import ctypes
import gc
import math
import re
import time
from contextlib import suppress
from pathlib import Path

import torch


def now(device: torch.device) -> float:
    """Seconds, with all work on the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """Reads the clock at the end of every forward pass of a model within a `with` block.

    Attributes:
        ticks: seconds from the start to the end of every forward pass: of the first token, the second, ...
        total_s: seconds of the whole block.
        peak_bytes: of the GPU's memory meanwhile; None without one.
    """

    def __init__(self, model: torch.nn.Module):
        self.model, self.device = model, model.device
        self.ticks: list[float] = []
        self.total_s = math.nan
        self.peak_bytes: int | None = None

    @property
    def prefill_s(self) -> float:
        """Seconds until the first forward pass ended."""
        return self.ticks[0] if self.ticks else math.nan

    @property
    def decode_s(self) -> float:
        """Seconds after it."""
        return self.total_s - self.prefill_s

    def __enter__(self) -> Stopwatch:
        self.hook = self.model.register_forward_hook(self._forward_ended)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.started = now(self.device)
        return self

    def __exit__(self, *exception) -> None:
        self.hook.remove()
        self.total_s = now(self.device) - self.started
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)

    def _forward_ended(self, *ignored) -> None:
        self.ticks.append(now(self.device) - self.started)


class Memory:
    """The peak of memory within a `with` block: of the GPU, or of this process on Linux.

    Attributes:
        peak_bytes: weights included; None where the system does not tell.
        above_bytes: of it, what was not in use before.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.peak_bytes: int | None = None
        self.above_bytes: int | None = None

    def __enter__(self) -> Memory:
        gc.collect(1)  # what the run before left in cycles is young; a full collection takes a third of a second
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before: int | None = torch.cuda.memory_allocated(self.device)
        else:
            _give_back()
            self.before = _status("VmRSS") if _forget_peak() else None
        return self

    def __exit__(self, *exception) -> None:
        if self.before is None:
            return
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")
        if peak is not None:
            self.peak_bytes, self.above_bytes = peak, max(0, peak - self.before)


def _give_back() -> None:
    """What runs before have freed and the allocator still holds would be used again unseen."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> bool:
    """Reset the peak of this process's memory; whether the system lets us."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def _status(field: str) -> int | None:
    """Bytes of a field of this process's status; None where there is none."""
    with suppress(OSError):
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return 1024 * int(found[1]) if found else None
    return None
