"""Pure tensor functions that methods share: no device-to-host sync, no shape that depends on values."""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from .lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor


LARGEST = 2**24  # numbers in a temporary tensor


def on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Host integers as an int64 tensor, booleans as a bool one, copied without waiting for the device."""
    if not len(values):
        return torch.empty(0, dtype=torch.int64, device=device)
    # A buffer is read some 7 times as fast as a sequence of Python numbers.
    if isinstance(values[0], bool):
        host = torch.frombuffer(bytearray(values), dtype=torch.bool)
    else:
        host = torch.frombuffer(array("q", values), dtype=torch.int64)
    # As torch.tensor does: modes that trace or fake tensors take it for a new one.
    return torch.ops.aten.lift_fresh(host).to(device, non_blocking=True)


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


def first_highest(scores: Tensor) -> Tensor:
    """Index of the highest score of every row, (G,); the lowest one of equals."""
    n = scores.shape[1]
    places = torch.arange(n, device=scores.device)
    return torch.where(scores == scores.amax(1, keepdim=True), places, n - 1).amin(1)


def keep_top_of_parts(scores: Tensor, part: Tensor, counts: Tensor) -> Tensor:
    """(G, N) bool: of every part the `counts` highest scores; equal ones go to the lower index.

    Args:
        scores: (G, N), compared as float32.
        part: (N,) int64, the part of every token, 0..P-1.
        counts: (G, P), on the device; a part keeps at most its size.
    """
    order = ((part << 33) - _ordered(scores)).sort(dim=1, stable=True).indices  # part by part, the best of each first
    sizes = torch.zeros_like(counts[0]).index_add(0, part, torch.ones_like(part))
    # Of the order, so the same in every row: how many of its part each place has before it.
    parts = part[order[0]]
    place = torch.arange(scores.shape[1], device=part.device) - (sizes.cumsum(0) - sizes)[parts]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, place < counts[:, parts])


def _ordered(scores: Tensor) -> Tensor:
    """Integers of 32 bits, as int64, in the order of the scores as float32; equal for equal scores."""
    bits = (scores.float() + 0.0).view(torch.int32).long()  # -0.0 becomes 0.0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def allocate(weights: Tensor, caps: Sequence[int], total: int) -> Tensor:
    """Split `total` over parts by weight, exactly, under caps: largest remainder, without a device-to-host sync.

    The surplus of a full part goes to the others by their weights; equal remainders go to the lower part.

    Args:
        weights: (G, P), not negative; if all remaining weights are 0, the remaining capacities are used.
        caps: of every part; their sum is at least `total`.
        total: to split, for every row.

    Returns:
        (G, P) int64; every row sums to `total`.
    """
    limit = torch.tensor(caps, dtype=torch.float64).to(weights.device, non_blocking=True).expand_as(weights)
    weights = weights.double().clamp(min=0)
    share = torch.where(weights > 0, torch.minimum(weights * _level(weights, limit, total), limit), 0.0)
    rest = torch.where(weights > 0, 0.0, limit)
    share = share + rest * (total - share.sum(1, keepdim=True)) / rest.sum(1, keepdim=True).clamp(min=1e-300)
    whole = (share + 1e-9).floor()
    remainder = torch.where(whole < limit, share - whole, -1.0)
    rank = remainder.argsort(dim=1, descending=True, stable=True).argsort(1)
    return (whole + (rank < total - whole.sum(1, keepdim=True))).long()


def _level(weights: Tensor, limit: Tensor, total: int) -> Tensor:
    """(G, 1): tokens for a weight of 1 that use up `total` where every part takes its limit at most."""
    full_at = limit / weights  # inf where there is no weight
    order = full_at.argsort(dim=1, stable=True)
    full_at, limit, weights = (x.gather(1, order) for x in (full_at, limit, weights))
    others = weights.flip(1).cumsum(1).flip(1)  # of a part and those that are full later
    level = (total - (limit.cumsum(1) - limit)) / others  # if all parts before it are full
    fits = (others > 0) & (level <= full_at)  # taken for full too early, parts leave less to the others: the most is it
    most = level.masked_fill(~fits, -torch.inf).amax(1, keepdim=True)
    return torch.where(fits.any(1, keepdim=True), most, torch.inf)


@functools.lru_cache(maxsize=256)
def shares(sizes: tuple[int, ...], total: int, even: bool = False) -> tuple[int, ...]:
    """Split `total` over parts by their sizes, or evenly, under their sizes; largest remainder, on the host."""
    exact = [Fraction(0)] * len(sizes)
    while sum(exact) < total:
        open_ = [i for i, size in enumerate(sizes) if exact[i] < size]
        weight = sum(1 if even else sizes[i] for i in open_)
        left = total - sum(exact, Fraction(0))
        for i in open_:
            exact[i] = min(exact[i] + left * (1 if even else sizes[i]) / weight, Fraction(sizes[i]))
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def outliers(values: Tensor) -> Tensor:
    """(G, N) bool: above the third quartile by more than 1.5 interquartile ranges."""
    low, high = torch.quantile(values.float(), torch.tensor([0.25, 0.75], device=values.device), dim=1, keepdim=True)
    return values > high + 1.5 * (high - low)


def cosine(x: Tensor) -> Tensor:
    """Cosine of every pair of rows, (G, N, D) -> (G, N, N), float32."""
    unit = F.normalize(x.float(), dim=-1)
    return unit @ unit.transpose(-1, -2)


def paired_cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of every row of one with its row of the other, both (G, T, n, D): (G, T, n), float32.

    A few T at a time, so that no copy of all rows is made.
    """
    at_once = max(1, LARGEST // max(1, x[:, :1].numel()))
    pairs = zip(x.split(at_once, 1), y.split(at_once, 1), strict=True)
    return torch.cat([F.cosine_similarity(a.float(), b.float(), dim=-1, eps=1e-12) for a, b in pairs], 1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of (G, N, D) at (G, K): (G, K, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def put(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """(G, N, D) with the rows at (G, K) replaced by (G, K, D)."""
    return x.scatter(1, index[..., None].expand_as(rows), rows.to(x.dtype))


@functools.lru_cache(maxsize=256)
def spread(height: int, width: int, n_keep: int) -> tuple[int, ...]:
    """`n_keep` distinct cells spread evenly over a height x width grid, as ascending raster indices.

    The cells lie in evenly spaced rows whose shares differ by at most one cell; within a row they are evenly
    spaced, so kept tokens never line up in the same columns.
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
    rows = max(1, min(height, n_keep, math.isqrt(n_keep * height // width)))
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
    # With accelerate, keywords may be on different devices.
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
