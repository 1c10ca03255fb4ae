"""DeepSeek-VL (model_type "deepseek_vl"): a SigLIP tower, one patch a token, a two-layer MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from tokprune.core.lazy import nn

from .siglip import SiglipFamily
from .sizes import Sizes, pil_image_processor


class DeepSeekVL(SiglipFamily):
    """DeepseekVLForConditionalGeneration. Packed space is the tower's raster of patches, one to one."""

    model_type = "deepseek_vl"
    one_patch_a_row: ClassVar[bool] = True
    no_layer_cuts: ClassVar[str] = ""

    @classmethod
    def block_of(cls, config: Any) -> int:
        """One patch a token."""
        return 1

    @classmethod
    def projector_of(cls, config: Any) -> tuple[tuple[int, ...], int]:
        """Two layers on every patch."""
        width = config.text_config.hidden_size
        return (config.vision_config.hidden_size, width, width), 1

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        """Layers of the vision tower; releases differ in how it is nested."""
        tower = self.base.vision_model
        return getattr(tower, "vision_model", tower).encoder.layers

    @property
    def projector(self) -> nn.Module:
        """From the tower's last states."""
        return self.base.aligner

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """The placeholder, and an LM head of its own where the language model is told to have one."""
        tied = sizes.text_options.get("tie_word_embeddings", True)
        return {"image_token_id": sizes.image_id, "tie_word_embeddings": tied}

    @classmethod
    def image_processor(cls, config: Any) -> Any:
        """DeepSeek-VL's, which pads a picture to a square."""
        side = config.vision_config.image_size
        return pil_image_processor("deepseek_vl", "DeepseekVLImageProcessor")(size={"height": side, "width": side})
