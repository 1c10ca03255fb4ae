"""Gemma 3: 256 averaged tokens a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from tokprune.core.errors import UnsupportedModelError
from tokprune.core.layout import Layout, grid_layout
from tokprune.cost.flops import Shape
from tokprune.cost.shapes import gemma3_shape

from .base import Family


class Gemma3(Family):
    """Gemma3ForConditionalGeneration. A signal of a token is the mean over its patches.

    The tokens that stay see each other where vLLM lets all tokens of a picture do so: its ranges are those of the
    placeholders. The sliding window of a layer counts the tokens that are kept.
    """

    towers: ClassVar = ("siglip_vision_model",)

    @classmethod
    def shape_of(cls, config: Any) -> Shape:
        """One matrix, on averaged tokens."""
        return gemma3_shape(config)

    @property
    def side(self) -> int:
        """Tokens along a side of a picture."""
        return round(self.config.mm_tokens_per_image**0.5)

    @property
    def largest(self) -> Layout:
        """Of every picture."""
        return grid_layout(self.side, self.side)

    def layouts(self, items: Mapping[str, Any]) -> list[Layout]:
        """All alike.

        Raises:
            UnsupportedModelError: a picture was cut into crops.
        """
        counts = [int(n) for n in items["num_patches"]]
        if max(counts) > 1:
            raise UnsupportedModelError(
                "tokprune: a picture that pan and scan cuts into crops stands in several places of a prompt, which is "
                "not served where pictures are pruned; leave do_pan_and_scan out"
            )
        return [self.largest] * len(counts)

    def pack(self, items: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """The mean over the patches of a token."""
        side = round(values.shape[1] ** 0.5)
        block = side // self.side
        grid = values.unflatten(1, (self.side, block, self.side, block))
        return list(grid.mean((2, 4)).flatten(1, 2))
