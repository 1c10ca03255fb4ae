"""InternVL in transformers' own form: tiles and a thumbnail, four patches a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokprune.core.errors import UnsupportedModelError
from tokprune.core.layout import Layout, tiles_layout
from tokprune.core.tiles import arranged
from tokprune.cost.flops import Shape
from tokprune.cost.shapes import internvl_shape

from ..compat import fold_patches
from .base import Family

TILES = "tokprune_tiles"  # rows and columns of tiles, and which tile is the thumbnail


class InternVL(Family):
    """InternVLForConditionalGeneration. A signal of a token is the mean over its patches.

    How the tiles of a picture lie is read off their pixels, once, by the process that takes requests.
    """

    towers: ClassVar = ("internvl_vision",)
    picture: ClassVar[str] = "of a picture of 12 tiles and a thumbnail"
    notes: ClassVar[tuple[str, ...]] = (TILES,)

    def __init__(self, config: Any):
        super().__init__(config)
        read = (config.vision_feature_layer, config.vision_feature_select_strategy)
        if read != (-1, "default"):
            raise UnsupportedModelError(
                f"vision_feature_layer={read[0]} with vision_feature_select_strategy={read[1]!r} is not what vLLM "
                'reads: the last layer without [CLS]; use --hf-overrides \'{"vision_feature_layer": -1, '
                '"vision_feature_select_strategy": "default"}\''
            )

    @classmethod
    def shape_of(cls, config: Any) -> Shape:
        """Pixel shuffle, then a two-layer MLP."""
        return internvl_shape(config)

    @property
    def side(self) -> int:
        """Tokens along a side of a tile."""
        vision = self.config.vision_config
        return round(vision.image_size[0] // vision.patch_size[0] * self.config.downsample_ratio)

    @property
    def largest(self) -> Layout:
        """Of a picture with as many tiles as released models cut."""
        return tiles_layout(self.side, (3, 4), 12)

    def noted(self, items: Mapping[str, Any], info: Any) -> dict[str, Tensor]:
        """How tiles lie."""
        tiles = items["pixel_values"].split(items["image_num_patches"].tolist())
        return {TILES: torch.tensor([(*grid, thumbnail) for grid, thumbnail in arranged(tiles)])}

    def layouts(self, items: Mapping[str, Any]) -> list[Layout]:
        """One a picture, over all its tiles."""
        places = torch.stack(list(items[TILES])).tolist()
        return [tiles_layout(self.side, (rows, columns), thumbnail) for rows, columns, thumbnail in places]

    def crops_of(self, items: Mapping[str, Any]) -> list[int]:
        """Tiles and the thumbnail."""
        return [int(n) for n in items["image_num_patches"]]

    def pack(self, items: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """Through the model's pixel shuffle, then the mean over the patches of a token: (N, C) a tile."""
        side, channels = round(values.shape[1] ** 0.5), values.shape[-1]
        folded = fold_patches(values.unflatten(1, (side, side)), self.config.downsample_ratio)
        return list(folded.unflatten(-1, (-1, channels)).mean(-2).flatten(1, 2))
