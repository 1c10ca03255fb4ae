"""Mistral 3: pictures of any size in one sequence, a token of text behind every row of tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokprune.core.layout import NEWLINE, Layout

from .base import Family, deepest

BREAK = "tokprune_break"  # the token that ends a row
SIDE = 28  # tokens a side of the picture that budgets are checked on when a server starts


class Mistral3(Family):
    """Mistral3ForConditionalGeneration. A visual token shows 2 x 2 patches; a signal of it is their mean.

    `tokprune.attach` keeps every token that ends a row between those that stay. How many stay in a row is not known
    when vLLM plans the prompt, so here the worker puts the embeddings of these tokens among the rows of a picture, in
    the same order, and the prompt has placeholders for them, too.
    """

    towers: ClassVar = ("pixtral",)
    picture: ClassVar[str] = f"of a picture of {SIDE} x {SIDE} tokens"
    notes: ClassVar[tuple[str, ...]] = (BREAK,)
    keeps_breaks: ClassVar[bool] = True

    @property
    def n_built(self) -> int:
        """Vision layers up to the last one that the model reads."""
        return deepest(self.config)

    @property
    def largest(self) -> Layout:
        """Of the picture that budgets are checked on."""
        return broken_grid(SIDE, SIDE)

    def noted(self, items: Mapping[str, Any], info: Any) -> dict[str, Tensor]:
        """The token that ends a row."""
        token = info.get_tokenizer().convert_tokens_to_ids(info.get_hf_processor().image_break_token)
        return {BREAK: torch.full((len(items["pixel_values"]), 1), token)}

    def breaks(self, items: Mapping[str, Any]) -> list[Tensor]:
        """The token that ends a row of every picture, (1,)."""
        return list(items[BREAK])

    def layouts(self, items: Mapping[str, Any]) -> list[Layout]:
        """One raster a picture, with what ends its rows."""
        block = self.config.spatial_merge_size
        return [broken_grid(rows // block, columns // block) for rows, columns in self._grids(items)]

    def segments(self, items: Mapping[str, Any]) -> list[int]:
        """Patches of every picture."""
        return [rows * columns for rows, columns in self._grids(items)]

    def pack(self, items: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """The mean over the patches of a token; rows and columns that do not fill one are left out, as by the model."""
        block, found = self.config.spatial_merge_size, []
        for own, (height, width) in zip(values[0].split(self.segments(items)), self._grids(items), strict=True):
            rows, columns = height // block, width // block
            grid = own.unflatten(0, (height, width))[: rows * block, : columns * block]
            found.append(grid.unflatten(1, (columns, block)).unflatten(0, (rows, block)).mean((1, 3)).flatten(0, 1))
        return found

    def _grids(self, items: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of patches of every picture."""
        patch = self.config.vision_config.patch_size
        return [(p.shape[-2] // patch, p.shape[-1] // patch) for p in items["pixel_values"]]


@functools.lru_cache(maxsize=256)
def broken_grid(height: int, width: int) -> Layout:
    """One crop in raster order, with a special token behind every row but the last."""
    places = [(0 if c < width else NEWLINE, r, c if c < width else -1) for r in range(height) for c in range(width + 1)]
    crop, row, column = zip(*places[:-1], strict=True)
    return Layout(crop, row, column)
