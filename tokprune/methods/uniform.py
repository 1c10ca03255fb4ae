"""The uniform control: tokens spread evenly over the picture."""

from __future__ import annotations

from dataclasses import dataclass

from ..core import ops
from ..core.tokens import VisualTokens
from .base import Method, Split


@dataclass(frozen=True)
class Uniform(Method):
    """Keep exactly the budget, spread evenly in two dimensions.

    Rows are evenly spaced and share the budget; within a row the tokens are evenly spaced. A stride over the
    raster would fall on the same columns again and again. A thumbnail and the mosaic of the crops share the budget
    by their sizes, or, with split="even", thumbnail and crops evenly.

    Source:   a control; no paper.
    Faithful: nothing to be faithful to.
    Differs:  from the one-dimensional stride that some comparisons call uniform.
    Needs:    nothing. Text-agnostic. Cost: none on the device.

    Args:
        split: "joint" spreads over the thumbnail and over the mosaic by their sizes, "even" by their crops.
    """

    split: Split = "joint"

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        layout = tokens.layout
        regions, sizes = layout.regions, [len(region.index) for region in layout.regions]
        n_crops = [len({layout.crop[i] for i in region.index}) for region in regions]
        by_crop = ops.shares(layout.crop_sizes, n_keep, even=True)
        even = [sum(by_crop[: n_crops[0]]), sum(by_crop[n_crops[0] :])]
        shares = even if self.split == "even" else ops.shares(tuple(sizes), n_keep)
        cells = []
        for region, share in zip(regions, shares, strict=False):
            cells += [region.index[i] for i in ops.spread(region.height, region.width, share)] if share else []
        index = ops.on_device(cells, tokens.features.device)
        return tokens.keeping(index.expand(len(tokens.features), -1))
