"""Greedy coverage against a loop that works everything out again after every choice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from counter import counted, sizes_made

import tokprune
from tokprune.core.budget import REFERENCE_TEXT
from tokprune.core.layout import grid_layout
from tokprune.core.signals import Kind, Tower
from tokprune.core.tokens import VisualTokens
from tokprune.cost.selection import Widths
from tokprune.methods import coverage

WITH_CLS = Tower(24, has_cls=True)


def smooth(side: int, width: int, seed: int = 0) -> torch.Tensor:
    """(1, side * side, width): neighbours are alike, as in a picture."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, width, 6, 6, generator=generator)
    fine = F.interpolate(coarse, (side, side), mode="bicubic").flatten(2).transpose(1, 2)
    return fine + 0.05 * torch.randn(fine.shape, generator=generator)


def by_hand(x: torch.Tensor, saliency: torch.Tensor, n_keep: int) -> list[int]:
    """The definition of SCOPE, (N, D) and (N,), in double precision."""
    cosine = F.normalize(x.double(), dim=-1) @ F.normalize(x.double(), dim=-1).T
    cover, chosen = torch.zeros(len(x)), []
    for _ in range(n_keep):
        gain = (cosine - cover[:, None]).clamp(min=0).sum(0) * saliency
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        cover = cover.maximum(cosine[chosen[-1]])
    return chosen


def scope_tokens(features: torch.Tensor) -> VisualTokens:
    side = int(features.shape[1] ** 0.5)
    signals = {
        s: (2 * torch.randn(1, 1, side * side, generator=torch.Generator().manual_seed(3))).softmax(-1)
        for s in tokprune.get_method("scope").needs(WITH_CLS)
    }
    return VisualTokens.of(features, grid_layout(side, side), signals)


@pytest.mark.parametrize("side", [8, 40])
def test_scope_is_the_greedy_loop_of_its_definition(side):
    """1,600 tokens are more rows than are brought up to date after a choice."""
    tokens = scope_tokens(smooth(side, 24))
    n_keep = side * side // 4
    assert side == 8 or coverage.n_updated(1600, n_keep) < 1600
    (saliency,) = tokens.signals.values()
    got = tokprune.get_method("scope").order(tokens, n_keep)[0].tolist()
    assert got == by_hand(tokens.features[0], saliency[0, 0].double(), n_keep)


def test_alpha_zero_is_coverage_alone_and_reads_nothing():
    method = tokprune.get_method("scope", alpha=0.0)
    assert not method.needs(WITH_CLS)
    features = smooth(8, 24)
    got = method.order(VisualTokens.of(features, grid_layout(8, 8)), 16)[0].tolist()
    assert got == by_hand(features[0], torch.ones(64), 16)  # later, two tokens that cover each other alone tie


def test_cosines_that_are_not_held_give_the_same_tokens(monkeypatch):
    tokens = scope_tokens(smooth(20, 24))
    want = tokprune.get_method("scope").order(tokens, 100)
    monkeypatch.setattr(coverage, "HELD", 0)
    monkeypatch.setattr(coverage, "BLOCK", 90)
    assert torch.equal(tokprune.get_method("scope").order(tokens, 100), want)  # held, those of a pair made once
    monkeypatch.setattr(coverage, "MOST", 0)
    monkeypatch.setattr(coverage, "CHUNK", 7)
    assert torch.equal(tokprune.get_method("scope").order(tokens, 100), want)


@pytest.mark.parametrize("most", [0, 2**30])
def test_scope_costs_what_the_counter_sees(most, monkeypatch):
    tokens, method = scope_tokens(smooth(16, 24)), tokprune.get_method("scope")
    monkeypatch.setattr(coverage, "HELD", 0)
    monkeypatch.setattr(coverage, "BLOCK", 64)
    monkeypatch.setattr(coverage, "MOST", most)
    seen = counted(lambda: method.select(tokens, 30))
    assert method.cost(tokens.layout, 30, Widths(24, 8, 4, 20, False)).flops == pytest.approx(seen["all"], rel=0.01)


def test_sixteen_thousand_tokens_are_held_and_more_are_not():
    assert coverage.is_held(16384)
    assert not coverage.is_held(16385)
    assert not coverage.is_held(16384, 2)


@pytest.mark.parametrize("spec", ["scope"])
def test_no_matrix_of_all_pairs_beyond_the_limit(spec, monkeypatch):
    """The largest tensor that is ever made of more tokens than that has a chunk of rows."""
    n = 4900
    monkeypatch.setattr(coverage, "MOST", 4 * n * n - 1)
    tokens = scope_tokens(smooth(70, 8))
    with sizes_made() as sizes:
        tokprune.get_method(spec).select(tokens, 40)
    assert coverage.CHUNK * n <= max(sizes) < n * n / 4


def test_duplicates_leave_the_rest_to_saliency():
    """Once every token is covered there is no gain: the most salient ones fill up, not what rounding says."""
    tokens = scope_tokens(smooth(8, 24)[:, [0] * 32 + [9] * 32])
    (saliency,) = tokens.signals.values()
    order = tokprune.get_method("scope").order(tokens, 12)[0]
    best = saliency[0, 0].argsort(descending=True).tolist()
    first = order[:2].tolist()
    assert {i // 32 for i in first} == {0, 1}
    assert order[2:].tolist() == [i for i in best if i not in first][:10]


def test_what_was_left_out_comes_last():
    tokens = scope_tokens(smooth(8, 24))
    tokens.keep[:, ::2] = False
    keep = tokprune.get_method("scope").select(tokens, 34).keep
    assert keep[:, 1::2].all()
    assert keep.sum() == 34


# ---- mmtok


def mmtok_tokens(n_side: int, n_text: int) -> VisualTokens:
    generator = torch.Generator().manual_seed(5)
    text = torch.randn(1, n_text, 12, generator=generator)
    text[:, 1:-2] = 0
    values = {Kind.TEXT_EMBEDS: text, Kind.TOWER_STATES: smooth(n_side, 20, 6)[:, None]}
    signals = {s: values[s.kind] for s in tokprune.get_method("mmtok").needs(WITH_CLS)}
    return VisualTokens.of(smooth(n_side, 12), grid_layout(n_side, n_side), signals)


def covered_by_hand(tokens: VisualTokens, n_keep: int, alpha: float, heat: float) -> list[int]:
    """The definition of MMTok: every row's best weight, worked out for all candidates after every choice."""
    text, states = (tokens.signal(k)[0].squeeze(0).double() for k in (Kind.TEXT_EMBEDS, Kind.TOWER_STATES))
    text = F.normalize(text[(text != 0).any(1)], dim=-1)
    rows = F.normalize(tokens.features[0].double(), dim=-1)
    states = F.normalize(states, dim=-1)
    of_text = (text @ rows.T / heat).softmax(1) / len(text)
    of_picture = (states @ states.T / 0.2).softmax(1) / len(states)
    worth = torch.cat([of_text, alpha * of_picture])
    best, chosen = torch.zeros(len(worth)).double(), []
    for _ in range(n_keep):
        gain = (worth - best[:, None]).clamp(min=0).sum(0)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        best = best.maximum(worth[:, chosen[-1]])
    return chosen


@pytest.mark.parametrize("held", [4096, 0])
@pytest.mark.parametrize("side", [8, 30])
def test_mmtok_is_the_greedy_loop_of_its_definition(side, held, monkeypatch):
    monkeypatch.setattr(coverage, "HELD", held)
    monkeypatch.setattr(coverage, "MOST", held)
    tokens = mmtok_tokens(side, 7)
    n_keep = side * side // 5
    for alpha, heat in ((0.5, 0.02), (8.0, 0.1)):
        method = tokprune.get_method("mmtok", alpha=alpha, text_temperature=heat)
        assert method.order(tokens, n_keep)[0].tolist() == covered_by_hand(tokens, n_keep, alpha, heat)


def test_mmtok_without_text_covers_the_picture():
    tokens = mmtok_tokens(8, 7)
    tokens.signal(Kind.TEXT_EMBEDS).zero_()
    got = tokprune.get_method("mmtok").order(tokens, 12)[0].tolist()
    tokens.features.normal_()  # rows matter to the text alone
    assert got == tokprune.get_method("mmtok").order(tokens, 12)[0].tolist()
    assert len(set(got)) == 12


def test_mmtok_costs_what_the_counter_sees_of_usual_text():
    tokens, method = mmtok_tokens(12, REFERENCE_TEXT), tokprune.get_method("mmtok")
    seen = counted(lambda: method.select(tokens, 30))
    assert method.cost(tokens.layout, 30, Widths(12, 8, 4, 20, False)).flops == pytest.approx(seen["all"], rel=0.01)
