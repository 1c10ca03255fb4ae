"""PaliGemma (model_type "paligemma"): a picture and a prefix that see each other, a SigLIP tower, one patch a token."""

from __future__ import annotations

from typing import Any, ClassVar

from .siglip import SiglipFamily
from .sizes import Sizes


class PaliGemma(SiglipFamily):
    """PaliGemmaForConditionalGeneration. Positions start at 1."""

    model_type = "paligemma"
    first_position: ClassVar[int] = 1
    ready_masks: ClassVar[bool] = True
    column_types: ClassVar[str] = "token_type_ids"
    sliding_caches: ClassVar[bool] = True

    @classmethod
    def block_of(cls, config: Any) -> int:
        """One patch a token."""
        return 1

    @classmethod
    def projector_of(cls, config: Any) -> tuple[tuple[int, ...], int]:
        """One layer on every patch."""
        return (config.vision_config.hidden_size, config.text_config.hidden_size), 1

    @classmethod
    def tower_config(cls, sizes: Sizes) -> Any:
        """With the width that it is projected to."""
        return sizes.tower_config(projection_dim=sizes.text.width)

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """With the width that the tower is projected to."""
        return {**super().options(sizes), "projection_dim": sizes.text.width}
