"""PixelPrune: what repeats its neighbours leaves before the vision tower, which then has less to read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ..core import ops
from ..core.lazy import torch
from ..core.signals import Kind, Signal, Tower
from ..core.tokens import Count, VisualTokens
from .base import Method
from .crops import crop_rasters

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PixelPrune(Method):
    """Drop the tokens whose pixels a predictor finds from their neighbours, before the vision tower runs.

    A cell is what a token shows, 2 x 2 patches as the processor normalises them. With A to its left, B above it and C
    between the two, the prediction is B where C is like A and not like B, else A; in the first row it is A, in the
    first column B. A cell that is like its prediction is dropped, and the first one always stays. Two cells are alike
    where no value differs by more than `tau`. Every frame of a video is a picture of its own. The tower runs on kept
    cells at their own positions, in the segments and windows that they were in.

    With tau=0 pixels lose nothing: from kept cells and their places the picture follows bit for bit. What the tower
    makes of kept cells does change, because they no longer attend to the repeated ones.

    Source:   "PixelPrune"; code: OPPO-Mente-Lab/PixelPrune@a870e31.
    Faithful: kept cells agree with the authors' code (golden cases pixelprune).
    Differs:  videos, frame by frame, where the code takes pictures alone.
    Needs:    PIXELS, before the tower. Text-agnostic. Cost: O(N P) for P pixel values a cell, no products.

    Args:
        tau: the largest difference of two normalised pixel values that counts as none; one level of 255 is about 0.015.
        anchored: cells are compared with what a decoder would have, where a dropped cell shows its prediction, so that
            small differences do not add up; otherwise with their true neighbours. With tau=0 both are the same.
    """

    tau: float = 0.0
    anchored: bool = True

    limits: ClassVar = {"tau": (0, 1e6)}
    space: ClassVar = "pixels"
    source: ClassVar[str] = "OPPO-Mente-Lab/PixelPrune"

    @property
    def takes_budget(self) -> bool:
        return False

    @property
    def count(self) -> Count:
        return Count.CONTENT

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({Signal(Kind.PIXELS)})

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        """Every crop or frame by itself; those of one size together."""
        pixels, keep = tokens.signal(Kind.PIXELS)[:, 0], torch.ones_like(tokens.keep)
        kept = self._anchored if self.anchored and self.tau else self._sliding
        for at in crop_rasters(tokens.layout, pixels.device):
            cells = pixels[:, at.flatten()].unflatten(1, at.shape).flatten(0, 1)  # (G * crops, H, W, P)
            keep[:, at.flatten()] = kept(cells).view(len(pixels), -1)
        return replace(tokens, keep=keep)

    def alike(self, a: Tensor, b: Tensor) -> Tensor:
        """(...) bool: whether the pixel values (..., P) of two cells differ by `tau` at most."""
        return (a - b).abs().amax(-1) <= self.tau

    def _sliding(self, cells: Tensor) -> Tensor:
        """(G, H, W) bool of (G, H, W, P): what stays where true neighbours predict."""
        across = self.alike(cells[:, :, 1:], cells[:, :, :-1])  # (G, H, W - 1): like the cell to the left
        down = self.alike(cells[:, 1:], cells[:, :-1])  # (G, H - 1, W): like the cell above
        keep = torch.ones(cells.shape[:3], dtype=torch.bool, device=cells.device)
        keep[:, 0, 1:], keep[:, 1:, 0] = ~across[:, 0], ~down[:, :, 0]
        from_above = down[:, :, :-1] & ~across[:, :-1]  # C is like A, and not like B
        keep[:, 1:, 1:] = ~torch.where(from_above, down[:, :, 1:], across[:, 1:])
        return keep

    def _anchored(self, cells: Tensor) -> Tensor:
        """The same where what a decoder would have predicts, which is known one diagonal after the other."""
        height, width = cells.shape[1:3]
        flat, places = cells.flatten(1, 2), torch.arange(height * width, device=cells.device)
        shows = places.expand(len(flat), -1).clone()  # the cell whose pixels a place has
        for diagonal in range(1, height + width - 1):
            row = torch.arange(max(0, diagonal - width + 1), min(height, diagonal + 1), device=cells.device)
            here = row * width + diagonal - row
            inside = (row > 0) & (row < diagonal)
            beside = torch.where(row < diagonal, here - 1, here - width)  # at the border there is only one neighbour
            above, corner = (torch.where(inside, here - step, beside) for step in (width, width + 1))
            a, b, c = shows[:, beside], shows[:, above], shows[:, corner]
            at_a, at_b, at_c = (ops.take(flat, index) for index in (a, b, c))
            from_above = self.alike(at_c, at_a) & ~self.alike(at_c, at_b)
            predicted = torch.where(from_above[..., None], at_b, at_a)
            found = torch.where(from_above, b, a)
            shows[:, here] = torch.where(self.alike(flat[:, here], predicted), found, here)
        return (shows == places).unflatten(1, (height, width))
