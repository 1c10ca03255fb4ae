"""ViP-LLaVA (model_type "vipllava"): LLaVA 1.5 whose projector reads several layers of a CLIP tower at once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from tokprune.core.signals import Tower
from tokprune.cost.flops import Shape
from tokprune.cost.shapes import text_of, vision_of

from .base import TowerKind
from .llava import Llava
from .sizes import Sizes

READ = (-2, -5, -8, -11, 6)  # layers of a tower of 24


class VipLlava(Llava):
    """VipLlavaForConditionalGeneration. The [CLS] row is always cut off."""

    model_type = "vipllava"
    oldest: ClassVar[str] = "5.18.0"
    towers: ClassVar = {"clip_vision_model": TowerKind("CLIP", True)}

    @classmethod
    def shape_of(cls, config: Any) -> Shape:
        """A two-layer MLP on all layers that are read."""
        vision, text = vision_of(config.vision_config), text_of(config.text_config)
        layers = config.vision_feature_layers
        n_read = 1 if isinstance(layers, int) else len(layers)
        widths = (vision.stack.width * n_read, text.width, text.width)
        n_patches = vision.n_patches
        return Shape(config.model_type, vision, widths, n_patches, n_patches, text, config.text_config.vocab_size)

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """The layers of the released models, or those that a smaller tower has of them."""
        found, n_layers = super().options(sizes), sizes.tower.n_layers
        del found["vision_feature_select_strategy"]
        read = [i for i in READ if -n_layers <= i < n_layers]
        del found["vision_feature_layer"]
        return {**found, "vision_feature_layers": read if len(read) > 1 else [-2, 1]}

    @functools.cached_property
    def tower(self) -> Tower:
        """Merged states are projected where one layer is read."""
        one_layer = isinstance(self.base.config.vision_feature_layers, int)
        return Tower(self.base.config.vision_config.num_hidden_layers, has_cls=True, projects_rows=one_layer)

    @property
    def read_layer(self) -> int:
        """The last one that is read."""
        layers = self.base.config.vision_feature_layers  # an older name, which releases of today understand
        layers = [layers] if isinstance(layers, int) else layers
        return max(i if i >= 0 else len(self.vision_layers) + 1 + i for i in layers) - 1

    def selection(self, arguments: Mapping[str, Any]) -> str:
        """Without the [CLS] row."""
        return "default"
