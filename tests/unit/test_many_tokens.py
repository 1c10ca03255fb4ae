"""Parts of selections that compare many tokens, each against its plain form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from counter import sizes_made

from tokprune.core.layout import frames_layout
from tokprune.core.signals import Tower
from tokprune.core.tokens import VisualTokens
from tokprune.methods import clustering, fastvid, neighbours, prumerge, tokencorr, tome


def kinds(n: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(9, width, generator=generator)
    which = torch.randint(0, 9, (2, n), generator=generator)
    return centres[which] + 0.5 * torch.randn(2, n, width, generator=generator)


@pytest.mark.parametrize("length", [2, 16])
def test_lists_of_neighbours_give_the_nearest_of_what_is_left(length, monkeypatch):
    """With short lists most tokens have none of the others in theirs."""
    monkeypatch.setattr(neighbours, "LENGTH", length)
    monkeypatch.setattr(neighbours, "ROWS", 7)
    x = kinds(90, 16)[0]
    cosine = F.normalize(x.double(), dim=-1) @ F.normalize(x.double(), dim=-1).T
    nearest, left = neighbours.NearestOfMany(x), torch.randperm(90, generator=torch.Generator().manual_seed(1))
    while len(left) > 9:
        first, second = left[::2], left[1::2]
        torch.testing.assert_close(nearest(first, second).double(), cosine[first][:, second].amax(1))
        left = torch.cat([first[3:], second])


def test_lists_are_made_where_half_are_gone():
    assert list(neighbours.rounds_with_lists([100, 80, 51, 50, 30, 25, 24])) == [100, 50, 25]


def test_similar_rows_are_counted_once_a_pair(monkeypatch):
    monkeypatch.setattr(tokencorr, "BLOCK", 17)
    x = kinds(60, 8)
    unit = F.normalize(x, dim=-1)
    assert torch.equal(tokencorr._n_similar(x, 0.7).long(), (unit @ unit.transpose(1, 2) > 0.7).sum(2))


def test_distances_of_clusters_are_those_of_differences():
    x = kinds(600, 24)
    x[:, 1::5] = x[:, :1]
    x[:, 3] = 0
    distance = clustering._distances(x)
    want = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist") / 24**0.5
    torch.testing.assert_close(distance.double(), want, atol=0, rtol=1e-6)
    assert torch.equal(distance, distance.transpose(1, 2))


def test_sums_of_neighbours_are_those_of_the_dense_product():
    x, weights = kinds(50, 12), torch.rand(2, 50)
    unit, chosen = F.normalize(x, dim=-1), torch.tensor([[3, 9, 20], [0, 49, 7]])
    near = prumerge._neighbours(unit, chosen, 8)
    assert not (near == chosen[..., None]).any()
    dense = torch.zeros(2, 3, 50).scatter(2, near, weights[:, None].expand(-1, 3, -1).gather(2, near)) @ x
    torch.testing.assert_close(prumerge._weighted_sums(x, near, weights), dense)
    assert prumerge._weighted_sums(x, near[:, :0], weights).shape == (2, 0, 12)


def test_pairs_in_parts_are_the_same_pairs(monkeypatch):
    a, b = kinds(40, 8), kinds(33, 8, 1)
    want = tome._most_similar(a, b)
    monkeypatch.setattr(tome.ops, "LARGEST", 200)
    for part, whole in zip(tome._most_similar(a, b), want, strict=True):
        torch.testing.assert_close(part, whole)


@pytest.mark.parametrize("rule", ["exact", "llava_onevision", "llava_video", "qwen2_5_vl"])
def test_centres_of_other_segments_are_not_compared(rule, monkeypatch):
    layout, generator = frames_layout(24, 4, 4), torch.Generator().manual_seed(0)
    scenes = torch.randn(4, 16, 8, generator=generator).repeat_interleave(6, 0)
    x = (scenes + 0.3 * torch.randn(2, 24, 16, 8, generator=generator)).flatten(1, 2)
    method = fastvid.FastVID(rule=rule, segments=4)
    signals = {s: torch.rand(2, 1, 384, generator=generator) for s in method.needs(Tower(24, has_cls=True))}
    tokens, found = VisualTokens.of(x, layout, signals), []
    for few in (10**9, 0):
        monkeypatch.setattr(fastvid, "FEW", few)
        with sizes_made() as sizes:
            found.append((method.select(tokens, 96), sum(sizes)))
    (every, n_every), (own, n_own) = found
    assert torch.equal(every.keep, own.keep)
    torch.testing.assert_close(every.features, own.features)
    assert n_own < n_every
