"""Pictures: kept tokens bright, dropped ones dim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..core.layout import Layout, Region, grid_layout
from ..core.lazy import torch
from .pictures import as_rgb

if TYPE_CHECKING:
    from torch import Tensor

DIM = 0.3  # brightness left to a dropped token
_GAP, _TITLE = 12, 22  # pixels between panels and for their titles


def seen(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """The picture as the model sees it: resized, cropped, and with its normalisation taken back.

    Args:
        pixels: (3, H, W), as the processor gives them.
        mean: of the image processor, for each of the three channels, in 0..1.
        std: likewise.
    """
    mean_, std_ = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (mean, std))
    values = (pixels.float().cpu() * std_ + mean_) * 255
    return Image.fromarray(values.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def dimmed(
    picture: Image.Image, layout: Layout, kept: Tensor, dim: float = DIM, region: Region | None = None
) -> Image.Image:
    """The picture with the cells of dropped tokens darkened; those of kept ones are untouched.

    Args:
        picture: what the tokens show, of any size.
        layout: where the N rows of the image lie; rows that show no patch have no cell.
        kept: (K,) indices of the kept rows among the N.
        dim: brightness left to a dropped cell, 0..1.
        region: which of `layout.regions` the picture shows; None is the first, the thumbnail or only crop.
    """
    region = region or layout.regions[0]
    pixels = torch.from_numpy(np.array(as_rgb(picture)))  # (H, W, 3)
    height, width = pixels.shape[:2]
    for i in sorted(set(region.index) - set(kept.tolist())):
        top, bottom = _span(layout.row[i], region.height, height)
        left, right = _span(layout.column[i], region.width, width)
        cell = pixels[top:bottom, left:right]
        cell.copy_((cell.float() * dim).to(cell.dtype))
    return Image.fromarray(pixels.numpy())


def frames_of(layout: Layout) -> list[tuple[int, ...]]:
    """The tokens of every frame of a video, in raster order."""
    return [tuple(i for i in layout.visual if layout.crop[i] == crop) for crop in layout.crops]


def dimmed_frames(
    frames: Sequence[Image.Image], layout: Layout, kept: Tensor | None, dim: float = DIM
) -> list[Image.Image]:
    """The frames of a video with the cells of dropped tokens darkened; whole ones where `kept` is None.

    Args:
        frames: of the video; as many in a row share tokens as there are for each of the layout's frames.
        layout: of the video, one crop a frame.
        kept: (K,) indices of the kept rows.
        dim: brightness left to a dropped cell, 0..1.
    """
    if kept is None:
        return list(frames)
    tokens = frames_of(layout)
    per_step, left, found = -(-len(frames) // len(tokens)), set(kept.tolist()), []
    for number, frame in enumerate(frames):
        own = tokens[number // per_step]
        n_columns = 1 + max(layout.column[i] for i in own)
        grid = grid_layout(len(own) // n_columns, n_columns)
        there = torch.tensor([place for place, i in enumerate(own) if i in left], dtype=torch.int64)
        found.append(dimmed(frame, grid, there, dim))
    return found


def _span(index: int, n_cells: int, n_pixels: int) -> tuple[int, int]:
    return index * n_pixels // n_cells, (index + 1) * n_pixels // n_cells


def enlarged(picture: Image.Image, least: int = 336) -> Image.Image:
    """A small picture blown up by a whole factor, without smoothing."""
    factor = max(1, -(-least // max(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def stacked(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """Two pictures above each other, as wide as the wider one, on white."""
    width = max(upper.width, lower.width)
    upper, lower = (p.resize((width, p.height * width // p.width), Image.Resampling.NEAREST) for p in (upper, lower))
    sheet = Image.new("RGB", (width, upper.height + _GAP + lower.height), "white")
    sheet.paste(upper, (0, 0))
    sheet.paste(lower, (0, upper.height + _GAP))
    return sheet


def row_of(pictures: Sequence[Image.Image], gap: int = 4) -> Image.Image:
    """Pictures of one size in one row, on white."""
    width, height = pictures[0].size
    row = Image.new("RGB", (len(pictures) * (width + gap) - gap, height), "white")
    for place, picture in enumerate(pictures):
        row.paste(picture, (place * (width + gap), 0))
    return row


def below_each_other(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Titled pictures in one column, on white."""
    font = ImageFont.load_default(size=13)
    width = max(p.width for _, p in panels) + 2 * _GAP
    sheet = Image.new("RGB", (width, sum(p.height + _TITLE + _GAP for _, p in panels) + _GAP), "white")
    draw, top = ImageDraw.Draw(sheet), _GAP
    for title, panel in panels:
        draw.text((_GAP, top), title, fill="black", font=font)
        sheet.paste(panel, (_GAP, top + _TITLE))
        top += panel.height + _TITLE + _GAP
    return sheet


def side_by_side(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Titled pictures in one row, on white."""
    font = ImageFont.load_default(size=13)
    width = sum(p.width for _, p in panels) + _GAP * (len(panels) + 1)
    height = max(p.height for _, p in panels) + _TITLE + 2 * _GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw, left = ImageDraw.Draw(sheet), _GAP
    for title, panel in panels:
        draw.text((left, _GAP), title, fill="black", font=font)
        sheet.paste(panel, (left, _GAP + _TITLE))
        left += panel.width + _GAP
    return sheet
