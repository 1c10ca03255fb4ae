"""What really happened in a call: tokens, columns, FLOPs and KV bytes, in one honest line and as a dict."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .flops import Ledger, Ops, Shape
from .types import Kind, Layout, Signal


@dataclass(frozen=True)
class ImageReport:
    """One image: visual tokens before and after, and what encoding it took.

    Args:
        keep: (N,) bool on the device, read when asked for.
        layout: where the rows lie.
        n_patches: patches of a crop, or None for the configuration's.
        spent: what collecting signals and selecting computed, given the number of tokens kept.
    """

    keep: Tensor
    layout: Layout
    n_patches: int | None = None
    spent: Callable[[int], Ops] = lambda n_kept: Ops()

    @property
    def n_visual(self) -> int:
        """Tokens that show a patch."""
        return self.layout.n_visual

    @property
    def n_special(self) -> int:
        """Rows that show none: newlines, [CLS] features."""
        return len(self.layout.crop) - self.n_visual

    @functools.cached_property
    def kept(self) -> Tensor:
        """Indices of the kept rows among the image's placeholders, (K,) int64, on the CPU."""
        return self.keep.nonzero()[:, 0].cpu()

    @functools.cached_property
    def n_kept(self) -> int:
        """Visual tokens kept, rows that show no patch not counted."""
        return sum(self.layout.crop[i] >= 0 for i in self.kept.tolist())

    @functools.cached_property
    def selector(self) -> Ops:
        """What collecting signals and selecting computed."""
        return self.spent(self.n_kept)

    @property
    def n_special_kept(self) -> int:
        """Rows that show no patch and stay."""
        return len(self.kept) - self.n_kept

    def kept_by_crop(self) -> dict[int, int]:
        """How many tokens each crop keeps."""
        counts = dict.fromkeys(self.layout.crops, 0)
        for i in self.kept.tolist():
            if self.layout.crop[i] >= 0:
                counts[self.layout.crop[i]] += 1
        return counts


@dataclass(frozen=True)
class Prefill:
    """One pass over a prompt: rows, columns in and columns the decoder layers saw, cached ones before them.

    `lengths` holds the kept columns of each row, (B,) on the device; None where nothing was dropped.
    """

    n_rows: int
    n_outer: int
    n_inner: int
    past_outer: int
    past_inner: int
    lengths: Tensor | None

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
        shape: the model as the ledger sees it; None where its cost is not known.
        bytes_per_value: of keys and values.
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
    shape: Shape | None = None
    bytes_per_value: int = 2

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

    @functools.cached_property
    def ledger(self) -> Ledger | None:
        """The call as it ran, at its padded width; None where the cost of the model is not known."""
        selectors = [image.selector for image in self.encoded]
        return self._ledger([(p.n_inner, p.past_inner) for p in self.prefills], selectors)

    @functools.cached_property
    def ledger_unpruned(self) -> Ledger | None:
        """The same call of the bare model."""
        return self._ledger([(p.n_outer, p.past_outer) for p in self.prefills], [Ops()] * len(self.encoded))

    def _ledger(self, columns: list[tuple[int, int]], selectors: list[Ops]) -> Ledger | None:
        shape = self.shape
        if shape is None or not self.prefills:
            return None
        ledger = Ledger(layers=(Ops(),) * shape.text.n_layers)
        for image, selector in zip(self.encoded, selectors, strict=True):
            ledger += shape.encode(image.layout.n_crops, image.n_patches, selector)
        for p, (n, past) in zip(self.prefills, columns, strict=True):
            ledger += shape.read(n, rows=p.n_rows, past=past, bytes_per_value=self.bytes_per_value)
        return ledger

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {
            "method": self.method,
            "budget": self.budget,
            "signals": self.signals,
            "n_visual": [i.n_visual for i in self.images],
            "n_kept": [i.n_kept for i in self.images],
            "n_special": [i.n_special for i in self.images],
            "n_special_kept": [i.n_special_kept for i in self.images],
            "kept_by_crop": [i.kept_by_crop() for i in self.images],
            "prompt_columns": self.n_prompt,
            "prompt_columns_kept": self.n_prompt_kept,
            "layers": self.layers,
            **self._costs(),
        }

    def _costs(self) -> dict[str, Any]:
        before, after = self.ledger_unpruned, self.ledger
        if before is None or after is None:
            return {}
        return {
            "llm_flops": [before.llm.flops, after.llm.flops],
            "prefill_flops": [before.prefill.flops, after.prefill.flops],
            "selector_flops": after.selector.flops,
            "before_llm_flops": before.before_llm.flops,
            "kv_bytes": [before.kv_bytes, after.kv_bytes],
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
        if self.ledger and self.ledger_unpruned:
            parts += _cost_lines(self.ledger_unpruned, self.ledger)
        if self.signals:
            parts.append(self.signals)
        return f"{head}: " + "; ".join(parts)

    @property
    def _dropped(self) -> bool:
        return any(i.n_kept < i.n_visual for i in self.images)


LIMIT_SHOWN = 0.1  # the share of tower and projector from which a report names it


def _cost_lines(before: Ledger, after: Ledger) -> list[str]:
    """FLOPs of language model and prefill, KV bytes, and how far the vision tower limits what can be saved."""
    llm, whole = (before.llm.flops, after.llm.flops), (before.prefill.flops, after.prefill.flops)
    lines = [
        f"LLM {arrow(*llm, 'FLOPs', 1000)}, whole prefill {arrow(*whole, 'FLOPs', 1000)}",
        f"KV cache {arrow(before.kv_bytes, after.kv_bytes, 'B', 1024)}",
    ]
    share = before.before_llm.flops / whole[0]
    if share >= LIMIT_SHOWN:
        lines.append(f"vision tower and projector are {100 * share:.0f} % of the unpruned prefill and cannot be saved")
    return lines


def arrow(before: int, after: int, unit: str, base: int) -> str:
    """Two amounts in one readable unit, and their ratio: "8.50 -> 2.51 TFLOPs (29.5 %)"."""
    prefixes = ("", "K", "M", "G", "T", "P") if base == 1000 else ("", "Ki", "Mi", "Gi", "Ti", "Pi")
    power = min(int(math.log(max(before, 1), base)), len(prefixes) - 1)
    a, b = (f"{amount / base**power:.3g}" for amount in (before, after))
    return f"{a} -> {b} {prefixes[power]}{unit} ({100 * after / max(before, 1):.3g} %)"


def _tokens_line(images: list[ImageReport]) -> str:
    if not images:
        return "no image"
    pairs = sorted({(i.n_visual, i.n_kept) for i in images}, reverse=True)
    shown = ", ".join(f"{before} -> {after}" for before, after in pairs[:4]) + (" ..." if len(pairs) > 4 else "")
    line = f"{len(images)} image{'s' * (len(images) > 1)}, visual tokens {shown} each"
    newlines = sum(i.layout.n_newlines for i in images), sum(i.n_special_kept for i in images)
    return f"{line}, newlines {newlines[0]} -> {newlines[1]} in all" if newlines[0] else line


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
        if not s.layers:
            return ""
        span = f"{s.layers[0]}" if s.layers[-1] - s.layers[0] == 0 else f"{s.layers[0]}-{s.layers[-1]}"
        span = span if s.layers[-1] - s.layers[0] == len(s.layers) - 1 else ", ".join(map(str, s.layers))
        return f" of vision layer {span}"

    def form(s: Signal) -> str:
        attention = s.kind in (Kind.CLS_ROW, Kind.RECEIVED, Kind.GIVEN)
        return f" ({s.form}{', one head' if s.heads == 'single' else ''})" if attention else ""

    return ", ".join(sorted(s.kind.value + form(s) + layers(s) for s in signals))
