"""Qwen2-VL and Qwen2.5-VL (model_type "qwen2_vl", "qwen2_5_vl"): pictures of any size, videos, M-RoPE."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from tokprune.core.layout import Layout, frames_layout, grid_layout
from tokprune.core.lazy import F, nn, torch
from tokprune.core.signals import Tower
from tokprune.cost.flops import Shape, Stack, Vision
from tokprune.cost.shapes import text_of

from .. import compat
from .base import ModelFamily, TowerKind
from .sizes import Sizes, pil_image_processor

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE_SIDE = (
    1008  # pixels a side of the picture that the ledger's shape is of; any other size is counted by its own
)

# Keywords of a tower with an entry a patch.
BY_PATCH = ("hidden_states", "position_ids", "interp_indices", "interp_weights")


class Qwen2VL(ModelFamily):
    """Qwen2VLForConditionalGeneration. A visual token shows 2 x 2 patches; a signal of it is their mean.

    Packed space is the raster of tokens of a picture, or those of a video frame by frame (the tower joins two frames to
    one). Positions are places in the picture and the time, so kept tokens keep theirs.
    """

    model_type = "qwen2_vl"
    oldest: ClassVar[str] = "5.18.0"
    picture_processor: ClassVar[str] = "Qwen2VLProcessor"
    patches_clips: ClassVar[bool] = True
    own_image_processor: ClassVar[tuple[str, str]] = ("qwen2_vl", "Qwen2VLImageProcessor")  # its module and its class
    m_rope: ClassVar[bool] = True
    default_positions: ClassVar[str] = "original"
    one_patch_a_row: ClassVar[bool] = False
    takes_cells: ClassVar[bool] = True
    encode_functions: ClassVar = {"get_image_features": "image_token_id", "get_video_features": "video_token_id"}
    # transformers 4 gives the tower's configuration the name of the model.
    towers: ClassVar = {"qwen2_vl_vision": TowerKind("Qwen2-ViT", False), "qwen2_vl": TowerKind("Qwen2-ViT", False)}

    # ---- the ledger

    @classmethod
    def shape_of(cls, config: Any) -> Shape:
        """Blocks over all patches of a picture, then a two-layer MLP on groups of patches."""
        vision, text = config.vision_config, text_of(config.text_config)
        side, folds = vision.patch_size * vision.spatial_merge_size, vision.spatial_merge_size**2
        n_patches = (REFERENCE_SIDE // side) ** 2 * folds
        stack = cls.tower_stack(vision)
        tower = Vision(stack, n_patches, 0, cls.patch_values(vision))
        widths = (stack.width * folds, stack.width * folds, text.width)
        n_rows = n_patches // folds
        vocabulary = config.text_config.vocab_size
        shape = Shape(config.model_type, tower, widths, n_rows, n_rows, text, vocabulary, any_size=True)
        frames = getattr(vision, "temporal_patch_size", 1)
        return replace(shape, token_side=side, frames_a_step=frames, takes_cells=cls.takes_cells)

    @classmethod
    def tower_stack(cls, vision: Any) -> Stack:
        """Layers of the tower."""
        width, heads = vision.embed_dim, vision.num_heads
        return Stack(vision.depth, width, round(width * vision.mlp_ratio), heads, heads, width // heads, gated=False)

    @classmethod
    def patch_values(cls, vision: Any) -> int:
        """Pixel values of a patch, which shows two frames of a video."""
        return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2

    def crop_patches(self, layout: Layout) -> int:
        """Of the picture, or of a frame of the video."""
        return layout.n_visual // max(layout.n_crops, 1) * self.merge**2

    # ---- the vision tower

    @property
    def merge(self) -> int:
        """Patches along a side of a token."""
        return self.base.config.vision_config.spatial_merge_size

    @functools.cached_property
    def tower(self) -> Tower:
        """Depth of the vision tower; no [CLS] token, and no row is a single patch."""
        return Tower(self.base.config.vision_config.depth, has_cls=False, projects_rows=False)

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        """Blocks of the vision tower."""
        return self.base.visual.blocks

    def attention_module(self, layer: int) -> nn.Module:
        """Has one projection for queries, keys and values."""
        return self.vision_layers[layer].attn

    @property
    def read_layer(self) -> int:
        """The last one."""
        return len(self.vision_layers) - 1

    @property
    def projector(self) -> nn.Module:
        """From groups of patches to rows for the language model."""
        return self.base.visual.merger

    def tower_projections(self, layer: int) -> tuple[nn.Module, dict[str, nn.Module]]:
        """Queries, keys and values at once."""
        module = self.attention_module(layer)
        return module, {"qkv": module.qkv}

    def tower_heads(
        self, outputs: Mapping[str, Tensor], entered: Mapping[str, Any]
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Rotated, one segment (a picture, a frame, or a window) after the other."""
        module = entered["module"]
        q, k, _ = outputs["qkv"].unflatten(-1, (3, module.num_heads, -1)).unbind(1)
        yield from self.segments(module, q, k, entered)

    def segments(
        self, module: Any, q: Tensor, k: Tensor, entered: Mapping[str, Any]
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Queries and keys (patches, H, d), rotated and split into what attends to itself."""
        q, k = compat.rotate_vision(module, q, k, entered)
        lengths = entered["cu_seqlens"].diff().tolist()
        pairs = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k)), strict=True)
        yield from ((a, b, module.scaling) for a, b in pairs)

    @property
    def cell_tower(self) -> nn.Module:
        """The tower with its merger."""
        return self.base.visual

    def tower_part(self, args: tuple, kwargs: dict, keep: Tensor, index: Tensor) -> tuple[tuple, dict]:
        """Patches with their own rotary and learned positions; segments and windows as long as what stays of them."""
        named = {**dict(zip(("hidden_states", "grid_thw"), args, strict=False)), **kwargs}
        ready = compat.vision_inputs(self.cell_tower, named["grid_thw"])
        known = (*ready, "hidden_states")
        ready |= {name: given for name, given in named.items() if name in known and given is not None}
        by_patch = {name: ready[name] for name in BY_PATCH if name in ready}
        rows = (index[:, None] * self.merge**2 + torch.arange(self.merge**2, device=index.device)).flatten()
        short = {name: values[rows.to(values.device)] for name, values in by_patch.items()}
        short["cu_seqlens"] = self._ends(ready["cu_seqlens"], keep)
        if "window_index" in ready:
            order = ready["window_index"].to(keep.device)
            short["cu_window_seqlens"] = self._ends(ready["cu_window_seqlens"], keep[order])
            short["window_index"] = order.argsort()[index].argsort()
        return (), {**named, **short}

    def _ends(self, ends: Tensor, keep: Tensor) -> Tensor:
        """Where segments of the tower end, from 0 on, in the patches that stay; empty ones are left out."""
        n_before = F.pad(keep.cumsum(0), (1, 0))
        kept = n_before[ends.to(keep.device) // self.merge**2] * self.merge**2
        return torch.unique_consecutive(kept).to(ends)

    # ---- pictures

    def cells(self, name: str, arguments: Mapping[str, Any]) -> Tensor:
        """The patches of a token follow each other."""
        patches = arguments["pixel_values_videos" if name == "get_video_features" else "pixel_values"]
        return patches.unflatten(0, (-1, self.merge**2)).flatten(1)

    def layouts(
        self, name: str, arguments: Mapping[str, Any], features: list[Tensor], runs: Sequence[int] = ()
    ) -> list[Layout]:
        """One raster a picture, one a frame of a video."""
        grids = [(t, h // self.merge, w // self.merge) for t, h, w in _grids(name, arguments)]
        if name == "get_video_features":
            return [frames_layout(*grid) for grid in grids]
        return [grid_layout(h, w) for _, h, w in grids]

    def pack(self, name: str, arguments: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """The mean over the patches of a token."""
        grids = _grids(name, arguments)
        tokens = values[0].unflatten(0, (-1, self.merge**2)).mean(1)
        order = self.token_order(torch.tensor(grids))
        tokens = tokens if order is None else tokens[order.to(tokens.device)]
        return list(tokens.split([t * h * w // self.merge**2 for t, h, w in grids]))

    def token_order(self, grids: Tensor) -> Tensor | None:
        """Where the tower has the tokens of pictures of these grids, (n, 3); None where they are in order."""
        return None

    def merges_states(self, layout: Layout) -> bool:
        """Never: a row is made of several patches."""
        return False

    def crops_of(self, name: str, arguments: Mapping[str, Any], n_crops: int) -> list[int]:
        """Pictures and frames."""
        return [t if name == "get_video_features" else 1 for t, _, _ in _grids(name, arguments)]

    def selection(self, arguments: Mapping[str, Any]) -> str:
        """Every row is a token."""
        return "full"

    # ---- building one

    @classmethod
    def tower_config(cls, sizes: Sizes) -> dict[str, Any]:
        """Of a width, and its ratio to that of the MLP."""
        stack = sizes.tower
        return {
            **cls._tower_options(sizes),
            "embed_dim": stack.width,
            "hidden_size": sizes.text.width,
            "mlp_ratio": max(1, round(stack.mlp_width / stack.width)),
        }

    @classmethod
    def _tower_options(cls, sizes: Sizes) -> dict[str, Any]:
        options = {"depth": sizes.tower.n_layers, "num_heads": sizes.tower.n_heads, "patch_size": sizes.patch}
        return {**options, "spatial_merge_size": 2, "temporal_patch_size": 2, **sizes.tower_options}

    @classmethod
    def text_config(cls, sizes: Sizes) -> dict[str, Any]:
        """With the sections of M-RoPE."""
        half = sizes.text.head_dim // 2
        sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
        return sizes.text_arguments | compat.m_rope(sections)

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """Placeholders, and the tokens around a picture."""
        first = min(sizes.image_id, sizes.video_id)
        ids = {"vision_start_token_id": first - 2, "vision_end_token_id": first - 1}
        return {"image_token_id": sizes.image_id, "video_token_id": sizes.video_id, **ids}

    @classmethod
    def image_processor(cls, config: Any) -> Any:
        """The family's own: any size, in whole tokens."""
        vision = config.vision_config
        return pil_image_processor(*cls.own_image_processor)(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
        )


class Qwen25VL(Qwen2VL):
    """Qwen2_5_VLForConditionalGeneration. Most tower layers attend within windows; signals come from the others."""

    model_type = "qwen2_5_vl"
    picture_processor: ClassVar[str] = "Qwen2_5_VLProcessor"
    towers: ClassVar = {
        "qwen2_5_vl_vision": TowerKind("Qwen2.5-ViT", False),
        "qwen2_5_vl": TowerKind("Qwen2.5-ViT", False),
    }

    @classmethod
    def tower_stack(cls, vision: Any) -> Stack:
        """A gated MLP, and windows in all but a few layers."""
        width, heads = vision.hidden_size, vision.num_heads
        stack = Stack(vision.depth, width, vision.intermediate_size, heads, heads, width // heads, gated=True)
        window = (vision.window_size // vision.patch_size) ** 2
        return replace(stack, n_windowed=vision.depth - len(vision.fullatt_block_indexes), window=window)

    @functools.cached_property
    def tower(self) -> Tower:
        """Received attention is comparable over the picture only in layers without windows."""
        return replace(super().tower, full_layers=tuple(self.base.config.vision_config.fullatt_block_indexes))

    def token_order(self, grids: Tensor) -> Tensor:
        """The tower sorts tokens by window."""
        return torch.argsort(compat.window_index(self.base.visual, grids))

    @classmethod
    def tower_config(cls, sizes: Sizes) -> dict[str, Any]:
        """With windows of 2 x 2 tokens where nothing else is said, and every other layer without."""
        stack = sizes.tower
        return {
            "window_size": 4 * sizes.patch,
            "fullatt_block_indexes": list(range(1, stack.n_layers, 2)),
            "tokens_per_second": 2,
            "hidden_size": stack.width,
            "intermediate_size": stack.mlp_width,
            "out_hidden_size": sizes.text.width,
            **cls._tower_options(sizes),
        }


def _grids(name: str, arguments: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Frames, rows and columns of patches of every picture or video."""
    found = arguments["video_grid_thw" if name == "get_video_features" else "image_grid_thw"]
    return [tuple(grid) for grid in found.tolist()]
