"""Golden cases of 2026, pictures: from a case to the registered method. It decides nothing, as `golden_harness`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from golden_harness import Case, assert_kept

import tokprune
from tokprune.core.layout import grid_layout
from tokprune.core.signals import Tower
from tokprune.core.tokens import VisualTokens


def check_pixelprune(case: Case) -> None:
    """Pixel values of the patches of every picture, four patches a cell."""
    inputs, expected = case.load()
    method = tokprune.get_method("pixelprune", tau=case.params["threshold"], anchored=case.params["anchored"])
    (signal,) = method.needs(Tower(24, False))
    grids = [(h // 2, w // 2) for _, h, w in inputs["grid_thw"].tolist()]
    cells = inputs["pixel_values"].unflatten(0, (-1, 4)).flatten(1).split([h * w for h, w in grids])
    for i, ((h, w), own) in enumerate(zip(grids, cells, strict=True)):
        tokens = VisualTokens.of(torch.zeros(1, h * w, 1), grid_layout(h, w), {signal: own[None, None]})
        assert_kept(method.select(tokens, 0).keep, expected[f"kept_{i}"][None])


PICTURE_CHECKS: dict[str, Callable[[Case], None]] = {
    "pixelprune": check_pixelprune,
}
