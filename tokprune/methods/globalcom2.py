"""GlobalCom²: let the thumbnail say how much each crop may keep, and help to say what."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..types import Count, Form, Kind, Layout, Signal, Tower, VisualTokens
from .base import ScoreMethod, top_by_crop


@dataclass(frozen=True)
class GlobalCom2(ScoreMethod):
    """Split the budget over crops by what the thumbnail finds in them; within a crop, ask thumbnail and crop.

    g and c_j are the [CLS] scores of thumbnail and crop j. Crop j weighs r_j = 1 + s_j - mean(s), s the softmax of
    the sums of g over the thumbnail's cells, divided by `temperature`. A token of crop j scores
    g'/|g'| + c_j/|c_j|, g' the thumbnail's map interpolated to where the token lies. Thumbnail and crops get
    N_t : N_j r_j of the budget. Without a thumbnail (video) crops share evenly and score by themselves.

    Source:   "Global Compression Commander", arXiv:2501.05179; code: xuyang-liu16/GlobalCom2@96b2d00.
    Faithful: retention ratios, counts, kept sets and sequences agree with the authors' code (golden cases
              globalcom2), with faithful=True.
    Differs:  the exact budget by largest remainder, where the code truncates and loses what a full crop cannot take;
              tokens stay where they lie, where the code mixes up the columns of padded crops and leaves the thumbnail
              in the order of scores. faithful=True does as the code does, but for newlines: it keeps one
              for every row that the model has, not for rows of padding. The fallback without [CLS] is from a
              description, on the rows the language model sees.
    Needs:    CLS_ROW of the last layer; nothing where there is no [CLS]. Text-agnostic. Cost: O(N).

    Args:
        form: [CLS] scores before ("logits", the code) or after ("softmax") the softmax. temperature suits logits.
        layer: vision layer, absolute or negative from the end. None is the last one.
        temperature: of the softmax over crops, above 0; 5 to 20 in the paper.
        alpha: None adds scores of unit length; 0..1 mixes alpha g' + (1 - alpha) c_j instead.
        allocate: "richness", or "even" for the control that gives every crop of the mosaic the same ratio.
        renormalise: ratios that were clipped to 1 make the others larger, as in the first release.
        faithful: truncate counts and order tokens as the authors' code does.
        ratio: with faithful, the ratio to keep as the paper takes it; None is the budget's.
    """

    form: Form = "logits"
    layer: int | None = None
    temperature: float = 10.0
    alpha: float | None = None
    allocate: Literal["richness", "even"] = "richness"
    renormalise: bool = False
    faithful: bool = False
    ratio: float | None = None

    source: ClassVar[str] = "arXiv:2501.05179"

    @property
    def count(self) -> Count:
        """Truncation loses a few tokens, how many depends on the picture."""
        return Count.CONTENT if self.faithful else Count.EXACT

    @property
    def newlines(self) -> Literal["keep_rows_with_tokens", "keep", "drop"]:
        """The code keeps them all."""
        return "keep" if self.faithful else "keep_rows_with_tokens"

    def needs(self, tower: Tower) -> frozenset[Signal]:
        """One [CLS] row, where there is one."""
        layers = (tower.layer(-1 if self.layer is None else self.layer),)
        return frozenset({Signal(Kind.CLS_ROW, layers, self.form)} if tower.has_cls else ())

    def score(self, tokens: VisualTokens) -> Tensor:
        """The thumbnail's own scores; in crops, both."""
        own, layout = self._own(tokens), tokens.layout
        if layout.n_crops == 1 or layout.crops[0] != 0:
            return own
        shared = self._thumbnail_on_mosaic(own, layout)
        if self.alpha is not None:
            mixed = self.alpha * shared + (1 - self.alpha) * own
        else:
            mixed = shared / _by_crop(shared.square(), layout).sqrt() + own / _by_crop(own.square(), layout).sqrt()
        in_thumbnail = ops.on_device([p == 0 for p in layout.crop_places], own.device)
        return torch.where(in_thumbnail, own, mixed)

    def retention(self, tokens: VisualTokens, ratio: float) -> Tensor:
        """(G, crops of the mosaic) in 0..1: the share that each may keep where the mean is `ratio`."""
        thumbnail, (rows, columns) = tokens.layout.regions[0], tokens.layout.crop_grid
        grid = self._own(tokens)[:, ops.on_device(thumbnail.index, tokens.keep.device)]
        side_y, side_x = max(thumbnail.height // rows, 1), max(thumbnail.width // columns, 1)
        y, x = (
            [min(i // side, n - 1) for i in range(size)]
            for size, side, n in ((thumbnail.height, side_y, rows), (thumbnail.width, side_x, columns))
        )
        cell = ops.on_device([i * columns + j for i in y for j in x], grid.device)
        sums = grid.new_zeros(len(grid), rows * columns).index_add(1, cell, grid)
        present = [crop - 1 for crop in tokens.layout.crops if crop > 0]
        sums = sums[:, ops.on_device(present, grid.device)]
        weights = ((sums - sums.amax(1, keepdim=True)) / self.temperature).exp()
        weights = weights / (weights.sum(1, keepdim=True) + 1e-8)
        weights = torch.ones_like(weights) if self.allocate == "even" else weights
        kept = (ratio * (1 + weights - weights.mean(1, keepdim=True))).clamp(max=1)
        if self.renormalise:
            mean = kept.mean(1, keepdim=True)
            kept = torch.where(mean.isclose(mean.new_tensor(ratio)), kept, (kept * ratio / mean).clamp(max=1))
        return kept

    def chosen(self, ranked: Tensor, tokens: VisualTokens, n_keep: int) -> Tensor:
        """The highest scores of thumbnail and crops, each by its share."""
        layout = tokens.layout
        if layout.n_crops == 1 and not self.faithful:
            return super().chosen(ranked, tokens, n_keep)
        if layout.crops[0] != 0:
            return top_by_crop(ranked, layout, ops.shares(layout.crop_sizes, n_keep, even=True))
        ratio = n_keep / layout.n_visual if self.ratio is None else self.ratio
        retention = self.retention(tokens, ratio) if layout.n_crops > 1 else ranked.new_zeros(len(ranked), 0)
        share = F.pad(retention, (1, 0), value=ratio) * ops.on_device(layout.crop_sizes, ranked.device)
        counts = share.long() if self.faithful else ops.allocate(share, layout.crop_sizes, n_keep)
        return top_by_crop(ranked, layout, counts)

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        """As `chosen`; faithfully also in the code's order."""
        out = super().select(tokens, n_keep)
        if not self.faithful:
            return out
        order, n = self.paper_order(out), tokens.n_visual
        places = torch.where(out.keep, torch.arange(n, device=order.device), n).sort(1).values
        moved = torch.cat([tokens.features, tokens.features[:, :1]], 1)  # one more row takes what is dropped
        moved = ops.put(moved, places, ops.take(tokens.features, order))
        return replace(out, features=moved[:, :-1])

    def paper_order(self, tokens: VisualTokens) -> Tensor:
        """(G, N): kept tokens in the order of the code's sequence, newlines left out; then the others."""
        key = ops.on_device(paper_places(tokens.layout), tokens.keep.device).double().expand(tokens.keep.shape)
        in_thumbnail = ops.on_device([p == 0 for p in tokens.layout.crop_places], key.device)
        rank = tokens.scores.argsort(dim=1, descending=True, stable=True).argsort(1)
        key = torch.where(in_thumbnail, rank.double() - 1e9, key)
        return key.masked_fill(~tokens.keep, torch.inf).argsort(dim=1, stable=True)

    def _own(self, tokens: VisualTokens) -> Tensor:
        """Scores of every token in its own crop, (G, N)."""
        if tokens.has(Kind.CLS_ROW):
            return tokens.signal(Kind.CLS_ROW, self.form)[:, 0]
        unit = F.normalize(tokens.features.float(), dim=-1)
        mean = F.normalize(_by_crop(tokens.features.float(), tokens.layout), dim=-1)
        return -(unit * mean).sum(-1)

    @staticmethod
    def _thumbnail_on_mosaic(own: Tensor, layout: Layout) -> Tensor:
        """The thumbnail's map, bilinear, where the tokens of crops lie, (G, N); its own tokens hold nothing of use."""
        thumbnail, mosaic = layout.regions
        grid = own[:, ops.on_device(thumbnail.index, own.device)].view(-1, 1, thumbnail.height, thumbnail.width)
        large = F.interpolate(grid, (mosaic.height, mosaic.width), mode="bilinear", align_corners=False).flatten(1)
        at = [layout.row[i] * mosaic.width + layout.column[i] if layout.crop[i] else 0 for i in layout.visual]
        return large[:, ops.on_device(at, own.device)]


def _by_crop(values: Tensor, layout: Layout) -> Tensor:
    """Sums over the crop of every token, at every token; values are (G, N) or (G, N, D)."""
    places = ops.on_device(layout.crop_places, values.device)
    sums = values.new_zeros(len(values), layout.n_crops, *values.shape[2:]).index_add(1, places, values)
    return sums[:, places]


def paper_places(layout: Layout) -> list[int]:
    """Where the code puts every token in its mosaic: place i of a crop's unpadded tokens is taken for patch i."""
    side, columns = layout.regions[0].width, layout.crop_grid[1]
    seen, places = dict.fromkeys(layout.crops, 0), []
    for i in layout.visual:
        crop = layout.crop[i]
        (down, right), (y, x) = divmod(max(crop - 1, 0), max(columns, 1)), divmod(seen[crop], side)
        places.append((down * side + y) * side * columns + right * side + x)
        seen[crop] += 1
    return places
