"""Qwen3-VL and its mixture of experts (model_type "qwen3_vl", "qwen3_vl_moe"): deepstack, frames between timestamps."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, ClassVar

from tokprune.core.signals import Decoder
from tokprune.cost.flops import Shape, Stack

from .. import compat
from .base import TowerKind
from .qwen2_vl import Qwen2VL
from .sizes import Sizes


class Qwen3VL(Qwen2VL):
    """Qwen3VLForConditionalGeneration.

    Features of earlier tower layers are added to the visual columns after the first decoder layers (deepstack). Those
    of dropped tokens are left out, and nothing is cut before these layers have run. Methods that merge
    tokens merge what enters the language model, not the added features: a merged token gets those of its place.
    """

    model_type = "qwen3_vl"
    picture_processor: ClassVar[str] = "Qwen3VLProcessor"
    patches_clips: ClassVar[bool] = False  # its frames stand between timestamps
    nested_encoders: ClassVar = {"get_video_features": "get_image_features"}
    visual_inputs: ClassVar = ("deepstack_visual_embeds",)
    visual_mask: ClassVar[str] = "visual_pos_masks"
    towers: ClassVar = {"qwen3_vl_vision": TowerKind("Qwen3-ViT", False), "qwen3_vl": TowerKind("Qwen3-ViT", False)}

    @functools.cached_property
    def decoder(self) -> Decoder:
        """Cuts come after the layers that get features of the tower."""
        return replace(super().decoder, first_cut=max(1, _n_added(self.base.config)))

    @classmethod
    def shape_of(cls, config: Any) -> Shape:
        """A merger for every layer of the tower that is read."""
        return replace(super().shape_of(config), n_projectors=1 + _n_added(config))

    @classmethod
    def tower_stack(cls, vision: Any) -> Stack:
        """A plain MLP."""
        width, heads = vision.hidden_size, vision.num_heads
        return Stack(vision.depth, width, vision.intermediate_size, heads, heads, width // heads, gated=False)

    @classmethod
    def tower_config(cls, sizes: Sizes) -> dict[str, Any]:
        """With features of the first three layers added, where the tower has as many."""
        stack = sizes.tower
        return {
            "hidden_size": stack.width,
            "intermediate_size": stack.mlp_width,
            "out_hidden_size": sizes.text.width,
            "num_position_embeddings": sizes.n_patches,
            "deepstack_visual_indexes": list(range(min(3, stack.n_layers - 1))),
            **cls._tower_options(sizes),
        }

    @classmethod
    def text_config(cls, sizes: Sizes) -> dict[str, Any]:
        """Head width and the sections of interleaved M-RoPE."""
        half = sizes.text.head_dim // 2
        sections = [half - 2 * (half // 4), half // 4, half // 4]
        return {**sizes.text_arguments, "head_dim": sizes.text.head_dim, **compat.m_rope(sections, interleaved=True)}


class Qwen3VLMoE(Qwen3VL):
    """Qwen3VLMoeForConditionalGeneration."""

    model_type = "qwen3_vl_moe"
    towers: ClassVar = {
        "qwen3_vl_moe_vision": TowerKind("Qwen3-ViT", False),
        "qwen3_vl_moe": TowerKind("Qwen3-ViT", False),
    }

    @classmethod
    def text_config(cls, sizes: Sizes) -> dict[str, Any]:
        """Four experts, two for every token."""
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": []}
        return {**super().text_config(sizes), **experts, "moe_intermediate_size": sizes.text.mlp_width // 2}


def _n_added(config: Any) -> int:
    """Layers of the tower whose features are added later."""
    return len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
