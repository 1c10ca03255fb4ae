"""The pooling control: a coarser grid of averaged tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..core import ops
from ..core.layout import Region
from ..core.lazy import torch
from ..core.tokens import Count, VisualTokens
from .base import Method


@dataclass(frozen=True)
class Pool(Method):
    """Average the grid of tokens down to the largest grid that fits the budget.

    The averages are written to the tokens nearest to the middles of their cells, in raster order. A thumbnail and
    the mosaic of the crops share the budget by their sizes.

    Source:   a control; no paper.
    Faithful: nothing to be faithful to.
    Differs:  averages after the projector; before it differs slightly, because of the projector's GELU.
    Needs:    nothing. Text-agnostic. Cost: O(N D).
    """

    keeps_features: ClassVar[bool] = False

    @property
    def count(self) -> Count:
        """A grid may fall short of the budget."""
        return Count.AT_MOST

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        regions, features, kept = tokens.layout.regions, tokens.features, []
        shares = ops.shares(tuple(len(region.index) for region in regions), n_keep)
        for region, share in zip(regions, shares, strict=True):
            if not share:
                continue
            rows, columns = ops.pool_grid(region.height, region.width, share)
            index = ops.on_device(region.index, features.device)
            pooled = ops.pool(tokens.features[:, index], region.height, region.width, rows, columns)
            at = ops.on_device([region.index[i] for i in _middles(region, rows, columns)], features.device)
            features = features.index_copy(1, at, pooled)
            kept.append(at)
        index = torch.cat(kept).expand(len(features), -1)
        return replace(tokens.keeping(index), features=features)


def _middles(region: Region, rows: int, columns: int) -> list[int]:
    """The cells nearest to the middles of a coarser grid's, as raster indices."""
    height, width = region.height, region.width
    return [
        (2 * i + 1) * height // (2 * rows) * width + (2 * j + 1) * width // (2 * columns)
        for i in range(rows)
        for j in range(columns)
    ]
