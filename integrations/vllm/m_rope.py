"""Positions of kept tokens in models with M-RoPE: each keeps its own place in the picture or video.

vLLM asks such models for positions twice: before pictures are encoded, when those of text are known, and with the rows
of every chunk, which bring their places along in channels behind the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokprune.core.layout import Layout

CHANNELS, BASE = 6, 128  # time, row and column in two digits each, which half precision holds
UNPLACED = -1  # the column of a visual token whose place is not known yet


def with_places(rows: Tensor, index: Tensor, layout: Layout, interval: float = 1.0) -> Tensor:
    """Rows of a picture or video with their places behind them, (K, D + 6).

    Args:
        rows: (K, D).
        index: (K,) places of the rows in the layout.
        layout: one raster, or one a step of a video.
        interval: positions from one step of a video to the next.
    """
    n_steps, n_tokens = layout.frames
    times = torch.tensor([int(step * interval) for step in range(n_steps)]).to(index.device, non_blocking=True)
    within = index % n_tokens
    places = [times[index // n_tokens], within // layout.width, within % layout.width]
    digits = [digit for place in places for digit in (place // BASE, place % BASE)]
    return torch.cat([rows, torch.stack(digits, 1).to(rows)], 1)


def text_positions(n_tokens: int, pictures: Sequence[tuple[int, int, int]]) -> tuple[Tensor, int]:
    """Positions of a prompt, (3, N), right for text, and what is added to a column behind it.

    Visual tokens have the position where their picture begins, and -1 in the last row.

    Args:
        n_tokens: N.
        pictures: first column, columns, and positions that it takes up, of every picture or video, in order.
    """
    parts, at, base = [], 0, 0
    for first, n_columns, extent in pictures:
        parts.append(torch.arange(base, base + first - at).expand(3, -1))
        base += first - at
        parts.append(torch.tensor([base, base, UNPLACED])[:, None].expand(-1, n_columns))
        base += extent
        at = first + n_columns
    parts.append(torch.arange(base, base + n_tokens - at).expand(3, -1))
    return torch.cat(parts, 1), base - at


def placed(
    positions: Tensor, is_picture: Tensor, rows: Sequence[Tensor], n_computed: int
) -> tuple[list[Tensor], Tensor, int]:
    """Rows without their places, positions with them, and what is added to a column behind the prompt.

    Args:
        positions: (3, N) of `text_positions`, or what this returned for an earlier chunk.
        is_picture: (N,) bool, columns of pictures and videos.
        rows: (K, D + 6), of one picture each or of a part of it: those from column `n_computed` on.
        n_computed: columns that were computed before.
    """
    found, at = positions.clone(), is_picture.nonzero()[:, 0]
    at, is_text = at[at >= n_computed], (~is_picture).nonzero()[:, 0]
    for own in rows:
        here, at = at[: len(own)], at[len(own) :]
        high, low = own[:, -CHANNELS:].T.long().to(found.device).unflatten(0, (3, 2)).unbind(1)
        places, (begin, _, column) = high * BASE + low, found[:, here[0]]
        if column != UNPLACED:  # of a request that was set aside
            begin = begin - places[0, 0]
        found[:, here] = begin + places
    last = int(is_text[-1]) if len(is_text) else 0  # the processor refuses a prompt that ends with a picture
    delta = int(found[0, last]) - last
    return [own[:, :-CHANNELS] for own in rows], found, delta


def pictures_of(features: Sequence[Any], merge: int, per_second: float) -> list[tuple[int, int, int]]:
    """`pictures` of `text_positions` from vLLM's features of a prompt.

    Args:
        features: of its pictures and videos.
        merge: patches along a side of a token.
        per_second: positions that a second of a video takes up.
    """
    found = []
    for feature in sorted(features, key=lambda f: f.mm_position.offset):
        steps, height, width = map(int, feature.data[f"{feature.modality}_grid_thw"].data.flatten().tolist())
        seconds = feature.data.get("second_per_grid_ts")
        last = int((steps - 1) * interval_of(None if seconds is None else seconds.data, per_second))
        place = feature.mm_position
        found.append((place.offset, place.length, max(1 + last, height // merge, width // merge)))
    return found


def interval_of(seconds: Any, per_second: float) -> float:
    """Positions from one step of a video to the next, as vLLM counts them.

    Args:
        seconds: of a step; None where the processor says nothing.
        per_second: positions that a second takes up.
    """
    return per_second * (1.0 if seconds is None else float(seconds))
