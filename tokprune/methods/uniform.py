"""The uniform control: tokens spread evenly over the picture."""

from __future__ import annotations

from dataclasses import dataclass

from .. import ops
from ..types import VisualTokens
from .base import Method


@dataclass(frozen=True)
class Uniform(Method):
    """Keep exactly the budget, spread evenly in two dimensions.

    Rows are evenly spaced and share the budget; within a row the tokens are evenly spaced. A stride over the
    raster would fall on the same columns again and again.

    Source:   a control; no paper.
    Faithful: nothing to be faithful to.
    Differs:  from the one-dimensional stride that some comparisons call uniform.
    Needs:    nothing. Text-agnostic. Cost: none on the device.
    """

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        """The same cells in every image of a layout."""
        cells = ops.spread(tokens.layout.height, tokens.layout.width, n_keep)
        index = ops.on_device(cells, tokens.features.device)
        return tokens.keeping(index.expand(len(tokens.features), -1))
