"""LLaVA-OneVision: SigLIP without [CLS], crops of any resolution that are made smaller together."""

from __future__ import annotations

from typing import ClassVar

from tokprune.core.layout import Layout

from .llava_next import LlavaNext


class LlavaOnevision(LlavaNext):
    """LlavaOnevisionForConditionalGeneration, pictures alone.

    A mosaic that is too large is interpolated by vLLM; signals are interpolated with it, so there the map from patches
    to tokens is ours, as in `tokprune.attach`.
    """

    towers: ClassVar = ("siglip_vision_model",)
    counted: ClassVar[bool] = False
    picture: ClassVar[str] = "of a picture that fills its crops"

    def merges_states(self, layout: Layout) -> bool:
        """Not where the mosaic is made smaller behind the projector."""
        rows, columns = (n * self.side for n in layout.crop_grid)
        is_smaller = layout.height < rows and layout.width < columns  # padding is cut from one side alone
        return not is_smaller and super().merges_states(layout)
