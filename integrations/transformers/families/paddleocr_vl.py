"""PaddleOCR-VL (model_type "paddleocr_vl"): pictures of any size, M-RoPE, a projector that folds 2 x 2 patches."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tokprune.core.lazy import nn
from tokprune.core.signals import Tower
from tokprune.cost.flops import Stack

from .base import TowerKind
from .qwen2_vl import Qwen2VL
from .sizes import Sizes, pil_image_processor

if TYPE_CHECKING:
    from torch import Tensor


class PaddleOCRVL(Qwen2VL):
    """PaddleOCRVLForConditionalGeneration. The tower has patches in raster order, and tokens are folded after it."""

    model_type = "paddleocr_vl"
    takes_cells: ClassVar[bool] = False
    picture_processor: ClassVar[str] = ""
    patches_clips: ClassVar[bool] = False
    encode_functions: ClassVar = {"get_image_features": "image_token_id"}
    towers: ClassVar = {"paddleocr_vl_vision": TowerKind("PaddleOCR-ViT", False)}

    @classmethod
    def tower_stack(cls, vision: Any) -> Stack:
        """A plain MLP."""
        width, heads = vision.hidden_size, vision.num_attention_heads
        layers = vision.num_hidden_layers
        return Stack(layers, width, vision.intermediate_size, heads, heads, width // heads, gated=False)

    @classmethod
    def patch_values(cls, vision: Any) -> int:
        """Of one frame."""
        return vision.num_channels * vision.patch_size**2

    @functools.cached_property
    def tower(self) -> Tower:
        """No [CLS] token, and no row is a single patch."""
        return Tower(self.base.config.vision_config.num_hidden_layers, has_cls=False, projects_rows=False)

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        """Layers of the vision tower."""
        return self.base.visual.vision_model.encoder.layers

    def attention_module(self, layer: int) -> nn.Module:
        """Has projections for queries and for keys."""
        return self.vision_layers[layer].self_attn

    @property
    def projector(self) -> nn.Module:
        """Folds patches and projects them."""
        return self.base.projector

    def tower_projections(self, layer: int) -> tuple[nn.Module, dict[str, nn.Module]]:
        """Queries and keys."""
        module = self.attention_module(layer)
        return module, {"q": module.q_proj, "k": module.k_proj}

    def tower_heads(
        self, outputs: Mapping[str, Tensor], entered: Mapping[str, Any]
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Rotated, one picture after the other."""
        module = entered["module"]
        q, k = (outputs[side].unflatten(-1, (module.num_heads, -1)) for side in ("q", "k"))
        yield from self.segments(module, q, k, entered)

    def pack(self, name: str, arguments: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """The mean over the 2 x 2 patches of a token."""
        merge, grids = self.merge, arguments["image_grid_thw"].tolist()
        packed = []
        for part, (t, h, w) in zip(values[0].split([t * h * w for t, h, w in grids]), grids, strict=True):
            blocks = part.unflatten(0, (t, h // merge, merge, w // merge, merge))
            packed.append(blocks.mean((2, 4)).flatten(0, 2))
        return packed

    @classmethod
    def tower_config(cls, sizes: Sizes) -> dict[str, Any]:
        """A SigLIP tower's sizes."""
        stack = sizes.tower
        return {
            "hidden_size": stack.width,
            "intermediate_size": stack.mlp_width,
            "num_hidden_layers": stack.n_layers,
            "num_attention_heads": stack.n_heads,
            "image_size": sizes.side,
            "patch_size": sizes.patch,
            "spatial_merge_size": 2,
            **sizes.tower_options,
        }

    @classmethod
    def text_config(cls, sizes: Sizes) -> dict[str, Any]:
        """Head width and the sections of M-RoPE."""
        return {**super().text_config(sizes), "head_dim": sizes.text.head_dim}

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """Qwen2-VL's, with an LM head of its own where the language model is told to have one."""
        return {**super().options(sizes), "tie_word_embeddings": sizes.text_options.get("tie_word_embeddings", True)}

    @classmethod
    def image_processor(cls, config: Any) -> Any:
        """Any size, in whole tokens, from 144 tokens on with patches of 14 pixels."""
        vision = config.vision_config
        made = pil_image_processor("paddleocr_vl", "PaddleOCRVLImageProcessor")
        return made(patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)
