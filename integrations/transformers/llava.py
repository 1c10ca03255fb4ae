"""LLaVA 1.5 and its kin (model_type "llava"): one crop an image, a CLIP or SigLIP tower, a per-token MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from tokprune.errors import UnsupportedModelError
from tokprune.types import Layout, grid_layout

from .base import ModelAdapter, TowerKind


class Llava(ModelAdapter):
    """LlavaForConditionalGeneration. Packed space is the tower's raster of patches, one to one."""

    towers: ClassVar = {"clip_vision_model": TowerKind("CLIP", True), "siglip_vision_model": TowerKind("SigLIP", False)}

    def __init__(self, model: nn.Module):
        super().__init__(model)
        kind = self.base.config.vision_config.model_type
        if kind not in self.towers:
            raise UnsupportedModelError(
                f"the 'llava' adapter knows the towers {', '.join(self.towers)}; this model has {kind!r}, "
                "which packs its pictures differently"
            )

    def attention_module(self, layer: int) -> nn.Module:
        """Self-attention of a layer; transformers 4 nests the tower once more."""
        tower = self.base.vision_tower
        return getattr(tower, "vision_model", tower).encoder.layers[layer].self_attn

    def layouts(self, arguments: Mapping[str, Any], features: list[Tensor]) -> list[Layout]:
        """The raster of patches; with feature selection "full", CLIP's [CLS] feature comes first."""
        patch = self.base.config.vision_config.patch_size
        height, width = (side // patch for side in arguments["pixel_values"].shape[-2:])
        strategy = arguments.get("vision_feature_select_strategy")
        strategy = strategy or self.base.config.vision_feature_select_strategy
        layout = grid_layout(height, width, n_leading=int(self.tower.has_cls and strategy == "full"))
        if any(len(f) != len(layout.crop) for f in features):
            raise UnsupportedModelError(
                f"the tower gave {len(features[0])} rows for {height} x {width} patches; a tower without [CLS] token "
                "needs vision_feature_select_strategy='full' (with 'default' its first patch is cut off)"
            )
        return [layout] * len(features)

    def crop_patches(self, layout: Layout) -> int:
        """The crop is the picture."""
        return layout.n_visual
