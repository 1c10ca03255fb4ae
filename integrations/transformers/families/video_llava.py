"""Video-LLaVA (model_type "video_llava"): two CLIP towers, one for pictures and one for the frames of videos."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tokprune.core.layout import NO_PATCH, Layout, frames_layout
from tokprune.core.lazy import nn, torch

from .base import TowerKind
from .llava import Llava
from .sizes import Sizes

if TYPE_CHECKING:
    from torch import Tensor


class VideoLlava(Llava):
    """VideoLlavaForConditionalGeneration.

    A video is one image whose crops are its frames, without a thumbnail. Its frames come with their [CLS] rows, which
    stay with the video and count as special tokens. Both towers are read in the same way, each for its own kind.
    """

    model_type = "video_llava"
    oldest: ClassVar[str] = "5.23.0"
    encode_functions: ClassVar = {"get_image_features": "image_token_id", "get_video_features": "video_token_id"}
    towers: ClassVar = {"clip_vision_model": TowerKind("CLIP", True)}

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """LLaVA's, with videos."""
        return {**super().options(sizes), "video_token_index": sizes.video_id}

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        """Layers of the tower for pictures."""
        tower = self.base.image_tower
        return getattr(tower, "vision_model", tower).encoder.layers

    def tower_twins(self, module: nn.Module) -> list[nn.Module]:
        """The same module of the tower for videos, too; the projector is of both."""
        names = {id(part): name for name, part in self.base.image_tower.named_modules()}
        name = names.get(id(module))
        return [module] if name is None else [module, self.base.video_tower.get_submodule(name)]

    def selection(self, arguments: Mapping[str, Any]) -> str:
        """Of a video every row is used."""
        return "full" if "pixel_values_videos" in arguments else super().selection(arguments)

    def layouts(
        self, name: str, arguments: Mapping[str, Any], features: list[Tensor], runs: Sequence[int] = ()
    ) -> list[Layout]:
        """The raster of a picture; those of the frames of a video, a [CLS] row before each."""
        if name == "get_image_features":
            pixels = arguments.get("pixel_values", arguments.get("pixel_values_images"))  # the older name still works
            return super().layouts(name, {**arguments, "pixel_values": pixels}, features, runs)
        videos = arguments["pixel_values_videos"]
        patch = self.base.config.vision_config.patch_size
        n_videos, n_frames = videos.shape[:2]
        return [_with_cls_rows(n_frames, *(side // patch for side in videos.shape[-2:]))] * n_videos

    def pack(self, name: str, arguments: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """As they are; a [CLS] feature gets a row of its own."""
        packed = super().pack(name, arguments, values)
        if name == "get_image_features":
            return packed
        n_frames = arguments["pixel_values_videos"].shape[1]
        return list(torch.stack(packed).unflatten(0, (-1, n_frames)).flatten(1, 2))

    def crops_of(self, name: str, arguments: Mapping[str, Any], n_crops: int) -> list[int]:
        """Frames of videos."""
        if name == "get_image_features":
            return super().crops_of(name, arguments, n_crops)
        n_frames = arguments["pixel_values_videos"].shape[1]
        return [n_frames] * (n_crops // n_frames)

    def crop_patches(self, layout: Layout) -> int:
        """Of the picture, or of a frame of the video."""
        return layout.n_visual // max(layout.n_crops, 1)


@functools.lru_cache(maxsize=64)
def _with_cls_rows(n_frames: int, height: int, width: int) -> Layout:
    """Frames, each after a row that shows no patch."""
    plain, n = frames_layout(n_frames, height, width), height * width
    crop, row, column = [], [], []
    for start in range(0, n_frames * n, n):
        crop += [NO_PATCH, *plain.crop[start : start + n]]
        row += [-1, *plain.row[start : start + n]]
        column += [-1, *plain.column[start : start + n]]
    return Layout(tuple(crop), tuple(row), tuple(column), plain.crop_grid, is_video=True)
