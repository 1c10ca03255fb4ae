"""Reports for notebooks: grids of kept and dropped tokens, and pictures whose dropped tokens are dim."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps

from ..core.errors import RunError
from ..core.layout import Layout, Region
from .explain import dimmed, dimmed_frames, enlarged, frames_of, row_of, stacked
from .pictures import as_rgb
from .report import ImageReport, Report
from .videos import Clip

KEPT, DROPPED = "#2a78d6", "#d5d9de"  # both are seen on white and on black
SIDE = 240  # pixels of the longer side of a grid
MOST_IMAGES, MOST_FRAMES = 8, 8  # that are drawn
WIDEST = 672  # pixels of a picture in a page


@dataclass(frozen=True)
class ShownReport:
    """What `Report.show` returns: the report with its pictures, which a notebook shows.

    Args:
        report: of the call.
        pictures: with their captions; dropped tokens are dim.
    """

    report: Report
    pictures: Sequence[tuple[str, Image.Image]]

    def _repr_html_(self) -> str:
        return _page(self.report, [_figure(caption, _img(picture)) for caption, picture in self.pictures])

    def __repr__(self) -> str:
        return repr(self.report)


def report_html(report: Report) -> str:
    """The lines of a report and, for every image, the grid of its tokens: a report holds no pixels."""
    figures = [_figure(_caption(i, image), _grids(image)) for i, image in _numbered(report)]
    n_more = len(report.images) - len(figures)
    return _page(report, [*figures, *([f"<p>and {n_more} more</p>"] if n_more > 0 else [])])


def drawn(report: Report, pictures: Sequence[Image.Image | Clip], processor: Any = None) -> ShownReport:
    """The pictures of a report, dropped tokens dim.

    Args:
        report: of a call.
        pictures: one for each of `report.images`.
        processor: of the model; asked what it does with pictures whose sides do not have the ratio of the grid's.

    Raises:
        RunError: another number of pictures, or one whose part that the model saw is not known.
    """
    if len(pictures) != len(report.images):
        raise RunError(f"this report has {len(report.images)} images, and {len(pictures)} pictures were given")
    shown = [
        (_caption(i, image), _drawn(i, image, picture, processor))
        for (i, image), picture in zip(_numbered(report), pictures, strict=False)
    ]
    return ShownReport(report, shown)


def _numbered(report: Report) -> list[tuple[int, ImageReport]]:
    return list(enumerate(report.images, 1))[:MOST_IMAGES]


def _caption(number: int, image: ImageReport) -> str:
    return f"{'video' if image.is_video else 'image'} {number}: {image.n_visual} -> {image.n_kept}"


# ---- pictures


def _drawn(number: int, image: ImageReport, picture: Image.Image | Clip, processor: Any) -> Image.Image:
    layout = image.layout
    if isinstance(picture, Clip):
        if not image.is_video:
            raise RunError(f"image {number} is no video; give its picture")
        frames = [as_seen(f, _grid(layout, frames_of(layout)[0]), processor, number) for f in picture.frames]
        return row_of([enlarged(f, 112) for f in dimmed_frames(frames, layout, image.left)])
    if image.is_video:
        raise RunError(f"image {number} is a video; give a tokprune.prune.videos.Clip")
    whole = as_rgb(picture)
    if layout.crop_grid == (0, 0):  # otherwise all crops together show all of the picture
        whole = as_seen(whole, layout.regions[0], processor, number)
    whole.thumbnail((WIDEST, WIDEST))
    parts = [enlarged(dimmed(whole, layout, image.left, region=region)) for region in layout.regions]
    return parts[0] if len(parts) == 1 else stacked(*parts)


def as_seen(picture: Image.Image, grid: Region, processor: Any = None, number: int = 1) -> Image.Image:
    """The part of a picture that a single grid of tokens shows.

    Args:
        picture: as the processor was given it.
        grid: of the tokens.
        processor: which cuts the middle out, fills up to the grid's ratio, or stretches.
        number: of the picture, for messages.

    Raises:
        RunError: the ratios of the sides differ by more than a row or a column, and there is no processor.
    """
    (width, height), picture = picture.size, picture.copy()
    if abs(width * grid.height - height * grid.width) <= max(width, height):
        return picture
    if processor is None:
        raise RunError(
            f"picture {number} is {width} x {height} and its tokens are a grid of {grid.width} x {grid.height}: "
            "give the processor, as in report.show(pictures, processor)"
        )
    images = getattr(processor, "image_processor", processor)
    size = _of_ratio(picture, grid, larger=False)
    if getattr(images, "do_center_crop", False):
        return ImageOps.fit(picture, size)
    if getattr(images, "do_pad", False):
        return ImageOps.pad(picture, _of_ratio(picture, grid, larger=True))
    return picture


def _of_ratio(picture: Image.Image, grid: Region, larger: bool) -> tuple[int, int]:
    """The largest size with the grid's ratio inside of a picture, or the smallest around it."""
    scale = (max if larger else min)(picture.width / grid.width, picture.height / grid.height)
    return round(grid.width * scale), round(grid.height * scale)


def _img(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


# ---- grids


def _grid(layout: Layout, index: Iterable[int]) -> Region:
    """The grid of some tokens, from its own first row and column on."""
    index = tuple(index)
    rows, columns = ([of[i] for i in index] for of in (layout.row, layout.column))
    return Region(max(rows) - min(rows) + 1, max(columns) - min(columns) + 1, index)


def _grids(image: ImageReport) -> str:
    layout, left = image.layout, set(image.left.tolist())
    parts = frames_of(layout) if image.is_video else [region.index for region in layout.regions]
    more = f" and {len(parts) - MOST_FRAMES} more frames" if len(parts) > MOST_FRAMES else ""
    return " ".join(_svg(layout, _grid(layout, index), left) for index in parts[:MOST_FRAMES]) + more


def _svg(layout: Layout, grid: Region, left: set[int]) -> str:
    """Cells of kept tokens on a ground of dropped ones."""
    top, start = (min(of[i] for i in grid.index) for of in (layout.row, layout.column))
    cells = {is_kept: [i for i in grid.index if (i in left) == is_kept] for is_kept in (False, True)}
    paths = "".join(
        f'<path class="{name}" fill="{colour}" d="'
        + "".join(f"M{layout.column[i] - start} {layout.row[i] - top}h.9v.9h-.9z" for i in cells[is_kept])
        + '"/>'
        for is_kept, name, colour in ((False, "dropped", DROPPED), (True, "kept", KEPT))
    )
    scale = SIDE / max(grid.height, grid.width)
    size = f'width="{round(grid.width * scale)}" height="{round(grid.height * scale)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {grid.width} {grid.height}">{paths}</svg>'


def _figure(caption: str, drawing: str) -> str:
    return (
        '<figure style="display:inline-block;margin:0 1em 1em 0">'
        f"{drawing}<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _page(report: Report, figures: Sequence[str]) -> str:
    head, *lines = report.lines
    said = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<div><p><b>{html.escape(head)}</b></p><ul>{said}</ul>{''.join(figures)}</div>"
