"""Idefics 3 and SmolVLM (model_type "idefics3", "smolvlm"): square crops, then their thumbnail, and pixel shuffle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tokprune.core.errors import TokPruneError, UnsupportedModelError
from tokprune.core.layout import Layout, tiles_layout
from tokprune.core.lazy import nn, torch

from .base import TowerKind
from .siglip import SiglipFamily
from .sizes import Sizes, pil_image_processor

if TYPE_CHECKING:
    from torch import Tensor


class Idefics3(SiglipFamily):
    """Idefics3ForConditionalGeneration. A picture is one image with one budget over its crops.

    The model is given crops and is not told which of them make up a picture: that is read off the prompt, where every
    crop is a run of placeholders between tokens of its own. So tokens are selected when the language model runs. In a
    prompt without these tokens every run is an image.
    """

    model_type = "idefics3"
    language_model_name: ClassVar[str] = "text_model"
    images_from_prompt: ClassVar[bool] = True
    joins_runs: ClassVar[bool] = True
    no_layer_cuts: ClassVar[str] = ""
    towers: ClassVar = {"idefics3_vision": TowerKind("SigLIP", False)}

    @classmethod
    def block_of(cls, config: Any) -> int:
        """Patches folded along a side by the pixel shuffle."""
        return config.scale_factor

    @classmethod
    def projector_of(cls, config: Any) -> tuple[tuple[int, ...], int]:
        """One matrix on folded patches."""
        return (config.vision_config.hidden_size * config.scale_factor**2, config.text_config.hidden_size), 1

    def crop_patches(self, layout: Layout) -> int:
        """Of the crops that the processor made."""
        return layout.n_visual // layout.n_crops * self.block_of(self.base.config) ** 2

    # ---- the vision tower

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        """Layers of the vision tower."""
        return self.base.vision_model.encoder.layers

    @property
    def projector(self) -> nn.Module:
        """Pixel shuffle and projection."""
        return self.base.connector

    def tower_heads(
        self, outputs: Mapping[str, Tensor], entered: Mapping[str, Any]
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """As they are.

        Raises:
            UnsupportedModelError: parts of a crop are masked.
        """
        mask = entered.get("attention_mask")
        if mask is not None and not bool((mask if mask.dtype == torch.bool or mask.ndim == 2 else mask == 0).all()):
            raise UnsupportedModelError(
                "pixel_attention_mask hides parts of a crop, and scores of the vision tower would count them; let the "
                "processor resize crops (do_resize=True), or use a method that reads nothing of the tower"
            )
        yield from super().tower_heads(outputs, entered)

    # ---- pictures

    def images_in(self, ids: Sequence[int], runs: Sequence[range]) -> list[tuple[int, Any]]:
        """A picture ends with its thumbnail; told is the grid of the crops before it, and the placeholders of all.

        A crop is <fake> <its row and column> placeholders, a thumbnail <fake> <global> placeholders <fake>, and behind
        the crops of a row is a newline. The last run of a prompt is a thumbnail, which tells what the tokens are.
        """
        around = _around(ids, runs)
        found, crops = [], 0
        for i, (tag, _) in enumerate(around):
            if tag != around[-1][0]:
                crops += 1
                continue
            n_rows = sum(ends_row for _, ends_row in around[i - crops : i])
            grid = (n_rows, crops // n_rows) if n_rows and crops % n_rows == 0 else (min(crops, 1), crops)
            found.append((crops + 1, (grid, sum(map(len, runs[i - crops : i + 1])))))
            crops = 0
        return found

    def pieces(self, name: str, arguments: Mapping[str, Any], features: list[Tensor]) -> list[Tensor]:
        """Crops; the model has those of a row of the batch in one entry."""
        return list(torch.cat(features).split(self._side(arguments) ** 2))

    def layouts(
        self, name: str, arguments: Mapping[str, Any], features: list[Tensor], runs: Sequence[Any] = ()
    ) -> list[Layout]:
        """The crops of a picture, then its thumbnail."""
        side = self._side(arguments)
        found = []
        for (n_rows, n_columns), n in runs:
            n_crops = n_rows * n_columns + 1
            if n != n_crops * side**2:
                raise TokPruneError(
                    f"the prompt shows {n} image placeholders where {n_crops} crops have {side**2} each; "
                    "pass the prompt whole (without prefill_chunk_size), as the processor made it"
                )
            found.append(tiles_layout(side, (n_rows, n_columns), n_rows * n_columns))
        return found

    def _side(self, arguments: Mapping[str, Any]) -> int:
        """Tokens along a side of a crop."""
        height, width = arguments["pixel_values"].shape[-2:]
        if height != width:
            raise UnsupportedModelError(f"crops of {height} x {width} pixels: the model's pixel shuffle takes squares")
        config = self.base.config
        return width // config.vision_config.patch_size // config.scale_factor

    # ---- building one

    @classmethod
    def options(cls, sizes: Sizes) -> dict[str, Any]:
        """2 x 2 patches a token."""
        return {"image_token_id": sizes.image_id, "scale_factor": 2, "tie_word_embeddings": False}

    @classmethod
    def image_processor(cls, config: Any) -> Any:
        """The family's own, which cuts a picture into up to 4 x 4 crops."""
        side = config.vision_config.image_size
        made = pil_image_processor(cls.model_type, cls.__name__ + "ImageProcessor")
        return made(size={"longest_edge": 4 * side}, max_image_size={"longest_edge": side})


class SmolVLM(Idefics3):
    """SmolVLMForConditionalGeneration. A frame of a video is an image of its own, as it is in the prompt."""

    model_type = "smolvlm"
    towers: ClassVar = {"smolvlm_vision": TowerKind("SigLIP", False)}


def _around(ids: Sequence[int], runs: Sequence[range]) -> list[tuple[tuple[int, ...], bool]]:
    """Of every run: the tokens between <fake> and it, and whether something else than <fake> follows.

    Where the last run has no token like the one behind it before it, nothing is told apart.
    """
    fake = ids[runs[-1].stop] if runs and runs[-1].stop < len(ids) else None
    found, start = [], 0
    for run in runs:
        before = list(ids[start : run.start])
        if fake not in before:
            return [((), False)] * len(runs)
        tag = before[len(before) - before[::-1].index(fake) :]
        found.append((tuple(tag), run.stop == len(ids) or ids[run.stop] != fake))
        start = run.stop
    return found
