"""LLaVA 1.5: one crop a picture, a CLIP or SigLIP tower, a per-token MLP."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokprune.core.errors import UnsupportedModelError
from tokprune.core.layout import Layout, grid_layout
from tokprune.core.signals import Tower
from tokprune.cost.flops import Shape
from tokprune.cost.shapes import llava_shape

from .base import Family, deepest


class Llava(Family):
    """LlavaForConditionalGeneration."""

    towers: ClassVar = ("clip_vision_model", "siglip_vision_model")
    counted: ClassVar[bool] = True

    def __init__(self, config: Any):
        super().__init__(config)
        if not self.has_cls and config.vision_feature_select_strategy == "default":
            raise UnsupportedModelError(
                "vision_feature_select_strategy='default' cuts off the first patch of a tower without [CLS] token; "
                'use --hf-overrides \'{"vision_feature_select_strategy": "full"}\''
            )

    @functools.cached_property
    def tower(self) -> Tower:
        """Depth of the vision tower, whether it has a [CLS] token, and whether merged states can be projected."""
        one_layer = isinstance(self.config.vision_feature_layer, int)
        return Tower(self.config.vision_config.num_hidden_layers, self.has_cls, one_layer)

    @classmethod
    def shape_of(cls, config: Any) -> Shape:
        """A two-layer MLP on every row of the tower that is read."""
        return llava_shape(config)

    @property
    def n_built(self) -> int:
        """Vision layers that vLLM builds: those up to the last one that the model reads."""
        return deepest(self.config)

    @property
    def side(self) -> int:
        """Patches along a side of a crop."""
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size

    @property
    def n_leading(self) -> int:  # type: ignore[override]
        """A [CLS] feature, or none."""
        return int(self.has_cls and self.config.vision_feature_select_strategy == "full")

    @property
    def largest(self) -> Layout:
        """Of every picture."""
        return grid_layout(self.side, self.side, self.n_leading)

    def layouts(self, items: Mapping[str, Any]) -> list[Layout]:
        """All alike."""
        return [self.largest] * len(items["pixel_values"])

    def pack(self, items: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """As they are; a [CLS] feature gets a row of its own."""
        nowhere = values.new_full((self.n_leading, values.shape[-1]), torch.nan)
        return [torch.cat([nowhere, image]) for image in values]
