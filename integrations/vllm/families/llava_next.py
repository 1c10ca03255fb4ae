"""LLaVA-NeXT: a thumbnail and crops of any resolution, unpadded, with newlines."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokprune.core.errors import UnsupportedModelError
from tokprune.core.layout import Layout
from tokprune.core.mosaic import coordinates, read_layout

from ..compat import anyres_grid, merge_crops
from .llava import Llava


class LlavaNext(Llava):
    """LlavaNextForConditionalGeneration; signals and coordinates go through vLLM's packing, with a newline of NaN."""

    has_newlines: ClassVar[bool] = True
    picture: ClassVar[str] = "of the largest picture"

    def __init__(self, config: Any):
        super().__init__(config)
        if self.n_leading:
            raise UnsupportedModelError(
                "vision_feature_select_strategy='full' leaves a [CLS] feature in every crop, which vLLM does not pack; "
                'use --hf-overrides \'{"vision_feature_select_strategy": "default"}\''
            )

    @property
    def largest(self) -> Layout:
        """Of the mosaics that a picture may be cut into, unpadded, the one with the most tokens."""
        sizes = [tuple(size) for size in self.config.image_grid_pinpoints]
        return max((self._layout(size) for size in sizes), key=lambda layout: layout.n_visual)

    def layouts(self, items: Mapping[str, Any]) -> list[Layout]:
        """From where the coordinates of patches come to lie; cached by the picture's size."""
        return [self._layout((int(height), int(width))) for height, width in items["image_sizes"].tolist()]

    def crops_of(self, items: Mapping[str, Any]) -> list[int]:
        """As the processor cut them, padding included."""
        return [len(crops) for crops in items["pixel_values"]]

    def pack(self, items: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """Through the model's own packing."""
        crops = values.split(self.crops_of(items))
        return [merge_crops(self.config, size, own) for size, own in zip(items["image_sizes"], crops, strict=True)]

    @functools.lru_cache(maxsize=256)  # noqa: B019 - a family lives as long as its server
    def _layout(self, size: tuple[int, int]) -> Layout:
        grid = anyres_grid(self.config, size)
        with torch.device("cpu"):  # vLLM builds models under the device of the worker
            packed = merge_crops(self.config, torch.tensor(size), coordinates(self.side, *grid))
        return read_layout(packed.tolist(), self.side, grid)
