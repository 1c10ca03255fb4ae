"""LLaVA-OneVision (model_type "llava_onevision"): SigLIP without [CLS], crops made smaller together, videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tokprune.core.layout import Layout, frames_layout

from .base import TowerKind
from .llava_next import LlavaNext
from .sizes import Sizes, pil_image_processor

if TYPE_CHECKING:
    from torch import Tensor


class LlavaOnevision(LlavaNext):
    """LlavaOnevisionForConditionalGeneration.

    A mosaic that is too large is interpolated by the model; signals are interpolated with it, so there the map
    from patches to tokens is ours, and the crop of a token is the one that its middle lies in. Several images in
    a prompt are not cut into crops. A video is one image whose crops are its frames, without a thumbnail.
    """

    model_type = "llava_onevision"
    picture_processor: ClassVar[str] = "LlavaOnevisionProcessor"
    towers: ClassVar = {"siglip_vision_model": TowerKind("SigLIP", False)}
    encode_functions: ClassVar = {"get_image_features": "image_token_id", "get_video_features": "video_token_id"}

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """All rows of the last layer, videos, and mosaics of up to nine crops."""
        found = {**super().options(sizes), "video_token_index": sizes.video_id, "vision_aspect_ratio": "anyres_max_9"}
        del found["image_seq_length"]
        return found

    @classmethod
    def image_processor(cls, config: Any) -> Any:
        """LLaVA-OneVision's."""
        side = config.vision_config.image_size
        made = pil_image_processor("llava_onevision", "LlavaOnevisionImageProcessor")
        return made(size={"height": side, "width": side}, image_grid_pinpoints=config.image_grid_pinpoints)

    def layouts(
        self, name: str, arguments: Mapping[str, Any], features: list[Tensor], runs: Sequence[int] = ()
    ) -> list[Layout]:
        """Of images as LLaVA-NeXT; of videos one pooled grid a frame."""
        if name == "get_image_features":
            return super().layouts(name, arguments, features, runs)
        n_frames, side = _video(arguments).shape[1], -(-self.side // 2)
        return [frames_layout(n_frames, side, side, len(f) - n_frames * side * side) for f in features]

    def pack(self, name: str, arguments: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """Through `pack_image_features`, or the pooling of video frames."""
        if name == "get_image_features":
            return super().pack(name, arguments, values)
        n_frames = _video(arguments).shape[1]
        return list(self.base.apply_pooling(values).unflatten(0, (-1, n_frames)).flatten(1, 2))

    def crops_of(self, name: str, arguments: Mapping[str, Any], n_crops: int) -> list[int]:
        """Crops of images, frames of videos."""
        if name == "get_image_features":
            return super().crops_of(name, arguments, n_crops)
        n_frames = _video(arguments).shape[1]
        return [n_frames] * (n_crops // n_frames)

    def merges_states(self, layout: Layout) -> bool:
        """Not where the model pools or interpolates after its projector: videos, and mosaics that it makes smaller."""
        rows, columns = (n * self.side for n in layout.crop_grid)
        is_smaller = layout.height < rows and layout.width < columns  # padding is cut from one side alone
        return 0 in layout.crops and not is_smaller and super().merges_states(layout)

    def tiled(self, arguments: Mapping[str, Any]) -> list[bool]:
        """Images that share a prompt are not cut into crops, where the processor says so."""
        counts = arguments.get("batch_num_images")
        if counts is None:
            return super().tiled(arguments)
        return [n == 1 for n in map(int, counts) for _ in range(n)]

    def _aspect_ratio(self, arguments: Mapping[str, Any]) -> str:
        return arguments.get("vision_aspect_ratio") or self.base.config.vision_aspect_ratio


def _video(arguments: Mapping[str, Any]) -> Tensor:
    """(videos, frames, 3, H, W); transformers 4 gives it another name."""
    return arguments.get("pixel_values_videos", arguments.get("pixel_values"))
