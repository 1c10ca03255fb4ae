"""LLaVA 1.5 and its kin (model_type "llava"): one crop an image, a CLIP or SigLIP tower, a per-token MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tokprune.core.errors import UnsupportedModelError
from tokprune.core.layout import Layout, grid_layout
from tokprune.core.lazy import torch
from tokprune.cost.flops import Shape
from tokprune.cost.shapes import llava_shape

from .base import ModelFamily, TowerKind
from .sizes import Sizes, pil_image_processor

if TYPE_CHECKING:
    from torch import Tensor


class Llava(ModelFamily):
    """LlavaForConditionalGeneration. Packed space is the tower's raster of patches, one to one."""

    towers: ClassVar = {"clip_vision_model": TowerKind("CLIP", True), "siglip_vision_model": TowerKind("SigLIP", False)}

    model_type = "llava"

    @classmethod
    def shape_of(cls, config: Any) -> Shape:
        """A two-layer MLP on every row of the tower that is read."""
        return llava_shape(config)

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """The last layer but one of a CLIP tower without its [CLS] row, or all of a SigLIP tower."""
        has_cls = cls.towers[sizes.tower_type].has_cls
        return dict(
            image_token_index=sizes.image_id,
            image_seq_length=sizes.n_patches,
            vision_feature_layer=-2 if has_cls else -1,
            vision_feature_select_strategy="default" if has_cls else "full",
        )

    @classmethod
    def image_processor(cls, config: Any) -> Any:
        """CLIP's."""
        side = config.vision_config.image_size
        crop = {"height": side, "width": side}
        return pil_image_processor("clip", "CLIPImageProcessor")(size={"shortest_edge": side}, crop_size=crop)

    def layouts(
        self, name: str, arguments: Mapping[str, Any], features: list[Tensor], runs: Sequence[int] = ()
    ) -> list[Layout]:
        """The raster of patches; with feature selection "full", CLIP's [CLS] feature comes first."""
        patch = self.base.config.vision_config.patch_size
        height, width = (side // patch for side in arguments["pixel_values"].shape[-2:])
        layout = grid_layout(height, width, n_leading=self._n_leading(arguments))
        if any(len(f) != len(layout.crop) for f in features):
            raise UnsupportedModelError(
                f"the tower gave {len(features[0])} rows for {height} x {width} patches; a tower without [CLS] token "
                "needs vision_feature_select_strategy='full' (with 'default' its first patch is cut off)"
            )
        return [layout] * len(features)

    def pack(self, name: str, arguments: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """As they are; a [CLS] feature gets a row of its own."""
        nowhere = values.new_full((self._n_leading(arguments), values.shape[-1]), torch.nan)
        return [torch.cat([nowhere, image]) for image in values]

    def crop_patches(self, layout: Layout) -> int:
        """The crop is the picture."""
        return layout.n_visual

    def _n_leading(self, arguments: Mapping[str, Any]) -> int:
        return int(self.tower.has_cls and self.selection(arguments) == "full")
