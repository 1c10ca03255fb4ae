"""Helpers for methods that use thumbnails and crops, or compress every crop separately."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..core import ops
from ..core.layout import Layout
from ..core.lazy import F, torch
from ..core.tokens import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


def top_by_crop(scores: Tensor, layout: Layout, counts: Tensor | tuple[int, ...]) -> Tensor:
    """(G, N) bool: the highest scores of every crop; `counts` is (G, C), or one tuple for all images."""
    if isinstance(counts, tuple):
        counts = ops.on_device(counts, scores.device).expand(len(scores), -1)
    return ops.keep_top_of_parts(scores, ops.on_device(layout.crop_places, scores.device), counts)


def crop_rasters(layout: Layout, device: torch.device) -> list[Tensor]:
    """Visual tokens of every crop, row by row: (crops, rows, columns) int64 for every size of crop."""
    by_crop: dict[int, dict[int, list[int]]] = {}
    for place, i in enumerate(layout.visual):
        by_crop.setdefault(layout.crop[i], {}).setdefault(layout.row[i], []).append(place)
    by_size: dict[tuple[int, int], list[list[list[int]]]] = {}
    for crop in layout.crops:
        rows = [by_crop[crop][row] for row in sorted(by_crop[crop])]
        by_size.setdefault((len(rows), len(rows[0])), []).append(rows)
    return [torch.tensor(crops).to(device, non_blocking=True) for crops in by_size.values()]


def crop_by_crop(
    tokens: VisualTokens,
    n_keeps: tuple[int, ...],
    select: Callable[[VisualTokens, int], VisualTokens],
    apart: bool = False,
) -> VisualTokens:
    """Select in every crop separately; a crop with a share of 0 keeps nothing.

    Crops that lie alike and keep as many tokens are selected from at once, as images of their own.

    Args:
        tokens: of the images.
        n_keeps: of every crop.
        select: given the tokens of crops, and how many each keeps.
        apart: give them to `select` one by one.
    """
    kept, written = torch.zeros_like(tokens.keep), []
    for crops in _batches(tokens, n_keeps, apart):
        at, part = tokens.crops_as_images(crops)
        chosen = select(part, n_keeps[crops[0]])
        kept = kept.index_copy(1, at.flatten(), _as_crops(chosen.keep, at))
        if chosen.features is not part.features:
            written.append((at.flatten(), _as_crops(chosen.features, at)))
    if not written:
        return replace(tokens, keep=kept)
    at, new = torch.cat([at for at, _ in written]), torch.cat([new for _, new in written], 1)
    return replace(tokens, keep=kept, features=tokens.features.index_copy(1, at, new))


LARGEST = 2**25  # pairs of tokens of one crop, at a time


def _batches(tokens: VisualTokens, n_keeps: tuple[int, ...], apart: bool) -> Iterator[tuple[int, ...]]:
    """Crops to be selected from at once, by their places in the layout."""
    for crops in tokens.layout.equal_crops:
        pairs = len(tokens.features) * tokens.layout.crop_sizes[crops[0]] ** 2
        most = 1 if apart else max(1, LARGEST // pairs)
        for n_keep in sorted({n_keeps[crop] for crop in crops} - {0}):
            alike = tuple(crop for crop in crops if n_keeps[crop] == n_keep)
            yield from (alike[i : i + most] for i in range(0, len(alike), most))


def _as_crops(values: Tensor, at: Tensor) -> Tensor:
    """Values (C G, P, ...) of crops as images, (G, C P, ...)."""
    return values.unflatten(0, (len(at), -1)).transpose(0, 1).flatten(1, 2)


def in_order(tokens: VisualTokens, keep: Tensor, rows: Tensor) -> VisualTokens:
    """Tokens with the rows (G, K, D) written, in their order, into the K kept places, ascending."""
    places = ops.keep_top(keep.float(), rows.shape[1])
    return replace(tokens, keep=keep, features=ops.put(tokens.features, places, rows))


def sum_by_crop(values: Tensor, layout: Layout) -> Tensor:
    """Sums over the crop of every token, at every token; values are (G, N) or (G, N, D)."""
    places = ops.on_device(layout.crop_places, values.device)
    sums = values.new_zeros(len(values), len(layout.crops), *values.shape[2:]).index_add(1, places, values)
    return sums[:, places]


def norm_by_crop(values: Tensor, layout: Layout) -> Tensor:
    """L2 norm of the values (G, N) or (G, N, D) of every token's crop, at every token, above 0."""
    return sum_by_crop(values.square(), layout).sqrt().clamp(min=1e-12)


def unlike_mean(features: Tensor, layout: Layout) -> Tensor:
    """Minus the cosine of every token to the mean of its crop, (G, N)."""
    unit = F.normalize(features.float(), dim=-1)
    return -(unit * F.normalize(sum_by_crop(features.float(), layout), dim=-1)).sum(-1)


def rearranged(tokens: VisualTokens, order: Tensor) -> VisualTokens:
    """Kept rows in another order in the same places; order is (G, N), kept tokens first."""
    n = tokens.n_visual
    places = torch.where(tokens.keep, torch.arange(n, device=order.device), n).sort(1).values
    more = torch.cat([tokens.features, tokens.features[:, :1]], 1)  # one more row takes what is not kept
    return replace(tokens, features=ops.put(more, places, ops.take(tokens.features, order))[:, :-1])


def thumbnail_cells(layout: Layout) -> tuple[int, ...]:
    """Which crop of the mosaic, 0.. in raster order, every token of the thumbnail shows; leftovers go to the last.

    Padding of the mosaic is ignored: the crops share the thumbnail evenly.
    """
    return _cells(layout.regions[0].height, layout.regions[0].width, *layout.crop_grid)


@functools.lru_cache(maxsize=256)
def _cells(height: int, width: int, rows: int, columns: int) -> tuple[int, ...]:
    down = [min(y // max(height // rows, 1), rows - 1) for y in range(height)]
    right = [min(x // max(width // columns, 1), columns - 1) for x in range(width)]
    return tuple(i * columns + j for i in down for j in right)


def counts_by_cell(values: Tensor, cells: Sequence[int], layout: Layout) -> Tensor:
    """Sums of the thumbnail's values (G, N_t) by cell, for the crops that have tokens, (G, crops of the mosaic)."""
    rows, columns = layout.crop_grid
    sums = values.new_zeros(len(values), rows * columns).index_add(1, ops.on_device(cells, values.device), values)
    return sums[:, ops.on_device([crop - 1 for crop in layout.crops if crop > 0], values.device)]


def thumbnail_on_mosaic(scores: Tensor, layout: Layout) -> Tensor:
    """The thumbnail's scores, bilinear, at the tokens of crops, (G, N); at the thumbnail's own tokens undefined."""
    thumbnail, mosaic = layout.regions
    grid = scores[:, ops.on_device(thumbnail.index, scores.device)].view(-1, 1, thumbnail.height, thumbnail.width)
    large = F.interpolate(grid, (mosaic.height, mosaic.width), mode="bilinear", align_corners=False).flatten(1)
    return large[:, ops.on_device(layout.mosaic_cells, scores.device)]


def is_thumbnail(layout: Layout, device: torch.device) -> Tensor:
    """(N,) bool: the tokens of crop 0."""
    places = ops.on_device(layout.crop_places, device)
    return places == layout.crops.index(0) if 0 in layout.crops else torch.zeros_like(places, dtype=torch.bool)


def compacted_places(layout: Layout) -> list[int]:
    """Positions in the padded mosaic if the unpadded tokens of a crop were its first patches."""
    side, columns = layout.regions[0].width, layout.crop_grid[1]
    seen, places = dict.fromkeys(layout.crops, 0), []
    for i in layout.visual:
        crop = layout.crop[i]
        (down, right), (y, x) = divmod(max(crop - 1, 0), max(columns, 1)), divmod(seen[crop], side)
        places.append((down * side + y) * side * columns + right * side + x)
        seen[crop] += 1
    return places
