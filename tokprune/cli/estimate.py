"""Models that are not loaded, by their configuration, for `tokprune flops`."""

from __future__ import annotations

from pathlib import Path

from tokprune.eval.models import path_of

from ..core.errors import RunError, why_unloadable
from ..cost.flops import Shape
from ..cost.shapes import KNOWN, known_shape

MOST = 10_000_000  # above this, counting tokens one by one takes too long


def tokens_of(shape: Shape, pixels: str, n_frames: int) -> tuple[int, int]:
    """Visual tokens and crops of a picture or video of so many pixels, such as "1500x2000".

    Raises:
        RunError: no size.
        UnsupportedModelError: a model whose tokens the size does not decide.
    """
    if not pixels:
        raise RunError("--frames needs the size of a frame: add --pixels 448x448")
    sides = pixels.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) for side in sides):
        raise RunError(f"invalid --pixels {pixels!r}: use width and height, as 1500x2000")
    return shape.tokens_of(int(sides[0]), int(sides[1]), n_frames)


def shape_of(model: str) -> Shape:
    """A known shape, or that of an embedded model, a folder or a hub id; remote code is never run.

    Raises:
        RunError: its configuration cannot be read.
    """
    folder = path_of(model)
    if model in KNOWN or ("/" not in folder and not Path(folder).exists()):
        return known_shape(model)
    from transformers import AutoConfig

    from tokprune.integrations.transformers import shape_from_config

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a broken or foreign folder makes transformers raise
        raise RunError(f"cannot read the configuration of {model!r}: {why_unloadable(error)}") from error
    return shape_from_config(config)
