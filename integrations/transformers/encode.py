"""Encoded pictures: split by image, selected from, and marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokprune.core.budget import Budget
from tokprune.core.clock import span
from tokprune.core.errors import UnsupportedModelError
from tokprune.core.layout import Layout
from tokprune.core.signals import Kind, Signal
from tokprune.core.tokens import Count
from tokprune.cost.selection import SelectionCost
from tokprune.prune.report import ImageReport
from tokprune.prune.request import Request
from tokprune.prune.select import Picture, Selector, flops_of, visual_rows

from .caches import mark_dropped
from .families.base import ModelFamily
from .passes import Call


@dataclass
class Encoded:
    """Images as one encode function made them.

    Args:
        name: the encode function.
        arguments: of its call.
        features: (N, D) an entry: an image, or a tile where only the prompt tells images apart.
        collected: what the tower's taps gave, by crop.
    """

    name: str
    arguments: Mapping[str, Any]
    features: list[Tensor]
    collected: dict[Signal | str, Tensor] = field(default_factory=dict)


@span("select")
def by_image(family: ModelFamily, encoded: Encoded, runs: Sequence[Any] | None = None) -> list[Picture]:
    """Rows, layout and packed signals of every image; `runs` as `ModelFamily.layouts` takes them.

    Raises:
        UnsupportedModelError: the layouts do not have as many rows as there are features.
    """
    name, arguments = encoded.name, encoded.arguments
    layouts = family.layouts(name, arguments, encoded.features, runs or ())
    lengths = [len(layout.crop) for layout in layouts]
    if sum(lengths) != sum(map(len, encoded.features)):
        raise UnsupportedModelError(
            f"{name} gave {sum(map(len, encoded.features))} rows where the layout of the pictures says {sum(lengths)}"
        )
    features = encoded.features
    if lengths != list(map(len, features)):
        features = list(torch.cat(features).split(lengths))
    is_video = name == "get_video_features"
    pictures = [Picture(rows, layout, is_video=is_video) for rows, layout in zip(features, layouts, strict=True)]
    for signal, values in encoded.collected.items():
        if isinstance(signal, Signal):
            for picture, own in zip(pictures, _signal_by_image(family, encoded, layouts, signal, values), strict=True):
                picture.signals[signal] = own
    states = encoded.collected.get("states")
    if states is None:
        return pictures
    if family.tower.has_cls and family.selection(arguments) == "full":
        states = states[:, 1:]
    return [
        replace(picture, states=own) if family.merges_states(picture.layout) else picture
        for picture, own in zip(pictures, _packed(family, encoded, layouts, states), strict=True)
    ]


def unencoded(family: ModelFamily, name: str, arguments: Mapping[str, Any]) -> list[Picture]:
    """Layout and pixels of pictures that the tower has not seen; their features have no width yet."""
    cells = family.cells(name, arguments)
    return by_image(family, Encoded(name, arguments, [cells[:, :0]], {Signal(Kind.PIXELS): cells}))


def _signal_by_image(
    family: ModelFamily, encoded: Encoded, layouts: Sequence[Layout], signal: Signal, values: Tensor
) -> list[Tensor]:
    """A signal of every image, as `Picture` holds it."""
    if signal.kind is Kind.PIXELS:
        return [cells[None] for cells in values.split([layout.n_visual for layout in layouts])]
    if signal.kind is Kind.CLS_STATE:
        n_crops = family.crops_of(encoded.name, encoded.arguments, len(values))
        return list(values.to(encoded.features[0].device).split(n_crops))
    return [rows.transpose(0, 1) for rows in _packed(family, encoded, layouts, values)]


def _packed(family: ModelFamily, encoded: Encoded, layouts: Sequence[Layout], values: Tensor) -> list[Tensor]:
    """Values of patches, (crops, patches, ...), through the model's own packing: (N_visual, ...) an image."""
    values = values.to(encoded.features[0].device)
    return visual_rows(family.pack(encoded.name, encoded.arguments, values.flatten(2)), layouts, values.shape[2:])


class Pruner:
    """What is asked for before the language model, on one model: marks the rows that are dropped and keeps the books.

    Args:
        family: of the model.
        request: what was asked for.
        signals: collected from the vision tower.
    """

    def __init__(self, family: ModelFamily, request: Request, signals: frozenset[Signal]):
        self.family, self.request, self._signals = family, request, signals
        method = request.before
        self.reads_states = method is not None and method.space == "tower" and family.tower.projects_rows
        self.selects_pixels = method is not None and method.space == "pixels" and family.takes_cells
        self._selector = None
        if method is not None:
            project = family.projector if self.reads_states else None
            budget, label = request.before_budget, request.label
            self._selector = Selector(method, budget, label, request.newlines, self._flops, project)

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is to be dropped before the language model, whatever the picture."""
        if self.request.replay is not None:
            return False
        budget = self.request.before_budget
        return self._selector is None or (budget is not None and budget.is_everything)

    def chosen(self, pictures: Sequence[Picture], salts: Sequence[int], n_before: int) -> list[Tensor]:
        """What stays of pictures that are not encoded yet, (N,) bool each, after `n_before` pictures of the call."""
        keeps = [torch.ones(len(p.features), dtype=torch.bool, device=p.features.device) for p in pictures]
        if self.request.replay is not None:
            numbered = enumerate(keeps, n_before)
            return [self.request.replay.keep(i, 0, len(keep)).to(keep.device) for i, keep in numbered]
        for group in self._selector.groups(pictures, salts) if self._selector else ():
            for place, i in enumerate(group.members):
                keeps[i] = group.keep[place]
        return keeps

    @span("select")
    def prune(self, pictures: Sequence[Picture], salts: Sequence[int], call: Call) -> list[Tensor]:
        """The rows of every image, marked where they are dropped."""
        if self.request.replay is not None:
            keeps = [self.request.replay.keep(len(call.images) + i, 0, len(p.features)) for i, p in enumerate(pictures)]
            return self.mark(pictures, keeps, call)
        marked = [p.features for p in pictures]
        keeps = [rows.new_ones(len(rows), dtype=torch.bool) for rows in marked]
        sizes: list[Tensor | None] = [None] * len(marked)
        for group in self._selector.groups(pictures, salts) if self._selector else ():
            call.touched = True
            call.below_budget |= self._selector.method.count is not Count.CONTENT
            call.bad.append(group.given.isnan().any())
            call.dropped.append((~group.keep).any())
            call.mistakes.append(group.mistake)
            rows = mark_dropped(group.features, group.keep)
            for place, i in enumerate(group.members):
                marked[i], keeps[i] = rows[place], group.keep[place]
                sizes[i] = None if group.sizes is None else group.sizes[place]
        for picture, keep, size in zip(pictures, keeps, sizes, strict=True):
            call.clamped |= self._asked_more(picture.layout)
            call.images.append(self._image_report(picture, keep))
            call.sizes.append(size)
        return marked

    def mark(self, pictures: Sequence[Picture], keeps: Sequence[Tensor], call: Call) -> list[Tensor]:
        """The same for images of which it is known what to keep."""
        marked = []
        for picture, chosen in zip(pictures, keeps, strict=True):
            rows, layout = picture.features, picture.layout
            keep = chosen.to(rows.device)
            call.touched = True
            call.bad.append(rows.isnan().any())
            call.dropped.append((~keep).any())
            n_patches, said = self.family.crop_patches(layout), {"is_video": picture.is_video}
            call.images.append(ImageReport(keep, layout, n_patches, before_tower=self.selects_pixels, **said))
            call.sizes.append(None)
            marked.append(mark_dropped(rows, keep))
        return marked

    def _flops(self, layout: Layout, n_keep: int) -> int:
        """What keeping n_keep tokens of an image costs, with the reference text."""
        budget = self.request.before_budget or Budget(flops_ratio=1)
        n_patches = self.family.crop_patches(layout)
        return flops_of(self._cost(layout), budget, self.request.newlines, layout, n_keep, n_patches)

    def _image_report(self, picture: Picture, keep: Tensor) -> ImageReport:
        layout, collected = picture.layout, bool(picture.signals)
        n_patches = self.family.crop_patches(layout)
        if self._selector is None or self.family.shape is None:
            return ImageReport(keep, layout, n_patches, is_video=picture.is_video)
        n_keep, content = self._selector.n_keep(layout), self._selector.method.count is Count.CONTENT
        cost = self._cost(layout)
        # Counted when it is asked for: what a picture decides is not known before.
        return ImageReport(
            keep,
            layout,
            n_patches,
            lambda n_kept: cost.selector(layout, n_kept if content else n_keep, n_patches, collected),
            is_video=picture.is_video,
        )

    def _cost(self, layout: Layout) -> SelectionCost:
        method: Any = self.request.before
        in_tower = self.reads_states and self.family.merges_states(layout)
        return SelectionCost(self.family.shape, self._signals, method.cost, in_tower, method.count is not Count.EXACT)

    def _asked_more(self, layout: Layout) -> bool:
        budget = self.request.before_budget
        return budget is not None and budget.keep_tokens is not None and budget.keep_tokens > layout.n_visual
