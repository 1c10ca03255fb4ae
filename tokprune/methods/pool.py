"""The pooling control: a coarser grid of averaged tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from .. import ops
from ..types import Count, VisualTokens
from .base import Method


@dataclass(frozen=True)
class Pool(Method):
    """Average the grid of tokens down to the largest grid that fits the budget.

    The averages are written to the tokens nearest to the middles of their cells, in raster order.

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
        """Pool the features and keep one token a cell."""
        height, width = tokens.layout.height, tokens.layout.width
        rows, columns = ops.pool_grid(height, width, n_keep)
        pooled = ops.pool(tokens.features, height, width, rows, columns)
        middles = [
            (2 * i + 1) * height // (2 * rows) * width + (2 * j + 1) * width // (2 * columns)
            for i in range(rows)
            for j in range(columns)
        ]
        index = ops.on_device(middles, tokens.features.device).expand(len(pooled), -1)
        target = index[..., None].expand_as(pooled)
        return replace(tokens.keeping(index), features=tokens.features.scatter(1, target, pooled))
