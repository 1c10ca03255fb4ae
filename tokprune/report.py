"""What really happened in a call: tokens an image and columns a layer, in one honest line and as a dict."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .types import Signal


@dataclass(frozen=True)
class ImageReport:
    """One image: visual tokens before and after, rows that show no patch, and the kept indices, ascending."""

    n_visual: int
    n_special: int
    keep: Tensor  # (N,) bool on the device, read when asked for

    @functools.cached_property
    def kept(self) -> Tensor:
        """Indices of the kept rows among the image's placeholders, (K,) int64, on the CPU."""
        return self.keep.nonzero()[:, 0].cpu()

    @property
    def n_kept(self) -> int:
        """Visual tokens kept, rows that show no patch not counted."""
        return len(self.kept) - self.n_special


@dataclass(frozen=True)
class Prefill:
    """One pass over a prompt: columns in, columns the decoder layers saw, kept columns a row."""

    n_outer: int
    n_inner: int
    lengths: Tensor | None  # (B,) on the device; None where nothing was dropped

    @functools.cached_property
    def rows(self) -> list[int]:
        """Columns of each row without padding; empty where nothing was dropped."""
        return [] if self.lengths is None else self.lengths.tolist()


@dataclass
class Report:
    """One call of an attached model.

    Args:
        method: label with options.
        budget: as asked.
        signals: what was collected, with its layers.
        n_layers: decoder layers.
        images: one entry an image, beam copies folded.
        encoded: one entry an encoded image, copies included.
        prefills: one entry a pass over prompt tokens.
        clamped: whether a count above an image's number of tokens was asked for.
    """

    method: str
    budget: str
    signals: str
    n_layers: int
    images: list[ImageReport] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    clamped: bool = False
    encoded: list[ImageReport] = field(default_factory=list)

    @property
    def layers(self) -> list[int]:
        """Prompt columns that each decoder layer ran on, padding included, summed over passes."""
        return [sum(p.n_inner for p in self.prefills)] * self.n_layers

    @property
    def n_prompt(self) -> int:
        """Prompt columns before pruning, padding included."""
        return sum(p.n_outer for p in self.prefills)

    @property
    def n_prompt_kept(self) -> int:
        """Prompt columns that the language model ran on, padding included."""
        return sum(p.n_inner for p in self.prefills)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {
            "method": self.method,
            "budget": self.budget,
            "signals": self.signals,
            "n_visual": [i.n_visual for i in self.images],
            "n_kept": [i.n_kept for i in self.images],
            "n_special": [i.n_special for i in self.images],
            "prompt_columns": self.n_prompt,
            "prompt_columns_kept": self.n_prompt_kept,
            "layers": self.layers,
        }

    def __str__(self):
        head = f"{self.method} {self.budget}".strip()
        if not self.prefills and not self.images:
            return f"{head}: no call yet"
        parts = [_tokens_line(self.images), f"language model {self.n_prompt} -> {self.n_prompt_kept} columns"]
        if self.clamped:
            parts.append("more tokens asked for than an image has: all kept")
        elif self.images and self.n_prompt == self.n_prompt_kept and self._dropped:
            parts.append("nothing is saved in this batch: its longest row is text")
        if self.signals:
            parts.append(self.signals)
        return f"{head}: " + "; ".join(parts)

    @property
    def _dropped(self) -> bool:
        return any(i.n_kept < i.n_visual for i in self.images)


def _tokens_line(images: list[ImageReport]) -> str:
    if not images:
        return "no image"
    pairs = sorted({(i.n_visual, i.n_kept) for i in images}, reverse=True)
    shown = ", ".join(f"{before} -> {after}" for before, after in pairs[:4]) + (" ..." if len(pairs) > 4 else "")
    return f"{len(images)} image{'s' * (len(images) > 1)}, visual tokens {shown} each"


def without_beam_copies(images: list[ImageReport], rows: Tensor | None) -> list[ImageReport]:
    """One entry an image, where `generate` of transformers before 5.18 repeats the pictures of every beam.

    Args:
        images: as encoded; copies stand beside each other.
        rows: (B, S) input_ids that may hold beam copies, or None where there are none.
    """
    if rows is None or len(images) < 2:
        return list(images)
    same = (rows[1:] == rows[:-1]).all(1).tolist()
    starts = [0, *(i + 1 for i, equal in enumerate(same) if not equal), len(rows)]
    runs = {b - a for a, b in itertools.pairwise(starts)}
    copies = runs.pop() if len(runs) == 1 else 1
    if len(images) % copies:
        return list(images)
    for i, image in enumerate(images):
        if not torch.equal(image.keep, images[i - i % copies].keep):
            return list(images)
    return images[::copies]


def describe_signals(signals: frozenset[Signal]) -> str:
    """What was collected, from which layers."""

    def layers(s: Signal) -> str:
        return f"{s.layers[0]}" if len(s.layers) == 1 else f"{s.layers[0]}-{s.layers[-1]}"

    return ", ".join(sorted(f"{s.kind.value} ({s.form}) of vision layer {layers(s)}" for s in signals))
