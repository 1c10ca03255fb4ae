"""findone: one small coloured shape of findit on its busy background; answering needs the few tokens that show it.

Easier for a language model than findit, where it must also find out which of several shapes is asked about. A shape
covers 4 to 9 of the 144 patches of 8 pixels, and there are two questions about it: its colour and its shape.
"""

from __future__ import annotations

import numpy as np

from . import findit

KINDS = ("colour", "shape")


def draw(split: str, index: int) -> tuple[np.ndarray, list[findit.Shape]]:
    """Scene `index` of a split: the picture, (96, 96, 3) uint8, and the shape in it."""
    rng = np.random.default_rng((20_28, findit.SPLITS[split], index))
    image = findit.background(rng)
    width = int(rng.integers(12, 18))
    x, y = (int(v) for v in rng.integers(1, findit.SIZE - width, 2))
    shapes = findit.paint_shapes(image, rng, [(x, y, width)])
    return np.clip(image, 0, 255).astype(np.uint8), shapes


class FindOne(findit.FindIt):
    """The task; two questions a scene."""

    name = "findone"
    kinds = KINDS
    seed = 20_29
    draw = staticmethod(draw)
