"""What the controls show in place of pruning: a smaller picture, or fewer frames, of about as many tokens.

How many tokens a picture has, only its processor knows: towers of any size give a smaller picture fewer tokens, towers
that cut crops give it fewer crops, and towers of one size always give it as many. So sizes are tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

LEAST_SIDE = 14  # pixels; no patch is smaller than half of it

Size = tuple[int, int]  # width, height


class Seen(NamedTuple):
    """What a processor makes of a picture: visual tokens, and the pixels that the tower is given (of one frame)."""

    n_visual: int
    n_pixels: int


def smaller(size: Size, wanted: int, seen: Callable[[Size], Seen]) -> Size:
    """The size of the picture that stands for `wanted` tokens: the one whose number of tokens is nearest.

    Where no picture has so few tokens, it is a low-pass: of the pixels that the tower sees, its share is that of the
    wanted tokens, and the processor makes it larger again. Then it has more tokens than wanted.

    Args:
        size: of the whole picture.
        wanted: tokens, at least 1.
        seen: what the processor makes of a size.
    """
    least = min(1.0, LEAST_SIDE / min(size))
    fewest = seen(_scaled(size, least)).n_visual
    fits, exceeds = _largest(size, max(wanted, fewest), least, seen)
    if fewest > wanted:
        pixels = min(fits[0] * fits[1], seen(fits).n_pixels)
        return _scaled(size, min(1.0, math.sqrt(pixels * wanted / fewest / (size[0] * size[1]))))
    return min(fits, exceeds, key=lambda s: abs(seen(s).n_visual - wanted))


def _largest(size: Size, most: int, least: float, seen: Callable[[Size], Seen]) -> tuple[Size, Size]:
    """The largest picture with at most so many tokens, and the next larger one; both are the whole where it fits."""
    low, high = least, 1.0
    if seen(size).n_visual <= most:
        return size, size
    while _scaled(size, low) != _scaled(size, high) and (high - low) * max(size) > 1:
        middle = (low + high) / 2
        if seen(_scaled(size, middle)).n_visual <= most:
            low = middle
        else:
            high = middle
    return _scaled(size, low), _scaled(size, high)


def _scaled(size: Size, scale: float) -> Size:
    width, height = (max(1, round(side * scale)) for side in size)
    return width, height
