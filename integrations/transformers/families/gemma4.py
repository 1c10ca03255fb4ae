"""Gemma 4 (model_type "gemma4"): pictures and frames of any shape in padded patches, averaged; layers with windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tokprune.core.layout import Layout, frames_layout, grid_layout
from tokprune.cost.flops import Shape

from .. import compat
from .base import ModelFamily, TowerKind
from .siglip import SiglipFamily
from .sizes import Sizes, pil_image_processor

if TYPE_CHECKING:
    from torch import Tensor

# Where every patch of a picture, or of a frame, lies: column and row, -1 for padding.
PLACES = {"get_image_features": "image_position_ids", "get_video_features": "video_position_ids"}


class Gemma4(SiglipFamily):
    """Gemma4ForConditionalGeneration. The sliding window of a layer counts the tokens that are kept.

    A visual token shows a block of k x k patches; a signal of it is their mean. A video has one budget for all its
    frames. Sound is left as it is. FLOPs are not counted: decoder layers differ in their heads, keys and inputs, and
    what the tower spends depends on padding that only the processor knows.
    """

    model_type = "gemma4"
    oldest: ClassVar[str] = "5.23.0"  # older ones give videos in another form
    encode_functions: ClassVar = {"get_image_features": "image_token_id", "get_video_features": "video_token_id"}
    towers: ClassVar = {"gemma4_vision": TowerKind("Gemma4-ViT", False)}
    ready_masks: ClassVar[bool] = True
    column_types: ClassVar[str] = "mm_token_type_ids"
    column_inputs: ClassVar = {"per_layer_inputs": 1}
    sliding_caches: ClassVar[bool] = True

    @classmethod
    def shape_of(cls, config: Any) -> Shape:
        """Not known."""
        return ModelFamily.shape_of.__func__(cls, config)  # type: ignore[attr-defined]

    @property
    def block(self) -> int:
        """Patches along a side of a token."""
        return self.base.config.vision_config.pooling_kernel_size

    def tower_heads(
        self, outputs: Mapping[str, Tensor], entered: Mapping[str, Any]
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Rotated, one picture or frame after the other, without padding."""
        module, valid = entered["module"], (entered["position_ids"] >= 0).all(-1)
        q, k = (compat.rotate_by_place(module, outputs[side], entered).transpose(1, 2) for side in ("q", "k"))
        k = k.repeat_interleave(module.num_key_value_groups, 1)
        for queries, keys, own in zip(q, k, valid, strict=True):
            yield queries[None, :, own], keys[None, :, own], module.scaling

    def tower_states(self, out: Tensor, entered: Mapping[str, Any]) -> Tensor:
        """Of all pictures and frames in one row, without padding."""
        return out[(entered["position_ids"] >= 0).all(-1)][None]

    def layouts(
        self, name: str, arguments: Mapping[str, Any], features: list[Tensor], runs: Sequence[int] = ()
    ) -> list[Layout]:
        """One raster a picture, one a frame of a video."""
        grids = [(h // self.block, w // self.block) for h, w in _grids(name, arguments)]
        if name == "get_image_features":
            return [grid_layout(*grid) for grid in grids]
        firsts, found = 0, []
        for n in arguments["num_frames_per_video"].tolist():
            found.append(frames_layout(n, *grids[firsts]))
            firsts += n
        return found

    def pack(self, name: str, arguments: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """The mean over the patches of a token, wherever the processor put them."""
        places = arguments[PLACES[name]].to(values.device)
        grids, packed = _grids(name, arguments), []
        parts = values[0].split([h * w for h, w in grids])
        for part, own, (_, w) in zip(parts, places, grids, strict=True):
            column, row = (own[(own >= 0).all(-1)] // self.block).unbind(-1)
            token = row * (w // self.block) + column
            total = part.new_zeros(len(part) // self.block**2, part.shape[-1]).index_add(0, token, part)
            packed.append(total / self.block**2)
        return packed

    @classmethod
    def tower_config(cls, sizes: Sizes) -> dict[str, Any]:
        """2 x 2 patches a token."""
        stack = sizes.tower
        return {
            "model_type": "gemma4_vision",
            "hidden_size": stack.width,
            "intermediate_size": stack.mlp_width,
            "num_hidden_layers": stack.n_layers,
            "num_attention_heads": stack.n_heads,
            "num_key_value_heads": stack.n_kv_heads,
            "head_dim": stack.head_dim,
            "patch_size": sizes.patch,
            "pooling_kernel_size": 2,
            **sizes.tower_options,
        }

    @classmethod
    def text_config(cls, sizes: Sizes) -> dict[str, Any]:
        """Every other layer with a window, the last one without; pictures see themselves there."""
        text = sizes.text
        kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(text.n_layers - 1)] + ["full_attention"]
        heads = {"head_dim": text.head_dim, "global_head_dim": text.head_dim}
        more = {"hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision", "sliding_window": 4096}
        return {"model_type": "gemma4_text", "layer_types": kinds, **heads, **more, **sizes.text_arguments}

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """Placeholders; no sound."""
        first = min(sizes.image_id, sizes.video_id)
        ids = {"image_token_id": sizes.image_id, "video_token_id": sizes.video_id, "audio_token_id": first - 3}
        around = {"boi_token_id": first - 2, "eoi_token_id": first - 1}
        tied = sizes.text_options.get("tie_word_embeddings", True)
        return {**ids, **around, "audio_config": None, "tie_word_embeddings": tied}

    @classmethod
    def image_processor(cls, config: Any) -> Any:
        """Gemma 4's: any shape, up to 280 tokens."""
        vision = config.vision_config
        made = pil_image_processor("gemma4", "Gemma4ImageProcessor")
        return made(patch_size=vision.patch_size, pooling_kernel_size=vision.pooling_kernel_size)


def _grids(name: str, arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Rows and columns of patches of every picture or frame."""
    return [(y + 1, x + 1) for x, y in arguments[PLACES[name]].amax(1).tolist()]
