"""A user's pictures: loaded as transformers loads them, scaled or refused where its conversion would ruin them."""

from __future__ import annotations

import os
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from ..core.errors import TaskError

SAVE = "save it as an 8-bit PNG"
_DEEPEST = 65535  # of grey in 16 bits


def open_drawing(file: IO[bytes]) -> Image.Image:
    """A picture with its transparency, RGBA, from an open file."""
    with Image.open(file) as picture:
        return picture.convert("RGBA")


def open_picture(path: str | os.PathLike[str], instead: str = "name a PNG or JPEG file") -> Image.Image:
    """A picture from its file, RGB, as `as_rgb` makes it.

    Args:
        path: of any file that Pillow reads; of several frames or pages it is the first.
        instead: what to do about one that cannot be read, for the message.

    Raises:
        TaskError: it cannot be read, or `as_rgb` says why it is refused.
    """
    try:
        with Image.open(path) as picture:
            return as_rgb(picture)
    except Exception as error:  # whatever a broken file makes Pillow raise
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise TaskError(f"cannot read the picture {path}: {said}; {instead}") from error


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture upright and in RGB, by the pixel what `transformers.image_utils.load_image` gives.

    That one turns pictures as their EXIF data say and drops transparency. It also clips grey of more than 8 bits to
    white and black; here 16 bits are scaled to 8, and floats in 0..1 likewise.

    Raises:
        TaskError: what it shows would be lost, or nobody can tell in which range its values are.
    """
    if 0 in picture.size:
        raise TaskError(f"it is {picture.width} x {picture.height} pixels large; it shows nothing")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        return _of_grey(_whole(np.asarray(picture)))
    if picture.mode == "F":
        return _of_grey(_float(np.asarray(picture)))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        return _opaque(picture.convert("RGBA"))
    return picture.convert("RGB")


def _of_grey(values: np.ndarray) -> Image.Image:
    """From values in 0..255, (H, W)."""
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")


def _whole(values: np.ndarray) -> np.ndarray:
    """Grey of 16 bits, perhaps in 32, as values in 0..255."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > _DEEPEST:
        raise TaskError(f"its grey values go from {low} to {high}, which are not those of 16 bits; {SAVE}")
    if 0 < high < 256:
        raise TaskError(f"its grey values end at {high} of {_DEEPEST}, so it would be black in 8 bits; {SAVE}")
    return values * (255 / _DEEPEST)


def _float(values: np.ndarray) -> np.ndarray:
    """Grey as floats, in 0..1 or 0..255, as values in 0..255."""
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= 255:  # NaN is not
        raise TaskError(f"its values are floats from {low:g} to {high:g}, neither in 0..1 nor in 0..255; {SAVE}")
    return values * 255 if high <= 1 else values


def _opaque(picture: Image.Image) -> Image.Image:
    """RGBA without its transparency."""
    pixels = np.asarray(picture)
    varies = (pixels != pixels[0, 0]).any((0, 1))
    if varies[3] and not varies[:3].any():
        raise TaskError("all that it shows is in its transparency, which models do not see; save it on a background")
    return picture.convert("RGB")
