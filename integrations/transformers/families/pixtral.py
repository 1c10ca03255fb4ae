"""Mistral 3, and LLaVA with a Pixtral tower (model_type "mistral3", "llava"): pictures of any size in one sequence."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from tokprune.core.errors import UnsupportedModelError
from tokprune.core.layout import Layout, grid_layout
from tokprune.core.lazy import nn, torch
from tokprune.core.signals import Tower
from tokprune.cost.flops import Shape, Stack, Vision
from tokprune.cost.shapes import text_of

from .. import compat
from .base import ModelFamily, TowerKind
from .qwen2_vl import REFERENCE_SIDE
from .sizes import Sizes, pil_image_processor

if TYPE_CHECKING:
    from torch import Tensor


class PixtralFamily(ModelFamily):
    """A visual token shows a block of k x k patches, in raster order; a signal of it is their mean.

    The tower reads all pictures of a call as one sequence in which each sees itself alone. The ledger counts them one
    by one, without what the mask between them hides. Placeholders of a picture are broken by a token of text behind
    every row.
    """

    oldest: ClassVar[str] = "5.18.0"
    towers: ClassVar = {"pixtral": TowerKind("Pixtral", False)}

    @classmethod
    def block_of(cls, config: Any) -> int:
        """Patches along a side of a token."""
        raise NotImplementedError

    @classmethod
    def projector_of(cls, config: Any) -> tuple[int, ...]:
        """Widths of the projector, which runs on tokens."""
        raise NotImplementedError

    # ---- the ledger

    @classmethod
    def shape_of(cls, config: Any) -> Shape:
        """Blocks over all patches of a picture, then the projector on its tokens."""
        vision, text = config.vision_config, text_of(config.text_config)
        block = cls.block_of(config)
        n_tokens = (REFERENCE_SIDE // (vision.patch_size * block)) ** 2
        width, heads = vision.hidden_size, vision.num_attention_heads
        stack = Stack(vision.num_hidden_layers, width, vision.intermediate_size, heads, heads, width // heads)
        tower = Vision(stack, n_tokens * block**2, 0, vision.num_channels * vision.patch_size**2)
        widths, vocabulary = cls.projector_of(config), config.text_config.vocab_size
        side = vision.patch_size * block
        shape = Shape(config.model_type, tower, widths, n_tokens, n_tokens, text, vocabulary, any_size=True)
        return replace(shape, token_side=side)

    def crop_patches(self, layout: Layout) -> int:
        """Of the picture."""
        return layout.n_visual * self.block_of(self.base.config) ** 2

    # ---- the vision tower

    @functools.cached_property
    def tower(self) -> Tower:
        """No [CLS] token."""
        config = self.base.config
        one_layer = isinstance(config.vision_feature_layer, int)
        return Tower(config.vision_config.num_hidden_layers, False, self.one_patch_a_row and one_layer)

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        """Layers of the vision tower."""
        return self.base.vision_tower.transformer.layers

    def attention_module(self, layer: int) -> nn.Module:
        """Has q_proj and k_proj; positions and the mask are its keywords."""
        return self.vision_layers[layer].attention

    def tower_heads(
        self, outputs: Mapping[str, Tensor], entered: Mapping[str, Any]
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Rotated, one picture after the other."""
        module = entered["module"]
        q, k = (outputs[side].unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for side in ("q", "k"))
        q, k = compat.rotate_pixtral(module, q, k, entered)
        lengths = compat.segments_of_pixtral(entered)
        yield from ((a, b, module.scaling) for a, b in zip(q.split(lengths, 2), k.split(lengths, 2), strict=True))

    def selection(self, arguments: Mapping[str, Any]) -> str:
        """Every row is a patch."""
        return "full"

    # ---- pictures

    def layouts(
        self, name: str, arguments: Mapping[str, Any], features: list[Tensor], runs: Sequence[Any] = ()
    ) -> list[Layout]:
        """One raster a picture."""
        block = self.block_of(self.base.config)
        return [grid_layout(height // block, width // block) for height, width in self._grids(arguments)]

    def pack(self, name: str, arguments: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """The mean over the patches of a token; rows and columns that do not fill one are left out, as by the model."""
        block, grids = self.block_of(self.base.config), self._grids(arguments)
        found = []
        for own, (height, width) in zip(values[0].split([h * w for h, w in grids]), grids, strict=True):
            rows, columns = height // block, width // block
            grid = own.unflatten(0, (height, width))[: rows * block, : columns * block]
            found.append(grid.unflatten(1, (columns, block)).unflatten(0, (rows, block)).mean((1, 3)).flatten(0, 1))
        return found

    def _grids(self, arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of patches of every picture; without sizes all are as large as their pixels."""
        patch, sizes = self.base.config.vision_config.patch_size, arguments.get("image_sizes")
        if sizes is None:
            pixels = arguments["pixel_values"]
            sizes = [pixels.shape[-2:]] * len(pixels)
        sizes = sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
        return [(int(height) // patch, int(width) // patch) for height, width in sizes]

    # ---- building one

    @classmethod
    def text_config(cls, sizes: Sizes) -> Any:
        """Without a sliding window, as in released models."""
        options = {"sliding_window": None, "head_dim": sizes.text.head_dim, **sizes.text_arguments}
        from transformers import AutoConfig

        return AutoConfig.for_model(sizes.text_type, **options)

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """All rows of the last layer."""
        return {"image_token_index": sizes.image_id, "vision_feature_layer": -1, "tie_word_embeddings": False}

    @classmethod
    def image_processor(cls, config: Any) -> Any:
        """Pixtral's: any size, in whole tokens."""
        vision = config.vision_config
        patch = vision.patch_size * cls.block_of(config)
        made = pil_image_processor("pixtral", "PixtralImageProcessor")
        return made(patch_size={"height": patch, "width": patch}, size={"longest_edge": vision.image_size})


class Mistral3(PixtralFamily):
    """Mistral3ForConditionalGeneration. A visual token shows 2 x 2 patches, which the projector merges."""

    model_type = "mistral3"
    one_patch_a_row: ClassVar[bool] = False

    @classmethod
    def block_of(cls, config: Any) -> int:
        """Patches merged along a side."""
        return config.spatial_merge_size

    @classmethod
    def projector_of(cls, config: Any) -> tuple[int, ...]:
        """Patches are merged to one of their width, then two layers."""
        width, text = config.vision_config.hidden_size, config.text_config.hidden_size
        return width * config.spatial_merge_size**2, width, text, text

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """2 x 2 patches a token."""
        return {**super().options(sizes), "spatial_merge_size": 2}


class LlavaPixtral(PixtralFamily):
    """LlavaForConditionalGeneration with a Pixtral tower, as in Pixtral 12B. A visual token is a patch."""

    model_type = "llava"

    @classmethod
    def block_of(cls, config: Any) -> int:
        """One patch a token."""
        return 1

    @classmethod
    def projector_of(cls, config: Any) -> tuple[int, ...]:
        """Two layers on what is read of the tower."""
        layers = config.vision_feature_layer
        n_read = 1 if isinstance(layers, int) else len(layers)
        return config.vision_config.hidden_size * n_read, config.text_config.hidden_size, config.text_config.hidden_size

    def __init__(self, model: nn.Module):
        super().__init__(model)
        if self.base.config.vision_feature_select_strategy != "full":
            raise UnsupportedModelError(
                "a Pixtral tower has no [CLS] token, and feature selection 'default' cuts a patch off; "
                "set config.vision_feature_select_strategy = 'full'"
            )

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """All patches."""
        return {**super().options(sizes), "vision_feature_select_strategy": "full"}
