"""Where the tokens of an image are: crops, newlines, and their grids."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Region:
    """A full grid of tokens: the thumbnail, or the mosaic of the crops; `index` is in raster order."""

    height: int
    width: int
    index: tuple[int, ...]


NEWLINE, NO_PATCH = -1, -2


@dataclass(frozen=True, repr=False)
class Layout:
    """Crop, row and column of every token of one image, each of length N, on the host.

    Crop 0 is the thumbnail or the only crop, 1.. the others, in raster order. Rows and columns of a thumbnail are
    its own, those of the crops are of their mosaic. Crop -1 is a newline at the end of mosaic row `row`, or of the
    whole picture where that is -1; crop -2 is another special token (a [CLS] feature). Both are never scored and
    are counted separately.

    Args:
        crop, row, column: of every token.
        crop_grid: rows and columns of crops, (0, 0) with only a thumbnail or a single crop.
        is_video: whether the crops are the frames of a video, in the order of time.
    """

    crop: tuple[int, ...]
    row: tuple[int, ...]
    column: tuple[int, ...]
    crop_grid: tuple[int, int] = (0, 0)
    is_video: bool = False

    @property
    def n_visual(self) -> int:
        """Number of patch tokens, without special tokens (newline, [CLS])."""
        return len(self.visual)

    @property
    def n_newlines(self) -> int:
        return self.crop.count(NEWLINE)

    @functools.cached_property
    def visual(self) -> tuple[int, ...]:
        """Indices of the patch tokens."""
        return tuple(i for i, crop in enumerate(self.crop) if crop >= 0)

    @functools.cached_property
    def crops(self) -> tuple[int, ...]:
        """Crops that have tokens, ascending."""
        return tuple(sorted({c for c in self.crop if c >= 0}))

    @functools.cached_property
    def crop_places(self) -> tuple[int, ...]:
        """Place of every visual token's crop among `crops`."""
        places = {crop: place for place, crop in enumerate(self.crops)}
        return tuple(places[self.crop[i]] for i in self.visual)

    @functools.cached_property
    def crop_sizes(self) -> tuple[int, ...]:
        """Tokens of every crop, in the order of `crops`."""
        found = Counter(self.crop_places)
        return tuple(found[place] for place in range(len(self.crops)))

    @functools.cached_property
    def places_by_crop(self) -> tuple[tuple[int, ...], ...]:
        """Places among the visual tokens of those of every crop, in the order of `crops`."""
        found: list[list[int]] = [[] for _ in self.crops]
        for i, place in enumerate(self.crop_places):
            found[place].append(i)
        return tuple(map(tuple, found))

    @functools.cached_property
    def equal_crops(self) -> tuple[tuple[int, ...], ...]:
        """Crops, by their places among `crops`, in groups whose tokens lie alike."""
        found: dict[tuple, list[int]] = {}
        for place, index in enumerate(self.places_by_crop):
            at = [(self.row[i], self.column[i]) for i in map(self.visual.__getitem__, index)]
            top, left = (min(sides) for sides in zip(*at, strict=True))
            found.setdefault(tuple((y - top, x - left) for y, x in at), []).append(place)
        return tuple(map(tuple, found.values()))

    @functools.cached_property
    def frames(self) -> tuple[int, int]:
        """Frames of a video and tokens of each, as they follow each other; of a picture one, with all tokens."""
        if not self.is_video or len(set(self.crop_sizes)) != 1:
            return 1, self.n_visual
        return len(self.crops), self.crop_sizes[0]

    @property
    def n_crops(self) -> int:
        """Crops that the tower encodes: the thumbnail or single crop, and those of the mosaic, padding included."""
        rows, columns = self.crop_grid
        return int(0 in self.crops) + rows * columns

    @property
    def height(self) -> int:
        """Rows of the mosaic, or of the single crop."""
        return self.regions[-1].height if self.regions else 0

    @property
    def width(self) -> int:
        """Columns of the mosaic, or of the single crop."""
        return self.regions[-1].width if self.regions else 0

    @functools.cached_property
    def regions(self) -> tuple[Region, ...]:
        """The thumbnail or single crop, and the mosaic of the others; only those with tokens."""
        parts = ([i for i in self.visual if self.crop[i] == 0], [i for i in self.visual if self.crop[i] > 0])
        return tuple(self._region(part) for part in parts if part)

    @functools.cached_property
    def mosaic_cells(self) -> tuple[int, ...]:
        """Place of every visual token in the raster of the mosaic; 0 for those of the thumbnail."""
        width = self.width
        return tuple(self.row[i] * width + self.column[i] if self.crop[i] else 0 for i in self.visual)

    def _region(self, index: list[int]) -> Region:
        raster = sorted(index, key=lambda i: (self.row[i], self.column[i]))
        height, width = 1 + max(self.row[i] for i in index), 1 + max(self.column[i] for i in index)
        return Region(height, width, tuple(raster))

    @functools.cached_property
    def without_specials(self) -> Layout:
        """The layout without special tokens (newline, [CLS])."""
        return self if len(self.visual) == len(self.crop) else self.part(self.visual)

    def __repr__(self):
        grids = " and ".join(f"{region.height} x {region.width}" for region in self.regions)
        rows, columns = self.crop_grid
        crops = f", {rows} x {columns} crops" if rows else ""
        return f"Layout({len(self.crop)} rows, grid {grids or 'none'}{crops})"

    def part(self, index: Sequence[int]) -> Layout:
        crop, row, column = (tuple(t[i] for i in index) for t in (self.crop, self.row, self.column))
        return Layout(crop, row, column, self.crop_grid, self.is_video)


@functools.lru_cache(maxsize=64)
def frames_layout(n_frames: int, height: int, width: int, n_newlines: int = 0) -> Layout:
    """A video: one crop a frame, below each other in one mosaic, without a thumbnail; newlines come last."""
    places = [(f + 1, f * height + r, c) for f in range(n_frames) for r in range(height) for c in range(width)]
    places += [(NEWLINE, -1, -1)] * n_newlines
    crop, row, column = zip(*places, strict=True)
    return Layout(crop, row, column, (n_frames, 1), is_video=True)


@functools.lru_cache(maxsize=64)
def tiles_layout(side: int, grid: tuple[int, int], thumbnail: int) -> Layout:
    """Square tiles one after the other: those of a mosaic in raster order, and a thumbnail among them.

    Args:
        side: tokens along a side of a tile.
        grid: rows and columns of the mosaic; (0, 0) with a thumbnail alone.
        thumbnail: its place among the tiles; -1 where there is none.
    """
    places, crop = [], 0
    for tile in range(grid[0] * grid[1] + (thumbnail >= 0)):
        if tile == thumbnail:
            top = left = number = 0
        else:
            number, (top, left) = crop + 1, (side * v for v in divmod(crop, grid[1]))
            crop += 1
        places += [(number, top + r, left + c) for r in range(side) for c in range(side)]
    crops, row, column = zip(*places, strict=True)
    return Layout(crops, row, column, grid)


@functools.lru_cache(maxsize=64)
def grid_layout(height: int, width: int, n_leading: int = 0) -> Layout:
    """One crop in raster order, after `n_leading` special tokens."""
    rows = [r for r in range(height) for _ in range(width)]
    columns = [c for _ in range(height) for c in range(width)]
    special, nowhere = (NO_PATCH,) * n_leading, (-1,) * n_leading
    return Layout(crop=special + (0,) * (height * width), row=nowhere + tuple(rows), column=nowhere + tuple(columns))
