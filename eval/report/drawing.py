"""Sheets of titled pictures with captions, and what is drawn on pictures: frames, crop labels, scores as colours."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from tokprune.core.layout import Layout, Region

GAP, TITLE, LINE = 12, 22, 17  # pixels between panels, for a title, and for a line of a caption
INK, OTHER, MERGED = "#1c1e21", "#b3261e", "#ff8c1a"
# From low to high: dark blue, teal, green, yellow; brightness rises with it, so that it reads without colour, too.
_HEAT = ((0.0, (35, 30, 90)), (0.35, (35, 105, 140)), (0.7, (80, 180, 110)), (1.0, (250, 230, 60)))
_SHOWN = 0.72  # how much of a cell is the colour of its score


@dataclass(frozen=True)
class Panel:
    """A picture with a title above it and a caption below.

    Args:
        title: in one line.
        picture: of any size.
        caption: texts, which wrap.
        differs: whether the first of them says something unlike the rest.
    """

    title: str
    picture: Image.Image
    caption: Sequence[str] = ()
    differs: bool = False


# ---- sheets


def sheet(rows: Sequence[Sequence[Panel | None]]) -> Image.Image:
    """Panels in rows on white, as wide in a column as the widest; None leaves a place empty."""
    n_columns = max(map(len, rows))
    widths = [
        max((row[i].picture.width for row in rows if i < len(row) and row[i]), default=0) for i in range(n_columns)
    ]
    texts = [[_caption(panel, widths[i]) for i, panel in enumerate(row)] for row in rows]
    heights = [
        max(TITLE + panel.picture.height + LINE * len(text) for panel, text in zip(row, found, strict=True) if panel)
        for row, found in zip(rows, texts, strict=True)
    ]
    size = (sum(widths) + GAP * (n_columns + 1), sum(heights) + GAP * (len(rows) + 1))
    drawn = Image.new("RGB", size, "white")
    top = GAP
    for row, found, height in zip(rows, texts, heights, strict=True):
        left = GAP
        for panel, text, width in zip(row, found, widths, strict=False):
            if panel:
                _place(drawn, panel, text, (left, top), width)
            left += width + GAP
        top += height + GAP
    return drawn


def stacked_sheets(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets below each other, on white."""
    width, height = max(s.width for s in sheets), sum(s.height for s in sheets)
    drawn, top = Image.new("RGB", (width, height), "white"), 0
    for one in sheets:
        drawn.paste(one, (0, top))
        top += one.height
    return drawn


def in_rows(first: Panel, others: Sequence[Panel], n: int) -> list[list[Panel | None]]:
    """`first`, and beside it the others in rows of n."""
    chunks = [list(others[i : i + n]) for i in range(0, len(others), n)] or [[]]
    return [[None if i else first, *chunk] for i, chunk in enumerate(chunks)]


def _place(drawn: Image.Image, panel: Panel, text: Sequence[str], at: tuple[int, int], width: int) -> None:
    draw, (left, top) = ImageDraw.Draw(drawn), at
    draw.text((left, top), _cut(panel.title, width), fill=INK, font=_font(13))
    drawn.paste(panel.picture, (left, top + TITLE))
    for i, line in enumerate(text):
        place = (left, top + TITLE + panel.picture.height + 3 + LINE * i)
        first = i < len(wrapped(panel.caption[0], width))
        draw.text(place, line, fill=OTHER if panel.differs and first else INK, font=_font(13))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _caption(panel: Panel | None, width: int) -> list[str]:
    return [line for text in (panel.caption if panel else ()) for line in wrapped(text, width)]


def wrapped(text: str, width: int, most: int = 3) -> list[str]:
    """Lines of a text that are at most so many pixels wide; what comes after `most` lines is left out."""
    lines: list[str] = []
    for word in " ".join(text.split()).split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _font(13).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(_cut(word, width))
    return lines if len(lines) <= most else [*lines[: most - 1], _cut(" ".join(lines[most - 1 :]), width)]


def _cut(text: str, width: int) -> str:
    """A text in at most so many pixels."""
    if _font(13).getlength(text) <= width:
        return text
    while text and _font(13).getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


# ---- on a picture


def _cell(region: Region, place: int, picture: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom pixel of a cell, the last two outside."""
    row, column = divmod(place, region.width)
    across, down = picture.width / region.width, picture.height / region.height
    return round(column * across), round(row * down), round((column + 1) * across), round((row + 1) * down)


def framed(picture: Image.Image, region: Region, rows: Collection[int]) -> Image.Image:
    """With a frame around the cells of these rows, inside of each."""
    drawn, chosen = picture.copy(), set(rows)
    draw = ImageDraw.Draw(drawn)
    for place, i in enumerate(region.index):
        if i in chosen:
            left, top, right, bottom = _cell(region, place, picture)
            draw.rectangle((left, top, right - 1, bottom - 1), outline=MERGED, width=max(1, (right - left) // 8))
    return drawn


def heated(picture: Image.Image, region: Region, ranks: Mapping[int, float]) -> Image.Image:
    """The cells in the colours of their ranks in 0..1, the picture in grey beneath; cells without a rank stay grey."""
    pixels = np.asarray(Image.merge("RGB", [ImageOps.grayscale(picture)] * 3)).astype(float)
    for place, i in enumerate(region.index):
        if i in ranks:
            left, top, right, bottom = _cell(region, place, picture)
            cell = pixels[top:bottom, left:right]
            pixels[top:bottom, left:right] = (1 - _SHOWN) * cell + _SHOWN * np.array(colour(ranks[i]))
    return Image.fromarray(pixels.round().astype(np.uint8))


def colour(rank: float) -> tuple[float, ...]:
    """Red, green and blue of a rank in 0..1."""
    at, colours = zip(*_HEAT, strict=True)
    return tuple(float(np.interp(rank, at, [c[k] for c in colours])) for k in range(3))


def ranks_of(scores: Mapping[int, float]) -> dict[int, float]:
    """Ranks in 0..1, the highest score 1; equal scores have one rank."""
    ordered = sorted(set(scores.values()))
    place = {value: n for n, value in enumerate(ordered)}
    return {i: place[value] / max(len(ordered) - 1, 1) for i, value in scores.items()}


def labelled(picture: Image.Image, layout: Layout, region: Region) -> Image.Image:
    """With the borders and numbers of its crops, as `Layout.crop` has them; a thumbnail beside crops is called so."""
    if len(layout.crops) < 2:
        return picture
    drawn = picture.copy()
    draw = ImageDraw.Draw(drawn)
    places: dict[int, list[int]] = {}
    for place, i in enumerate(region.index):
        places.setdefault(layout.crop[i], []).append(place)
    for crop, own in sorted(places.items()):
        cells = [_cell(region, place, picture) for place in own]
        left, top = min(c[0] for c in cells), min(c[1] for c in cells)
        right, bottom = max(c[2] for c in cells), max(c[3] for c in cells)
        if crop:
            draw.rectangle((left, top, right - 1, bottom - 1), outline="white")
        tag(draw, (left, top), f"crop {crop}" if crop else "thumbnail")
    return drawn


def tag(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str) -> None:
    """A small label, white on black, at a corner."""
    width = round(_font(11).getlength(text))
    draw.rectangle((at[0], at[1], at[0] + width + 5, at[1] + 14), fill="black")
    draw.text((at[0] + 3, at[1]), text, fill="white", font=_font(11))
