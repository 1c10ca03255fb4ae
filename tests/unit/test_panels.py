"""Choices in panels against the same choices one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from counter import sizes_made

import tokprune
from tokprune.core.layout import grid_layout
from tokprune.core.tokens import VisualTokens
from tokprune.methods import panels


@pytest.fixture
def many(monkeypatch):
    """Any number of tokens counts as many, with panels of a few candidates."""
    monkeypatch.setattr(panels, "HELD", 0)
    monkeypatch.setattr(panels, "CANDIDATES", 24)
    monkeypatch.setattr(panels, "LONGEST", 10)


def kinds(n_images: int, n: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    centres = torch.randn(12, width, generator=generator)
    which = torch.randint(0, 12, (n_images, n), generator=generator)
    return centres[which] + 0.5 * torch.randn(n_images, n, width, generator=generator)


def relevance_of(x: torch.Tensor) -> torch.Tensor:
    return torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(1))


def farthest_by_hand(x: torch.Tensor, n_keep: int) -> list[int]:
    """DivPrune of (N, D) in double precision."""
    unit = F.normalize(x.double(), dim=-1)
    distance = 1 - unit @ unit.T
    chosen = [int(distance.clone().fill_diagonal_(9).amin(1).argmax())]
    while len(chosen) < n_keep:
        nearest = distance[chosen].amin(0)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return chosen


def determinant_by_hand(x: torch.Tensor, relevance: torch.Tensor, n_keep: int) -> list[int]:
    """The greedy choice for a determinantal point process, from the determinants themselves, in double precision."""
    rows = F.normalize(x.double(), dim=-1) * relevance.double()[:, None]
    kernel, chosen = rows @ rows.T, []
    for _ in range(n_keep):
        of = [kernel[chosen + [i]][:, chosen + [i]].det() if i not in chosen else -1 for i in range(len(x))]
        chosen.append(int(torch.tensor(of).argmax()))
    return chosen


@pytest.mark.usefixtures("many")
def test_panels_choose_what_the_definitions_choose():
    x = kinds(2, 100, 48)
    relevance = relevance_of(x)
    farthest = tokprune.get_method("divprune").order(VisualTokens.of(x, grid_layout(10, 10)), 40)
    probable = tokprune.get_method("cdpruner").order(x, relevance, 30)
    for g in range(2):
        assert farthest[g].tolist() == farthest_by_hand(x[g], 40)
        assert probable[g].tolist() == determinant_by_hand(x[g], relevance[g], 30)


@pytest.mark.parametrize("n_keep", [1, 2, 11, 150, 400])
@pytest.mark.parametrize("what", ["kinds", "duplicates", "all alike"])
def test_panels_choose_what_is_chosen_one_by_one(what, n_keep, request):
    """Also beyond the rank of the features, where relevance and the lower index decide."""
    x = kinds(2, 400, 24)
    if what == "duplicates":
        x[:, ::3] = x[:, :1]
    if what == "all alike":
        x[:] = torch.eye(24)[0]
    tokens, relevance = VisualTokens.of(x, grid_layout(20, 20)), relevance_of(x)
    farthest, probable = tokprune.get_method("divprune"), tokprune.get_method("cdpruner")
    want = farthest.order(tokens, n_keep), probable.order(x, relevance, n_keep)
    request.getfixturevalue("many")
    assert torch.equal(probable.order(x, relevance, n_keep), want[1])
    got = farthest.order(tokens, n_keep)
    assert [len(set(own)) for own in got.tolist()] == [n_keep] * 2
    if what != "duplicates" or n_keep < 150:  # behind that, copies differ by rounding alone
        assert torch.equal(got, want[0])


@pytest.mark.parametrize("name", ["divprune", "cdpruner"])
def test_no_matrix_of_all_pairs_of_many_tokens(name):
    n = 4900

    x = kinds(1, n, 8)
    with sizes_made() as sizes:
        if name == "divprune":
            tokprune.get_method(name).order(VisualTokens.of(x, grid_layout(70, 70)), 40)
        else:
            tokprune.get_method(name).order(x, relevance_of(x), 40)
    assert n < max(sizes) < n * n / 4
