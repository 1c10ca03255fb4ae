"""InternVL in transformers' own form (model_type "internvl"): tiles, pixel shuffle, a thumbnail after its tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tokprune.core.errors import TokPruneError
from tokprune.core.layout import Layout, tiles_layout
from tokprune.core.lazy import nn
from tokprune.core.tiles import arranged
from tokprune.cost.flops import Shape
from tokprune.cost.shapes import internvl_shape

from .base import ModelFamily, TowerKind
from .sizes import Sizes, pil_image_processor

if TYPE_CHECKING:
    from torch import Tensor


class InternVL(ModelFamily):
    """InternVLForConditionalGeneration. A visual token shows as many patches as the pixel shuffle folds into it.

    A signal of a token is the mean over its patches. The model is told neither which tiles make up an image nor
    how they lie: the first is read off the runs of placeholders in the prompt, so tokens are selected when the
    language model runs; the second, and which tile is the thumbnail, off the pixels.
    """

    model_type = "internvl"
    picture_processor: ClassVar[str] = "InternVLProcessor"
    images_from_prompt: ClassVar[bool] = True
    one_patch_a_row: ClassVar[bool] = False
    towers: ClassVar = {"internvl_vision": TowerKind("InternViT", True)}

    @classmethod
    def shape_of(cls, config: Any) -> Shape:
        """Pixel shuffle, then a two-layer MLP."""
        return internvl_shape(config)

    @classmethod
    def tower_config(cls, sizes: Sizes) -> Any:
        """Sides in both directions."""
        side, patch = [sizes.side] * 2, [sizes.patch] * 2
        return sizes.tower_config(image_size=side, patch_size=patch, attention_bias=True)

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """Four patches a token, of the last layer without its [CLS] row."""
        return dict(
            image_token_id=sizes.image_id,
            image_seq_length=sizes.n_patches // 4,
            downsample_ratio=0.5,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        )

    @classmethod
    def image_processor(cls, config: Any) -> Any:
        """GOT-OCR2's, which cuts a picture into up to 12 tiles."""
        height, width = config.vision_config.image_size
        made = pil_image_processor("got_ocr2", "GotOcr2ImageProcessor")
        return made(size={"height": height, "width": width}, crop_to_patches=True, min_patches=1, max_patches=12)

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        """Layers of the vision tower."""
        return self.base.vision_tower.encoder.layer

    def attention_module(self, layer: int) -> nn.Module:
        """Self-attention of a layer; its queries and keys may be normalised."""
        return self.vision_layers[layer].attention

    def layouts(
        self, name: str, arguments: Mapping[str, Any], features: list[Tensor], runs: Sequence[int] = ()
    ) -> list[Layout]:
        """One a run of placeholders in the prompt."""
        n_tile = len(features[0])
        side = round(n_tile**0.5)
        if any(run % n_tile for run in runs):
            raise TokPruneError(
                f"the prompt has runs of {sorted(set(runs))} image placeholders, and a tile has {n_tile}; "
                "pass the prompt whole (without prefill_chunk_size), as the processor made it"
            )
        tiles = arguments["pixel_values"].split([run // n_tile for run in runs])
        return [tiles_layout(side, *place) for place in arranged(tiles)]

    def pack(self, name: str, arguments: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """Through `pixel_shuffle`, then the mean over the patches of a token."""
        side, channels = round(values.shape[1] ** 0.5), values.shape[-1]
        grid = values.unflatten(1, (side, side))
        folded = self.base.pixel_shuffle(grid, scale_factor=self.base.config.downsample_ratio)
        return list(folded.unflatten(-1, (-1, channels)).mean(-2).flatten(1, 2))
