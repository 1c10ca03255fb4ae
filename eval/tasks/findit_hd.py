"""findit_hd: the shapes of findit on a large picture, huddled in one or two of its quarters.

A picture of 192 x 192, 144 x 192 or 192 x 144 pixels (height x width): a model that looks at it through a
thumbnail of 96 x 96 and crops of the same size sees colours in the thumbnail, but shapes of 6 to 8 pixels
there: what shape has which colour is legible only in the crops, and no crop but one or two shows any.
"""

from __future__ import annotations

import numpy as np

from . import findit

SIZES = ((192, 192), (144, 192), (192, 144))  # height, width
KINDS = ("colour", "shape", "existence")
MARGIN = 2  # pixels between a shape and the middle lines, on which crops meet


def size(index: int) -> tuple[int, int]:
    """Height and width of scene `index`: every second one is square."""
    return SIZES[(0, 1, 0, 2)[index % 4]]


def draw(split: str, index: int) -> tuple[np.ndarray, list[findit.Shape]]:
    """Scene `index` of a split: the picture, (height, width, 3) uint8, and what is in it."""
    rng = np.random.default_rng((20_28, findit.SPLITS[split], index))
    height, width = size(index)
    image = findit.background(rng, height, width)
    quarters = rng.permutation(4)[: int(rng.choice([1, 1, 2]))]
    n_shapes = int(rng.choice([5, 6, 7, 8]))
    shapes = findit.paint_shapes(image, rng, _place(rng, n_shapes, quarters, height // 2, width // 2))
    return np.clip(image, 0, 255).astype(np.uint8), shapes


def _place(
    rng: np.random.Generator, n_shapes: int, quarters: np.ndarray, height: int, width: int
) -> list[tuple[int, int, int]]:
    """Boxes (left, top, side) within quarters of height x width; every quarter gets one before any gets two."""
    boxes: list[tuple[int, int, int]] = []
    for _ in range(40 * n_shapes):
        if len(boxes) == n_shapes:
            break
        turn = len(boxes) if len(boxes) < len(quarters) else int(rng.integers(len(quarters)))
        row, column = divmod(int(quarters[turn]), 2)
        side = int(rng.integers(12, 17))
        x = column * width + int(rng.integers(MARGIN, width - side - MARGIN))
        y = row * height + int(rng.integers(MARGIN, height - side - MARGIN))
        if findit.is_free((x, y, side), boxes):
            boxes.append((x, y, side))
    return boxes


class FindItHD(findit.FindIt):
    """The task: what colour, what shape, is it there; about the scenes of a split."""

    name = "findit_hd"
    kinds = KINDS
    seed = 20_29
    draw = staticmethod(draw)
