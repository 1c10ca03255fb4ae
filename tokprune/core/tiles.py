"""How the tiles of a picture lie, and which of them is its thumbnail, read off their pixels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

POOLED = 8  # cells a side of the grid on which a thumbnail is compared with its tiles
LIKE = 0.5  # ... that differ from its tiles' by less than this share of their variance


def arranged(images: Sequence[Tensor]) -> list[tuple[tuple[int, int], int]]:
    """((rows, columns) of the crops, which tile is the thumbnail or -1) of every image; one read from the device."""
    candidates = [_candidates(len(tiles)) for tiles in images]
    errors = [
        torch.stack([_difference(tiles, *c) for c in choices]) if len(choices) > 1 else tiles.new_zeros(1).float()
        for tiles, choices in zip(images, candidates, strict=True)
    ]
    read = iter(torch.cat(errors).tolist())
    found = []
    for choices in candidates:
        values = list(itertools.islice(read, len(choices)))
        best = min(range(len(choices)), key=lambda i: values[i])
        alike = len(choices) == 1 or values[best] < LIKE
        found.append(choices[best] if alike else ((1, choices[best][0][0] * choices[best][0][1] + 1), -1))
    return found


def _candidates(n_tiles: int) -> list[tuple[tuple[int, int], int]]:
    """Grids of all tiles but one, which is the thumbnail; the last tile, and squarer grids, first."""
    if n_tiles == 1:
        return [((0, 0), 0)]
    n = n_tiles - 1
    grids = sorted(((r, n // r) for r in range(1, n + 1) if n % r == 0), key=lambda g: abs(g[0] - g[1]))
    return [(grid, thumbnail) for thumbnail in (n, 0) for grid in grids]


def _difference(tiles: Tensor, grid: tuple[int, int], thumbnail: int) -> Tensor:
    """Mean squared difference of a tile and the mosaic of the others, over the mosaic's variance."""
    others = torch.cat([tiles[:thumbnail], tiles[thumbnail + 1 :]]).float()
    rows, columns = grid
    mosaic = others.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # (3, H, W)
    pooled = F.adaptive_avg_pool2d(mosaic[None], POOLED)
    alone = F.adaptive_avg_pool2d(tiles[thumbnail][None].float(), POOLED)
    return (pooled - alone).square().mean() / pooled.var().clamp(min=1e-6)
