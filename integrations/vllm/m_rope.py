"""Positions of kept tokens in models with M-RoPE: each keeps its own place in the picture.

vLLM asks such models for positions twice: before pictures are encoded, when those of text are known, and with the rows
of every chunk, which bring their places along in channels behind the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CHANNELS, BASE = 4, 128  # row and column in two digits each, which half precision holds


def with_places(rows: Tensor, index: Tensor, width: int) -> Tensor:
    """Rows of a picture with their places behind them, (K, D + 4).

    Args:
        rows: (K, D).
        index: (K,) places of the rows in the raster.
        width: of the raster.
    """
    places = [index // width // BASE, index // width % BASE, index % width // BASE, index % width % BASE]
    return torch.cat([rows, torch.stack(places, 1).to(rows)], 1)


def text_positions(n_tokens: int, pictures: Sequence[tuple[int, int, int, int]]) -> tuple[Tensor, int]:
    """Positions of a prompt, (3, N), right for text, and what is added to a column behind it.

    Args:
        n_tokens: N.
        pictures: first column, columns, rows of tokens and columns of tokens of every picture, in order.
    """
    parts, at, base = [], 0, 0
    for first, n_columns, height, width in pictures:
        parts.append(torch.arange(base, base + first - at))
        base += first - at
        parts.append(torch.full((n_columns,), base))
        base += max(height, width)
        at = first + n_columns
    parts.append(torch.arange(base, base + n_tokens - at))
    return torch.cat(parts).expand(3, -1).clone(), base - at


def placed(
    positions: Tensor, is_picture: Tensor, rows: Sequence[Tensor], n_computed: int
) -> tuple[list[Tensor], Tensor, int]:
    """Rows without their places, positions with them, and what is added to a column behind the prompt.

    Args:
        positions: (3, N) of `text_positions`, or what this returned for an earlier chunk.
        is_picture: (N,) bool, columns of pictures.
        rows: (K, D + 4), of one picture each or of a part of it: those from column `n_computed` on.
        n_computed: columns that were computed before.
    """
    found, at = positions.clone(), is_picture.nonzero()[:, 0]
    at, is_text = at[at >= n_computed], (~is_picture).nonzero()[:, 0]
    for own in rows:
        here, at = at[: len(own)], at[len(own) :]
        high, low, left, right = own[:, -CHANNELS:].T.long().to(found.device)
        places = torch.stack([torch.zeros_like(low), high * BASE + low, left * BASE + right])
        found[:, here] = places + found[0, here[0]]  # where a picture begins is in its first row from the start
    last = int(is_text[-1]) if len(is_text) else 0  # the processor refuses a prompt that ends with a picture
    delta = int(found[0, last]) - last
    return [own[:, :-CHANNELS] for own in rows], found, delta


def pictures_of(features: Sequence[Any], merge: int) -> list[tuple[int, int, int, int]]:
    """`pictures` of `text_positions` from vLLM's features of a prompt."""
    found = []
    for feature in sorted(features, key=lambda f: f.mm_position.offset):
        _, height, width = feature.data["image_grid_thw"].data.flatten().tolist()
        place = feature.mm_position
        found.append((place.offset, place.length, int(height) // merge, int(width) // merge))
    return found
