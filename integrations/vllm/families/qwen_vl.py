"""Qwen2.5-VL and Qwen3-VL: pictures and videos of any size, M-RoPE; a tower whose attention is not read in vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tokprune.core.layout import Layout, frames_layout, grid_layout
from tokprune.core.signals import Tower
from tokprune.prune.supply import Supply

SIDE = 36  # tokens a side of the picture that budgets are checked on when a server starts


class QwenVL:
    """Qwen2_5_VLForConditionalGeneration, for methods without signals.

    Args:
        config: of transformers, as vLLM loads it.

    Attributes:
        modalities: that are pruned; others are refused.
        has_newlines: rows of pictures do not end with a newline token.
        n_leading: rows of a picture before those of patches.
        positions: kept tokens keep the places in the picture that they had.
        shape: FLOPs are not counted for a picture of any size here.
        picture: that `largest` is of, for the log.
    """

    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    has_newlines: ClassVar[bool] = False
    n_leading: ClassVar[int] = 0
    positions: ClassVar[str] = "original"
    shape: ClassVar[None] = None
    picture: ClassVar[str] = f"of a picture of {SIDE} x {SIDE} tokens"
    largest: ClassVar[Layout] = grid_layout(SIDE, SIDE)

    def __init__(self, config: Any):
        self.config = config
        vision = config.vision_config
        self.tower = Tower(vision.depth, has_cls=False, projects_rows=False)
        self.supply = Supply(self.tower, frozenset(), "is not read in vLLM", planned=True)

    @property
    def facts(self) -> dict[str, Any]:
        """Kind and size of the model, as saved attachments note them."""
        text = self.config.text_config
        return {
            "model_type": self.config.model_type,
            "decoder_layers": text.num_hidden_layers,
            "decoder_width": text.hidden_size,
            "tower_layers": self.tower.n_layers,
            "tower_has_cls": False,
        }

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
