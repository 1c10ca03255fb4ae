"""VisPruner's rounds against a loop over lists."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tokprune
from tokprune.methods import coverage, vispruner


def by_hand(x: torch.Tensor, n_keep: int, step: int, raster: bool) -> list[int]:
    """Which rows of (R, D) are left, from the description."""
    unit = F.normalize(x.double(), dim=-1)
    left = list(range(len(x)))
    while len(left) > n_keep:
        even, odd = left[::2], left[1::2]
        scored = [(max(float(unit[a] @ unit[b]) for b in odd), a) for a in even]
        falling = [a for _, a in sorted(scored, key=lambda pair: -pair[0])]
        left = falling[min(step, len(left) - n_keep) :] + odd
        left = sorted(left) if raster else left
    return left


@pytest.mark.parametrize("variant", ["authors", "angelslim"])
@pytest.mark.parametrize(("n", "n_keep"), [(40, 12), (41, 12), (37, 1), (9, 1), (2, 1), (3, 2), (15, 7), (15, 15)])
def test_any_number_is_left_of_any_number(variant, n, n_keep):
    x = torch.randn(2, n, 6, generator=torch.Generator().manual_seed(n))
    got = tokprune.get_method("vispruner", variant=variant).diverse(x, n_keep)
    assert got.tolist() == [by_hand(own, n_keep, 8, variant == "angelslim") for own in x]


def test_of_many_tokens_as_large_a_share_leaves_in_a_round_without_a_matrix_of_all(monkeypatch):
    monkeypatch.setattr(vispruner, "HELD", 100)
    monkeypatch.setattr(coverage, "HELD", 100)
    monkeypatch.setattr(coverage, "CHUNK", 16)
    x = torch.randn(1, 301, 6, generator=torch.Generator().manual_seed(1))
    got = tokprune.get_method("vispruner").diverse(x, 40)
    assert got[0].tolist() == by_hand(x[0], 40, 301 * 8 // 576, False)
