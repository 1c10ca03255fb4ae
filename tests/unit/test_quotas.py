"""HiPrune's neighbours and HoloV's stripes, worked out by hand."""

from __future__ import annotations

import torch
from specs import mosaic_layout

import tokprune
from tokprune.core.layout import Layout, frames_layout, grid_layout
from tokprune.core.signals import Tower
from tokprune.core.tokens import VisualTokens

WITH_CLS = Tower(24, has_cls=True)


def marked(layout: Layout, at: list[int], faithful: bool = False) -> list[int]:
    anchors = torch.zeros(1, layout.n_visual, dtype=torch.bool)
    anchors[0, at] = True
    near = tokprune.get_method("hiprune", faithful=faithful).around(anchors, layout)
    return near[0].nonzero()[:, 0].tolist()


def test_neighbours_stay_in_their_row_crop_and_frame():
    grid = grid_layout(4, 5)
    assert marked(grid, [7]) == [2, 6, 8, 12]
    assert marked(grid, [4]) == [3, 9]
    assert marked(grid, [15, 16]) == [10, 11, 15, 16, 17]
    assert marked(frames_layout(2, 2, 2), [3]) == [1, 2]
    mosaic = mosaic_layout(2, (1, 2))  # thumbnail 0..3, then rows of both crops: 4 5 | 6 7 and 8 9 | 10 11
    assert marked(mosaic, [5]) == [4, 9]
    assert marked(mosaic, [0]) == [1, 2]


def test_faithful_neighbours_wrap_and_are_clamped():
    grid = grid_layout(4, 5)
    assert marked(grid, [4], faithful=True) == [0, 3, 5, 9]
    assert marked(grid, [17], faithful=True) == [12, 16, 18, 19]


def hiprune_tokens(middle: torch.Tensor, late: torch.Tensor) -> VisualTokens:
    (signal,) = tokprune.get_method("hiprune").needs(WITH_CLS)
    assert signal.layers == (8, 22)
    values = {signal: torch.stack([middle, late])[None]}
    return VisualTokens.of(torch.zeros(1, 20, 1), grid_layout(4, 5), values)


def test_anchors_then_neighbours_then_late_attention():
    middle, late = torch.linspace(0.1, 0.3, 20), torch.linspace(0.3, 0.1, 20)
    middle[7] = 1.0
    tokens = hiprune_tokens(middle, late)
    for n_keep, alpha, want in (
        (8, 0.5, [0, 1, 2, 3, 6, 7, 8, 12]),
        (4, 1.0, [2, 6, 7, 8]),  # fewer than an anchor with its neighbours: the anchor, and what late attention prefers
        (8, 0.1, [0, 1, 2, 3, 4, 5, 6, 7]),  # no anchor
    ):
        keep = tokprune.get_method("hiprune", alpha=alpha).select(tokens, n_keep).keep
        assert keep[0].nonzero()[:, 0].tolist() == want


def holov_tokens(attention: list[float]) -> VisualTokens:
    (signal,) = tokprune.get_method("holov").needs(WITH_CLS)
    n = len(attention)
    features = torch.arange(n)[None, :, None].float()
    return VisualTokens.of(features, grid_layout(1, n), {signal: torch.tensor(attention)[None, None]})


def test_a_full_stripe_leaves_its_share_to_the_others():
    """Stripes of 3, 3 and 2 tokens with means 6, 2 and 1: of 6 tokens 4, 1.3 and .7; the first has 3."""
    tokens = holov_tokens([6.0, 5, 7, 1, 3, 2, 0.5, 1.5])
    method = tokprune.get_method("holov", stripes=3)
    assert method.quotas(tokens, 6).tolist() == [[3, 2, 1]]
    assert method.select(tokens, 6).keep[0].nonzero()[:, 0].tolist() == [0, 1, 2, 4, 5, 7]


def test_the_codes_quotas_lose_what_does_not_fit():
    """4, 1.33 and .67 are floored, and the one that is left goes to the largest mean; order by attention."""
    tokens = holov_tokens([6.0, 5, 7, 1, 3, 2, 0.5, 1.5])
    method = tokprune.get_method("holov", stripes=3, faithful=True)
    assert method.quotas(tokens, 6).tolist() == [[5, 1, 0]]
    out = method.select(tokens, 6)
    assert out.features[0, out.keep[0], 0].tolist() == [0, 1, 2, 4]
    few = method.select(tokens, 3)
    assert few.features[0, few.keep[0], 0].tolist() == [0, 1, 2]
    two = tokprune.get_method("holov", stripes=1, faithful=True).select(tokens, 3)
    assert two.features[0, two.keep[0], 0].tolist() == [2, 0, 1]


def test_stripes_of_one_token_weigh_little_in_the_code():
    tokens = holov_tokens([1.0, 1, 50])
    assert tokprune.get_method("holov", stripes=2, faithful=True).quotas(tokens, 2).tolist() == [[2, 0]]
    assert tokprune.get_method("holov", stripes=2).quotas(tokens, 2).tolist() == [[1, 1]]
