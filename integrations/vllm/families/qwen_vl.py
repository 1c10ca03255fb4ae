"""Qwen2.5-VL and Qwen3-VL: pictures and videos of any size, M-RoPE; a tower whose attention is not read in vLLM."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from tokprune.core.layout import Layout, frames_layout, grid_layout
from tokprune.core.signals import Tower
from tokprune.prune.supply import Supply

from .base import Family

SIDE = 36  # tokens a side of the picture that budgets are checked on when a server starts


class QwenVL(Family):
    """Qwen2_5_VLForConditionalGeneration, for methods without signals.

    Kept tokens keep the places in the picture that they had. FLOPs are not counted for a picture of any size here.
    """

    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    counted: ClassVar[bool] = True
    positions: ClassVar[str] = "original"
    picture: ClassVar[str] = f"of a picture of {SIDE} x {SIDE} tokens"

    @functools.cached_property
    def tower(self) -> Tower:
        """No [CLS] token; several patches a token."""
        return Tower(self.config.vision_config.depth, has_cls=False, projects_rows=False)

    @functools.cached_property
    def supply(self) -> Supply:
        """Nothing from the tower."""
        return Supply(self.tower, frozenset(), "is not read in vLLM", planned=True)

    @property
    def largest(self) -> Layout:
        """Of the picture that budgets are checked on."""
        return grid_layout(SIDE, SIDE)

    def layouts(self, items: Mapping[str, Any]) -> list[Layout]:
        """One raster a picture; then those of videos, one a step.

        Args:
            items: what the processor made of the pictures and videos.
        """
        merge = self.config.vision_config.spatial_merge_size
        pictures, videos = (
            [] if (grids := items.get(f"{modality}_grid_thw")) is None else grids.tolist()
            for modality in ("image", "video")
        )
        found = [grid_layout(h // merge, w // merge) for _, h, w in pictures]
        return found + [frames_layout(steps, h // merge, w // merge) for steps, h, w in videos]


class Qwen3VL(QwenVL):
    """Qwen3VLForConditionalGeneration: frames of a video stand between timestamps, which vLLM sends with their rows."""

    modalities: ClassVar[tuple[str, ...]] = ("image",)
