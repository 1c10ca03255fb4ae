"""GLM-4.1V, and GLM-4.5V and 4.6V without experts (model_type "glm4v", "glm46v"): M-RoPE, frames between timestamps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from tokprune.cost.flops import Shape, Stack

from .. import compat
from .base import TowerKind
from .qwen2_vl import Qwen2VL
from .sizes import Sizes


class Glm4V(Qwen2VL):
    """Glm4vForConditionalGeneration.

    The frames of a video stand in prompts as placeholders of pictures, so transformers takes pictures or videos in a
    call, not both. Beams and several sequences of a prompt with several pictures come out wrong in transformers itself,
    which repeats every picture for the copies of a prompt, not the pictures of a prompt in turn.
    """

    model_type = "glm4v"
    takes_cells: ClassVar[bool] = False
    picture_processor: ClassVar[str] = ""
    patches_clips: ClassVar[bool] = False
    own_image_processor: ClassVar[tuple[str, str]] = ("glm4v", "Glm4vImageProcessor")
    encode_functions: ClassVar = {"get_image_features": "image_token_id", "get_video_features": "image_token_id"}
    towers: ClassVar = {"glm4v_vision": TowerKind("GLM-ViT", False)}
    partial_rotary: ClassVar[float] = 0.5  # the part of a head of the language model that is turned

    @classmethod
    def shape_of(cls, config: Any) -> Shape:
        """The merger folds patches by a convolution, then has one layer, and a gated MLP."""
        shape, vision = super().shape_of(config), config.vision_config
        folded, width = shape.projector[0], shape.projector[-1]
        widths = (folded, width, width, 2 * vision.intermediate_size, width)
        return replace(shape, projector=widths, gated_projector=True)

    @classmethod
    def tower_stack(cls, vision: Any) -> Stack:
        """A gated MLP, as wide as what the tower gives to the language model."""
        width, heads = vision.hidden_size, vision.num_heads
        return Stack(vision.depth, width, vision.out_hidden_size, heads, heads, width // heads, gated=True)

    @classmethod
    def tower_config(cls, sizes: Sizes) -> dict[str, Any]:
        """The MLP of the merger is as wide as `sizes` says of the tower's."""
        return {
            "hidden_size": sizes.tower.width,
            "intermediate_size": sizes.tower.mlp_width,
            "out_hidden_size": sizes.text.width,
            "image_size": sizes.side,
            **cls._tower_options(sizes),
        }

    @classmethod
    def text_config(cls, sizes: Sizes) -> dict[str, Any]:
        """With the sections of M-RoPE, of the part of a head that is turned."""
        half = int(sizes.text.head_dim * cls.partial_rotary) // 2
        sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
        rotary = compat.m_rope(sections)
        rotary["rope_parameters"]["partial_rotary_factor"] = cls.partial_rotary
        return sizes.text_arguments | rotary

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """Placeholders, and the tokens around a picture and a video."""
        first = min(sizes.image_id, sizes.video_id)
        around = {"image_start_token_id": first - 2, "image_end_token_id": first - 1}
        around |= {"video_start_token_id": first - 4, "video_end_token_id": first - 3}
        return {"image_token_id": sizes.image_id, "video_token_id": sizes.video_id, **around}


class Glm46V(Glm4V):
    """Glm46VForConditionalGeneration: the tower and the language model of GLM-4.1V."""

    model_type = "glm46v"

    @classmethod
    def text_config(cls, sizes: Sizes) -> dict[str, Any]:
        """GLM-4.1V's."""
        return {"model_type": "glm4v_text", **super().text_config(sizes)}

    @classmethod
    def tower_config(cls, sizes: Sizes) -> dict[str, Any]:
        """GLM-4.1V's."""
        return {"model_type": "glm4v_vision", **super().tower_config(sizes)}
