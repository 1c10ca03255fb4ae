"""LLaVA-NeXT-Video (model_type "llava_next_video"): LLaVA-NeXT, and videos whose frames are pooled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tokprune.core.layout import Layout, frames_layout
from tokprune.core.lazy import F

from .llava_next import LlavaNext
from .sizes import Sizes

if TYPE_CHECKING:
    from torch import Tensor


class LlavaNextVideo(LlavaNext):
    """LlavaNextVideoForConditionalGeneration.

    A video is one image whose crops are its frames, without a thumbnail. A token of a frame shows a block of patches; a
    signal of it is their mean, whichever pooling the model has.
    """

    model_type = "llava_next_video"
    oldest: ClassVar[str] = "5.23.0"
    encode_functions: ClassVar = {"get_image_features": "image_token_id", "get_video_features": "video_token_id"}

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """LLaVA-NeXT's, with videos."""
        return {**super().options(sizes), "video_token_index": sizes.video_id}

    def layouts(
        self, name: str, arguments: Mapping[str, Any], features: list[Tensor], runs: Sequence[int] = ()
    ) -> list[Layout]:
        """Of pictures as LLaVA-NeXT; of videos one pooled grid a frame."""
        if name == "get_image_features":
            return super().layouts(name, arguments, features, runs)
        n_videos, n_frames = arguments["pixel_values_videos"].shape[:2]
        side = self.side // self._stride
        return [frames_layout(n_frames, side, side)] * n_videos

    def pack(self, name: str, arguments: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """As LLaVA-NeXT, or the mean over the patches of a token; what the projector takes is pooled already."""
        if name == "get_image_features":
            return super().pack(name, arguments, values)
        if values.shape[1] == self.side**2:
            grids = values.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
            values = F.avg_pool2d(grids, self._stride).flatten(2).transpose(1, 2)
        return list(values.unflatten(0, (-1, arguments["pixel_values_videos"].shape[1])).flatten(1, 2))

    def crops_of(self, name: str, arguments: Mapping[str, Any], n_crops: int) -> list[int]:
        """Crops of pictures, frames of videos."""
        if name == "get_image_features":
            return super().crops_of(name, arguments, n_crops)
        n_frames = arguments["pixel_values_videos"].shape[1]
        return [n_frames] * (n_crops // n_frames)

    @property
    def _stride(self) -> int:
        return self.base.config.spatial_pool_stride
