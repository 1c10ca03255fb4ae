"""LLaVA-NeXT (model_type "llava_next"): a thumbnail and crops of any resolution, unpadded, with newlines."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokprune.core.layout import Layout
from tokprune.core.lazy import torch
from tokprune.core.mosaic import coordinates, read_layout

from ..compat import anyres_grid, n_anyres_crops, pack_image_features
from .llava import Llava
from .sizes import Sizes, pil_image_processor

if TYPE_CHECKING:
    from torch import Tensor


class LlavaNext(Llava):
    """LlavaNextForConditionalGeneration. Packed space is the thumbnail, then the unpadded mosaic, one to one.

    Signals and coordinates go through the model's own `pack_image_features`, a newline of NaN with them.
    """

    model_type = "llava_next"

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """LLaVA's, with the grids of crops."""
        return {**super().options(sizes), "image_grid_pinpoints": [list(grid) for grid in sizes.grids]}

    @classmethod
    def image_processor(cls, config: Any) -> Any:
        """LLaVA-NeXT's."""
        side = config.vision_config.image_size
        crop = {"height": side, "width": side}
        made = pil_image_processor("llava_next", "LlavaNextImageProcessor")
        return made(size={"shortest_edge": side}, crop_size=crop, image_grid_pinpoints=config.image_grid_pinpoints)

    def layouts(
        self, name: str, arguments: Mapping[str, Any], features: list[Tensor], runs: Sequence[int] = ()
    ) -> list[Layout]:
        """From where the coordinates of patches come to lie; cached by the image's size."""
        tiled = self.tiled(arguments)
        ratio = self._aspect_ratio(arguments)
        return [self._layout(tuple(s), t, ratio) for s, t in zip(self._sizes(arguments), tiled, strict=True)]

    def pack(self, name: str, arguments: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """Through `pack_image_features`."""
        crops = values.split(self.crops_of(name, arguments, len(values)))
        return self._pack(list(crops), arguments["image_sizes"], self._aspect_ratio(arguments))

    def crops_of(self, name: str, arguments: Mapping[str, Any], n_crops: int) -> list[int]:
        """As the model counts them from the image's size."""
        pairs = zip(self._sizes(arguments), self.tiled(arguments), strict=True)
        return [self._n_crops(tuple(size)) if tiled else 1 for size, tiled in pairs]

    def tiled(self, arguments: Mapping[str, Any]) -> list[bool]:
        """Whether each image is cut into crops."""
        return [True] * len(arguments["image_sizes"])

    def crop_patches(self, layout: Layout) -> None:
        """Crops have the size of the configuration."""
        return None

    @property
    def side(self) -> int:
        """Patches along a side of a crop."""
        vision = self.base.config.vision_config
        return vision.image_size // vision.patch_size

    def _sizes(self, arguments: Mapping[str, Any]) -> list[list[int]]:
        sizes = arguments["image_sizes"]
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else [list(size) for size in sizes]

    def _aspect_ratio(self, arguments: Mapping[str, Any]) -> str | None:
        return None

    def _n_crops(self, size: tuple[int, int]) -> int:
        return n_anyres_crops(self.base, size)

    def _pack(self, crops: list[Tensor], sizes: Any, aspect_ratio: str | None) -> list[Tensor]:
        newline = crops[0].new_full((crops[0].shape[-1],), torch.nan)
        return pack_image_features(self.base, crops, sizes, newline, aspect_ratio)

    @functools.lru_cache(maxsize=256)  # noqa: B019 - an family lives as long as its attachment
    def _layout(self, size: tuple[int, int], tiled: bool, aspect_ratio: str | None) -> Layout:
        side = self.side
        grid = anyres_grid(self.base, size) if tiled else (0, 0)
        packed = self._pack([coordinates(side, *grid)], torch.tensor([size]), aspect_ratio)[0]
        return read_layout(packed.tolist(), side, grid)
