"""The layout of a picture cut into crops, read from where a model's own packing puts coordinates of patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .layout import NEWLINE, Layout
from .lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def coordinates(side: int, n_rows: int, n_columns: int) -> Tensor:
    """(crops, patches, 3): whether a crop of the mosaic, row and column in it; the thumbnail first."""
    inside = torch.arange(side).float()
    row, column = (t.flatten() for t in torch.meshgrid(inside, inside, indexing="ij"))
    crops = [torch.stack([torch.zeros(side * side), row, column], -1)]
    for i in range(n_rows):
        for j in range(n_columns):
            crops.append(torch.stack([torch.ones(side * side), row + i * side, column + j * side], -1))
    return torch.stack(crops)


def read_layout(packed: list[list[float]], side: int, grid: tuple[int, int]) -> Layout:
    """A layout from packed coordinates; where the mosaic was made smaller they lie between patches."""
    places: list[tuple[int, int, int]] = []
    mosaic_row = mosaic_column = 0
    for in_mosaic, y, x in packed:
        if in_mosaic != in_mosaic:  # NaN: a newline
            places.append((NEWLINE, mosaic_row if mosaic_column else -1, -1))
            mosaic_row, mosaic_column = mosaic_row + 1, 0
        elif in_mosaic:
            down, right = (int((v + 0.5) // side) for v in (y, x))
            places.append((1 + down * grid[1] + right, mosaic_row, mosaic_column))
            mosaic_column += 1
        else:
            places.append((0, int(y), int(x)))
    crop, row, column = zip(*places, strict=True)
    return Layout(crop, row, column, grid)
