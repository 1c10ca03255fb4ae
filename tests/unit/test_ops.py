"""Tensor verbs against plain Python."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch

from tokprune.core import ops


def split_by_hand(weights: list[int], caps: list[int], total: int) -> list[int]:
    """Largest remainder under caps, with exact fractions; equal remainders go to the lower part."""
    share = [Fraction(0)] * len(caps)
    while sum(share) < total:
        left = total - sum(share)
        open_ = [i for i in range(len(caps)) if share[i] < caps[i]]
        weighed = [i for i in open_ if weights[i]] or open_
        own = [Fraction(weights[i]) if any(weights[j] for j in open_) else caps[i] - share[i] for i in weighed]
        for i, w in zip(weighed, own, strict=True):
            share[i] = min(share[i] + left * w / sum(own), Fraction(caps[i]))
    counts = [int(s) for s in share]
    order = sorted((i for i in range(len(caps)) if counts[i] < caps[i]), key=lambda i: (counts[i] - share[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


@pytest.mark.parametrize("seed", range(60))
def test_allocate_splits_exactly_under_caps(seed):
    draw = random.Random(seed)
    n = draw.randint(1, 9)
    weights = [draw.choice([0, 1, 2, 3, 50, draw.randint(1, 1000)]) for _ in range(n)]
    caps = [draw.randint(1, 40) for _ in range(n)]
    for total in {1, sum(caps), draw.randint(1, sum(caps))}:
        got = ops.allocate(torch.tensor([weights, weights[::-1]]).float(), caps, total)
        assert got.sum(1).tolist() == [total, total]
        assert (got <= torch.tensor(caps)).all()
        assert got[0].tolist() == split_by_hand(weights, caps, total)


def test_allocate_without_any_weight_goes_by_room():
    assert ops.allocate(torch.zeros(1, 3), [2, 4, 2], 4).tolist() == [[1, 2, 1]]


@pytest.mark.parametrize("seed", range(30))
def test_shares_on_the_host_are_those_on_the_device(seed):
    draw = random.Random(seed)
    sizes = tuple(draw.randint(1, 40) for _ in range(draw.randint(1, 8)))
    total = draw.randint(1, sum(sizes))
    assert ops.shares(sizes, total) == tuple(split_by_hand(list(sizes), list(sizes), total))
    assert ops.shares(sizes, total, even=True) == tuple(split_by_hand([1] * len(sizes), list(sizes), total))


@pytest.mark.parametrize(
    "values",
    [[0, 1, 2, 3, 4], [-2, -1, -0.0, 0.0, 1], [-1e-38, 1e-38, -1e-45, 0.0, 1e-45], [float("-inf"), -3e38, 3e38, 7, -7]],
)
def test_keep_top_of_parts_equals_sorting_every_part(values):
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor(values).float()[torch.randint(0, 5, (12, 30), generator=generator)]  # many ties
    part = torch.randint(0, 4, (30,), generator=generator)
    counts = torch.randint(0, 10, (12, 4), generator=generator)
    keep = ops.keep_top_of_parts(scores, part, counts)
    for g in range(12):
        for p in range(4):
            own = [i for i in range(30) if part[i] == p]
            best = sorted(own, key=lambda i: (-float(scores[g, i]), i))[: int(counts[g, p])]
            assert [i for i in own if keep[g, i]] == sorted(best)


@pytest.mark.parametrize("values", [(), [], (3, 1, 2), [2**40], range(4), (True, False), [False]])
def test_host_values_arrive_as_torch_makes_them(values):
    found = ops.on_device(values, torch.device("cpu"))
    assert torch.equal(found, torch.tensor(list(values), dtype=None if len(values) else torch.int64))
    assert found.dtype == (torch.bool if len(values) and isinstance(values[0], bool) else torch.int64)


def test_outliers_are_those_of_numpy():
    import numpy as np

    values = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).exp()
    low, high = np.percentile(values.numpy(), [25, 75], axis=1)
    want = values.numpy() > (high + 1.5 * (high - low))[:, None]
    assert ops.outliers(values).tolist() == want.tolist()
    assert want.any()


def test_first_highest_takes_the_lower_index():
    assert ops.first_highest(torch.tensor([[0.0, 2, 2, 1], [-1, -1, -1, -1]])).tolist() == [1, 0]
