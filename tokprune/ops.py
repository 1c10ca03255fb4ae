"""Pure tensor verbs that methods share. No read from the device, no shape that depends on values."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Host integers as an int64 tensor, copied without waiting for the device."""
    return torch.tensor(values).to(device, non_blocking=True)


def keep_top(scores: Tensor, n_keep: int) -> Tensor:
    """Indices of the `n_keep` highest scores of every row, ascending; equal scores go to the lower index.

    Args:
        scores: (G, N), any float type.
        n_keep: 1..N.

    Returns:
        (G, n_keep) int64, strictly ascending along a row.
    """
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    return order[:, :n_keep].sort(dim=1).values


@functools.lru_cache(maxsize=256)
def spread(height: int, width: int, n_keep: int) -> tuple[int, ...]:
    """`n_keep` distinct cells spread evenly over a height x width grid, as ascending raster indices.

    The cells lie in evenly spaced rows whose shares differ by at most one cell; within a row they are evenly
    spaced. So no stride of the raster ever falls on the same columns again and again.
    """
    n_rows = round(math.sqrt(n_keep * height / width))
    n_rows = min(max(n_rows, -(-n_keep // width), 1), height, n_keep)
    cells = []
    for i in range(n_rows):
        row = (2 * i + 1) * height // (2 * n_rows)
        share = (i + 1) * n_keep // n_rows - i * n_keep // n_rows
        cells += [row * width + (2 * j + 1) * width // (2 * share) for j in range(share)]
    return tuple(sorted(cells))


def pool_grid(height: int, width: int, n_keep: int) -> tuple[int, int]:
    """Rows and columns of the largest pooling grid of at most `n_keep` cells, shaped like the picture."""
    rows = max(1, min(height, math.isqrt(n_keep * height // width)))
    return rows, min(width, n_keep // rows)


def pool(features: Tensor, height: int, width: int, rows: int, columns: int) -> Tensor:
    """Average-pool a raster grid of features, (G, height * width, D) -> (G, rows * columns, D)."""
    grid = features.transpose(1, 2).unflatten(2, (height, width))  # (G, D, height, width)
    pooled = F.adaptive_avg_pool2d(grid.float(), (rows, columns))
    return pooled.flatten(2).transpose(1, 2).to(features.dtype)


def gather_columns(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Gather along a sequence dimension with a per-row index (B, K); the batch axis, B or 1, comes before it."""
    dim = dim % x.ndim
    batch, n_out = index.shape
    if x.shape[dim - 1] != batch:
        x = x.expand(*x.shape[: dim - 1], batch, *x.shape[dim:])
    view, shape = [1] * x.ndim, list(x.shape)
    view[dim - 1], view[dim], shape[dim] = batch, n_out, n_out
    # Under accelerate every keyword may sit on a device of its own.
    return x.gather(dim, index.to(x.device).view(view).expand(shape))


def right_align(keep: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """(B, S) bool -> source (B, longest) and valid (B, longest): kept columns in order, at the right."""
    order = torch.argsort(keep.to(torch.int8), dim=1, stable=True)
    source = order[:, keep.shape[1] - longest :]
    return source, keep.gather(1, source)


def forward_fill(source: Tensor, valid: Tensor, n_columns: int) -> Tensor:
    """For every original column the place of the last kept column up to it, (B, n_columns).

    Columns before the first kept one get the first. With this the shifted loss of the long sequence, labels
    -100 on placeholders, is the loss of the short one: the last kept token predicts the first text token.
    """
    batch, width = source.shape
    places = torch.arange(width, device=source.device).expand(batch, width)
    filled = source.new_full((batch, n_columns + 1), -1)
    filled = filled.scatter(1, source.masked_fill(~valid, n_columns), places)[:, :n_columns].cummax(1).values
    first = places.masked_fill(~valid, width - 1).amin(1, keepdim=True)
    return torch.where(filled < 0, first, filled)
