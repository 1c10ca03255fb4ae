"""What families share that read the last layer of a SigLIP tower, one picture of a fixed size at a time."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tokprune.core.layout import Layout, grid_layout
from tokprune.core.signals import Tower
from tokprune.cost.flops import Shape
from tokprune.cost.shapes import text_of, vision_of

from .base import ModelFamily, TowerKind
from .sizes import Sizes, pil_image_processor

if TYPE_CHECKING:
    from torch import Tensor


class SiglipFamily(ModelFamily):
    """A visual token shows a block of k x k patches, in raster order; a signal of it is their mean.

    Where a processor cuts a picture into crops, every crop is an image of its own with a budget of its own: the model
    is not told which of them belong together.
    """

    oldest: ClassVar[str] = "5.18.0"
    one_patch_a_row: ClassVar[bool] = False
    towers: ClassVar = {"siglip_vision_model": TowerKind("SigLIP", False)}
    no_layer_cuts: ClassVar[str] = "its decoder layers take masks and caches of several kinds"

    @classmethod
    def block_of(cls, config: Any) -> int:
        """Patches along a side of a token."""
        raise NotImplementedError

    @classmethod
    def projector_of(cls, config: Any) -> tuple[tuple[int, ...], int]:
        """Widths of the projector for the ledger, and rows that it runs on for a token."""
        raise NotImplementedError

    @classmethod
    def shape_of(cls, config: Any) -> Shape:
        """The tower, and the projector on tokens."""
        vision, text = vision_of(config.vision_config), text_of(config.text_config)
        widths, rows_a_token = cls.projector_of(config)
        n_visual = vision.n_patches // cls.block_of(config) ** 2
        vocabulary = config.text_config.vocab_size
        return Shape(config.model_type, vision, widths, n_visual * rows_a_token, n_visual, text, vocabulary)

    @functools.cached_property
    def tower(self) -> Tower:
        """No [CLS] token."""
        return Tower(self.base.config.vision_config.num_hidden_layers, False, self.one_patch_a_row)

    @property
    def read_layer(self) -> int:
        """The last one."""
        return len(self.vision_layers) - 1

    def selection(self, arguments: Mapping[str, Any]) -> str:
        """Every row is a patch."""
        return "full"

    def layouts(
        self, name: str, arguments: Mapping[str, Any], features: list[Tensor], runs: Sequence[int] = ()
    ) -> list[Layout]:
        """A square of tokens a picture."""
        side = round(len(features[0]) ** 0.5)
        return [grid_layout(side, side)] * len(features)

    def pack(self, name: str, arguments: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """The mean over the patches of a token."""
        block = self.block_of(self.base.config)
        side = round(values.shape[1] ** 0.5)
        grid = values.unflatten(1, (side // block, block, side // block, block))
        return list(grid.mean((2, 4)).flatten(1, 2))

    @classmethod
    def image_processor(cls, config: Any) -> Any:
        """SigLIP's, for one size."""
        side = config.vision_config.image_size
        return pil_image_processor("siglip", "SiglipImageProcessor")(size={"height": side, "width": side})

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """The placeholder."""
        return {"image_token_index": sizes.image_id}
