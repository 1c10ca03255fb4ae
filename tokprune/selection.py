"""Selecting tokens of encoded images: how many, group by group, with their newlines, and merges projected anew."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from . import ops
from .budget import Budget
from .call import Call
from .columns import mark_dropped
from .errors import BudgetError, UnsupportedModelError
from .flops import Ops, SelectionCost
from .report import ImageReport
from .spans import span
from .stages import Replay, Stages
from .types import NEWLINE, Count, Kind, Layout, Signal, VisualTokens

Newlines = Literal["auto", "keep_rows_with_tokens", "keep", "drop"]


@dataclass
class Encoded:
    """Images as one encode function made them.

    Args:
        name: the encode function.
        arguments: of its call.
        features: (N, D) an entry: an image, or a tile where only the prompt tells images apart.
        collected: what the tap gave, by crop.
    """

    name: str
    arguments: Mapping[str, Any]
    features: list[Tensor]
    collected: dict[Signal | str, Tensor] = field(default_factory=dict)


@dataclass
class Images:
    """The same by image; signals and states are of visual tokens alone."""

    features: list[Tensor]
    layouts: list[Layout]
    signals: dict[Signal, list[Tensor]]  # (l, N, ...) or (C, D) or (T, D)
    states: list[Tensor] | None


@span("select")
def by_image(adapter, encoded: Encoded, runs: list[int] | None = None) -> Images:
    """Layouts, rows and packed signals of every image.

    Raises:
        UnsupportedModelError: the layouts do not have as many rows as there are features.
    """
    name, arguments = encoded.name, encoded.arguments
    layouts = adapter.layouts(name, arguments, encoded.features, runs or ())
    lengths = [len(layout.crop) for layout in layouts]
    if sum(lengths) != sum(map(len, encoded.features)):
        raise UnsupportedModelError(
            f"{name} gave {sum(map(len, encoded.features))} rows where the layout of the pictures says {sum(lengths)}"
        )
    features = encoded.features
    if lengths != list(map(len, features)):
        features = list(torch.cat(features).split(lengths))
    device = features[0].device

    def packed(values: Tensor) -> list[Tensor]:
        rows = torch.cat(adapter.pack(name, arguments, values.flatten(2).to(device)))
        n_visual = [layout.n_visual for layout in layouts]
        if len(rows) == sum(n_visual):  # what shows no patch was not packed
            visual = list(rows.split(n_visual))
        else:
            pairs = zip(rows.split(lengths), layouts, strict=True)
            visual = [r[ops.on_device(layout.visual, device)] for r, layout in pairs]
        return [v.unflatten(1, values.shape[2:]) for v in visual]

    signals: dict[Signal, list[Tensor]] = {}
    for signal, values in encoded.collected.items():
        if not isinstance(signal, Signal):
            continue
        if signal.kind is Kind.CLS_STATE:
            signals[signal] = list(values.to(device).split(adapter.crops_of(name, arguments, len(values))))
        else:
            signals[signal] = [rows.transpose(0, 1) for rows in packed(values)]
    states = encoded.collected.get("states")
    if states is None:
        return Images(features, layouts, signals, None)
    if adapter.tower.has_cls and adapter.selection(arguments) == "full":
        states = states[:, 1:]
    return Images(features, layouts, signals, packed(states))


class Selector:
    """A method with its budget on one model: what it keeps of the images of a call."""

    def __init__(self, adapter, stages: Stages, newlines: Newlines, signals):
        self.adapter, self.method, self.label, self.budget = adapter, stages.first, stages.label, stages.first_budget
        self.replay, method = stages.replay, stages.first
        self.newlines = method.newlines if newlines == "auto" else newlines
        self.reads_states = method.space == "tower" and adapter.tower.projects_rows
        self.n_keep = functools.lru_cache(maxsize=64)(self._count)  # a FLOPs budget is searched for
        self._signals = signals

    @span("select")
    def prune(self, images: Images, salts: tuple[int, ...], call: Call) -> tuple[list[Tensor], list[Tensor]]:
        """Marked features and keep of every image; the method sees the images of one layout at once."""
        features, layouts = images.features, images.layouts
        if self.replay is not None:
            return self._replayed(self.replay, images, call), features
        marked, keeps = list(features), [f.new_ones(len(f), dtype=torch.bool) for f in features]
        for layout in dict.fromkeys(layouts):
            n_keep = self.n_keep(layout)
            if n_keep >= layout.n_visual:
                continue  # before any method code: the model stays bit-identical
            group = [i for i, other in enumerate(layouts) if other == layout]

            def stacked(rows: list[Tensor], group=group) -> Tensor:
                return torch.stack([rows[i] for i in group]) if len(group) > 1 else rows[group[0]][None]

            rows = stacked(features)
            signals = {s: stacked(values) for s, values in images.signals.items()}
            states = None if images.states is None else stacked(images.states)
            call.touched = True
            call.below_budget |= self.method.count is not Count.CONTENT
            call.bad.append(rows.isnan().any())
            new, keep = self._select(rows, states, layout, signals, tuple(salts[i] for i in group), n_keep)
            call.dropped.append((~keep).any())
            for place, i in enumerate(group):
                marked[i], keeps[i] = new[place], keep[place]
        for layout, keep in zip(layouts, keeps, strict=True):
            call.clamped |= self._asked_more(layout)
            call.images.append(self._image_report(layout, keep, collected=bool(images.signals)))
        return marked, keeps

    def _replayed(self, replay: Replay, images: Images, call: Call) -> list[Tensor]:
        """Marked features of images of which it is known what to keep."""
        marked = []
        for features, layout in zip(images.features, images.layouts, strict=True):
            keep = replay.keep(len(call.images), 0, len(layout.crop)).to(features.device)
            call.touched, dropped = True, (~keep).any()
            call.bad.append(features.isnan().any())
            call.dropped.append(dropped)
            call.images.append(ImageReport(keep, layout, self.adapter.crop_patches(layout)))
            marked.append(mark_dropped(features, keep))
        return marked

    def _select(
        self, rows: Tensor, states: Tensor | None, layout: Layout, signals: dict, salts: tuple[int, ...], n_keep: int
    ) -> tuple[Tensor, Tensor]:
        """Marked features and keep of a group; rows that show no patch never reach the method."""
        visual = ops.on_device(layout.visual, rows.device)
        own = rows if layout.n_visual == len(layout.crop) else rows[:, visual]
        given = states if states is not None and self._in_tower(layout) else own
        tokens = VisualTokens.of(given, layout.without_specials, signals, salts)
        with torch.autocast(rows.device.type, enabled=False):  # it would compare tokens in half precision
            selected = self.method.select(tokens, n_keep)
        features = selected.features
        if given is states:
            features = self._projected(selected, own, n_keep)
        if own is rows:
            return mark_dropped(features, selected.keep), selected.keep
        keep = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        keep = keep.index_copy(1, visual, selected.keep)
        keep = with_newlines(keep, layout, self.newlines)
        if features is not own:
            rows = rows.index_copy(1, visual, features)
        return mark_dropped(rows, keep), keep

    def _projected(self, selected: VisualTokens, own: Tensor, n_keep: int) -> Tensor:
        """Tower states through the model's own projector, of kept tokens where their number is known."""
        project = self.adapter.projector
        if self.method.count is not Count.EXACT:
            return project(selected.features).to(own.dtype)
        kept = ops.keep_top(selected.keep.float(), n_keep)
        return ops.put(own, kept, project(ops.take(selected.features, kept)))

    def _count(self, layout: Layout) -> int:
        if self.budget is None:
            return 0
        least = min(self.method.min_keep(layout), layout.n_visual)
        n_keep = self.budget.n_keep(layout.n_visual, functools.partial(self._flops, layout), least)
        if n_keep < least:
            raise BudgetError(
                f"{self.label!r} cannot keep {n_keep} of {layout.n_visual} tokens: {least} is its least here; "
                f"type keep_tokens={least} or more"
            )
        return n_keep

    def _flops(self, layout: Layout, n_keep: int) -> int:
        """What keeping so many tokens of an image costs, beside the reference text."""
        n_special = most_specials(layout, n_keep, self.newlines)
        n_patches = self.adapter.crop_patches(layout)
        budget = self.budget or Budget(flops_ratio=1)
        ledger = self._cost(layout).prefill(layout, n_keep, budget.flops_text + n_special, n_patches)
        return getattr(ledger, budget.flops_scope).flops

    def _image_report(self, layout: Layout, keep: Tensor, collected: bool) -> ImageReport:
        n_patches, n_keep = self.adapter.crop_patches(layout), self.n_keep(layout)

        def spent(n_kept: int) -> Ops:
            """Counted when it is asked for: what a picture decides is not known before."""
            if self.adapter.shape is None:
                return Ops()
            n = n_kept if self.method.count is Count.CONTENT else n_keep
            return self._cost(layout).selector(layout, n, n_patches, collected)

        return ImageReport(keep, layout, n_patches, spent)

    def _in_tower(self, layout: Layout) -> bool:
        return self.reads_states and self.adapter.merges_states(layout)

    def _cost(self, layout: Layout) -> SelectionCost:
        projects_all = self.method.count is not Count.EXACT
        shape: Any = self.adapter.shape
        return SelectionCost(shape, self._signals, self.method.cost, self._in_tower(layout), projects_all)

    def _asked_more(self, layout: Layout) -> bool:
        asked = self.budget.keep_tokens if self.budget else None
        return asked is not None and asked > layout.n_visual


def most_specials(layout: Layout, n_keep: int, newlines: str) -> int:
    """Rows beside the visual tokens that at most stay: a token keeps one row's newline at most."""
    n_newlines = layout.n_newlines
    others = len(layout.crop) - layout.n_visual - n_newlines
    if newlines == "drop":
        return others if n_keep < layout.n_visual else others + n_newlines
    return others + (n_newlines if newlines == "keep" else min(n_newlines, n_keep))


def with_newlines(keep: Tensor, layout: Layout, newlines: str) -> Tensor:
    """(G, N) bool with newlines kept by the policy: those of rows that keep a token, all, or none.

    A newline that ends a whole picture counts as one of a row with all its tokens.
    """
    ends = [i for i, crop in enumerate(layout.crop) if crop == NEWLINE]
    if not ends or newlines == "keep":
        return keep
    at = ops.on_device(ends, keep.device)
    if newlines == "drop":
        return keep.index_fill(1, at, False)
    n_rows = 1 + max(layout.row)
    mosaic = [i for i in layout.visual if layout.crop[i] > 0]
    rows = ops.on_device([layout.row[i] for i in mosaic], keep.device)
    used = keep.new_zeros(len(keep), n_rows, dtype=torch.int32)
    used = used.index_add(1, rows, keep[:, ops.on_device(mosaic, keep.device)].int()) if mosaic else used
    whole = keep[:, ops.on_device(layout.visual, keep.device)].any(1, keepdim=True)
    used = torch.cat([used > 0, whole], 1)  # the last one is the whole picture
    return keep.index_copy(1, at, used[:, ops.on_device([layout.row[i] for i in ends], keep.device)])
