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
from tokprune.cost.shapes import VISION_FAMILIES, llava_shape
from tokprune.prune.supply import Supply, tower_kinds


class Llava:
    """LlavaForConditionalGeneration.

    Args:
        config: of transformers, as vLLM loads it.

    Attributes:
        modalities: that are pruned; others are refused.
        has_newlines: whether rows of pictures end with a newline token.
        positions: of kept tokens; those of the shorter prompt.
        picture: that `largest` is of, for the log.
    """

    towers: ClassVar = ("clip_vision_model", "siglip_vision_model")
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    has_newlines: ClassVar[bool] = False
    positions: ClassVar[str] = "contiguous"
    picture: ClassVar[str] = "a picture"

    def __init__(self, config: Any):
        self.config = config
        kind, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
        if kind not in self.towers:
            raise UnsupportedModelError(
                f"{kind!r} towers are not pruned in vLLM, only {', '.join(self.towers)}; use tokprune.attach with "
                "transformers"
            )
        if not self._has_cls and strategy == "default":
            raise UnsupportedModelError(
                "vision_feature_select_strategy='default' cuts off the first patch of a tower without [CLS] token; "
                'use --hf-overrides \'{"vision_feature_select_strategy": "full"}\''
            )

    @property
    def _has_cls(self) -> bool:
        return VISION_FAMILIES[self.config.vision_config.model_type] > 0

    @functools.cached_property
    def tower(self) -> Tower:
        """Depth of the vision tower, whether it has a [CLS] token, and whether merged states can be projected."""
        one_layer = isinstance(self.config.vision_feature_layer, int)
        return Tower(self.config.vision_config.num_hidden_layers, self._has_cls, one_layer)

    @functools.cached_property
    def supply(self) -> Supply:
        """What can be collected: no text, for a picture is encoded once for all questions about it."""
        return Supply(self.tower, tower_kinds(self.tower), planned=True, n_built=self.n_built)

    @functools.cached_property
    def shape(self) -> Shape | None:
        """What the ledger needs, or None for a model that it cannot count."""
        try:
            return llava_shape(self.config)
        except UnsupportedModelError:
            return None

    @property
    def facts(self) -> dict[str, Any]:
        """Kind and size of the model, as saved attachments note them."""
        text = self.config.text_config
        return {
            "model_type": self.config.model_type,
            "decoder_layers": text.num_hidden_layers,
            "decoder_width": text.hidden_size,
            "tower_layers": self.tower.n_layers,
            "tower_has_cls": self.tower.has_cls,
        }

    @property
    def n_built(self) -> int:
        """Vision layers that vLLM builds: those up to the last one that the model reads."""
        n_layers, read = self.tower.n_layers, self.config.vision_feature_layer
        indices = [read] if isinstance(read, int) else read
        return max(index if index >= 0 else n_layers + 1 + index for index in indices)

    @property
    def side(self) -> int:
        """Patches along a side of a crop."""
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size

    @property
    def n_leading(self) -> int:
        """Rows of a picture before those of patches: a [CLS] feature, or none."""
        return int(self._has_cls and self.config.vision_feature_select_strategy == "full")

    @property
    def largest(self) -> Layout:
        """Of a picture with the most tokens."""
        return grid_layout(self.side, self.side, self.n_leading)

    def layouts(self, items: Mapping[str, Any]) -> list[Layout]:
        """Where the rows of every picture lie.

        Args:
            items: what the processor made of the pictures.
        """
        return [self.largest] * len(items["pixel_values"])

    def crops_of(self, items: Mapping[str, Any]) -> list[int]:
        """Crops of every picture that the tower encodes."""
        return [1] * len(items["pixel_values"])

    def pack(self, items: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """Values of patches, (crops, patches, C), through the model's own packing: (N, C) a picture.

        Rows that show no patch hold NaN.
        """
        nowhere = values.new_full((self.n_leading, values.shape[-1]), torch.nan)
        return [torch.cat([nowhere, image]) for image in values]
