"""Command A Vision and Aya Vision (model_type "cohere2_vision", "aya_vision"): a SigLIP tower, 2 x 2 patches folded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from tokprune.cost.flops import Shape

from .siglip import SiglipFamily
from .sizes import Sizes


class Cohere2Vision(SiglipFamily):
    """Cohere2VisionForConditionalGeneration. The sliding window of a layer counts the tokens that are kept."""

    model_type = "cohere2_vision"
    sliding_caches: ClassVar[bool] = True

    @classmethod
    def block_of(cls, config: Any) -> int:
        """Patches folded along a side."""
        return config.downsample_factor

    @classmethod
    def projector_of(cls, config: Any) -> tuple[tuple[int, ...], int]:
        """Two layers on folded patches; the inner width is the language model's unless it is named."""
        folded = config.vision_config.hidden_size * config.downsample_factor**2
        width = config.text_config.hidden_size
        return (folded, getattr(config, "alignment_intermediate_size", width), width), 1

    @classmethod
    def shape_of(cls, config: Any) -> Shape:
        """With a gated projector."""
        return replace(super().shape_of(config), gated_projector=True)

    @classmethod
    def text_config(cls, sizes: Sizes) -> Any:
        """Cohere 2, whose layers have windows."""
        return {"model_type": "cohere2", "sliding_window": 4096, **sizes.text_arguments}

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """2 x 2 patches a token."""
        named = {"image_token_id": sizes.image_id, "alignment_intermediate_size": sizes.text.width}
        return {**named, "downsample_factor": 2, "tie_word_embeddings": False}


class AyaVision(Cohere2Vision):
    """AyaVisionForConditionalGeneration."""

    model_type = "aya_vision"

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """2 x 2 patches a token, all rows of the last layer."""
        named = {"image_token_index": sizes.image_id, "downsample_factor": 2, "tie_word_embeddings": False}
        return {**named, "vision_feature_select_strategy": "full", "vision_feature_layer": -1}
