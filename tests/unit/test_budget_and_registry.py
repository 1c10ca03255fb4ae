"""Counts, pure verbs and names."""

from __future__ import annotations

import pytest
import torch

import tokprune
from tokprune.core import ops
from tokprune.core.budget import Budget
from tokprune.core.errors import BudgetError, MissingSignalError, OptionError
from tokprune.core.layout import grid_layout
from tokprune.core.registry import Registry
from tokprune.core.signals import Decoder, Kind, Signal, Tower
from tokprune.core.tokens import VisualTokens
from tokprune.methods import METHODS
from tokprune.prune.request import request_of


@pytest.mark.parametrize(
    ("ratio", "n_visual", "n_keep"),
    [
        (0.25, 576, 144),
        (0.11, 144, 16),
        (0.5, 49, 25),  # half up, where Python's round goes to even
        (0.5, 51, 26),
        (0.145, 100, 15),  # below 14.5 in binary
        (0.001, 576, 1),
        (1.0, 576, 576),
        (0.9999, 576, 576),
        (1, 7, 7),
    ],
)
def test_ratio_is_rounded_half_up_within_one_and_all(ratio, n_visual, n_keep):
    assert Budget(keep_ratio=ratio).n_keep(n_visual) == n_keep


@pytest.mark.parametrize("spec", ["fopru", "fastv", "uniform+visual_exit"])
def test_flops_of_a_model_whose_cost_is_not_known_are_refused(spec):
    request = request_of(spec, flops_ratio=0.5)
    with pytest.raises(BudgetError, match="are not known; use keep_ratio or keep_tokens"):
        request.check(Decoder(8), None)
    request_of(spec, keep_ratio=0.5).check(Decoder(8), None)


def test_tokens_above_all_clamp():
    assert Budget(keep_tokens=1000).n_keep(576) == 576


def test_keep_top_is_ascending_and_stable():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    assert ops.keep_top(scores, 2).tolist() == [[1, 2]]
    assert ops.keep_top(scores, 4).tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(("height", "width"), [(12, 12), (24, 24), (3, 8), (8, 3), (1, 9), (9, 1)])
def test_spread_gives_distinct_cells_for_every_count(height, width):
    for n_keep in range(1, height * width + 1):
        cells = ops.spread(height, width, n_keep)
        assert len(set(cells)) == n_keep
        assert 0 <= cells[0] <= cells[-1] < height * width


@pytest.mark.parametrize(("height", "width"), [(12, 12), (24, 24), (3, 8), (8, 3), (1, 9)])
def test_pool_grid_fits_the_budget_and_the_picture(height, width):
    for n_keep in range(1, height * width + 1):
        rows, columns = ops.pool_grid(height, width, n_keep)
        assert 1 <= rows <= height
        assert 1 <= columns <= width
        assert rows * columns <= n_keep


def test_layers_scale_with_depth():
    assert [Tower(n, True).scaled(16, 24) for n in (24, 12, 5, 27)] == [16, 8, 3, 18]
    assert Tower(5, True).layer(-2) == 3


def test_signal_that_is_missing_says_what_is_there():
    tokens = VisualTokens.of(torch.zeros(1, 4, 2), grid_layout(2, 2), {Signal(Kind.GIVEN, (1,)): torch.zeros(1, 1, 4)})
    with pytest.raises(MissingSignalError, match=r"CLS_ROW.*present: GIVEN \(softmax\)"):
        tokens.signal(Kind.CLS_ROW)


def test_layout_knows_rows_that_show_no_patch():
    layout = grid_layout(2, 3, n_leading=1)
    assert (layout.n_visual, layout.height, layout.width, layout.visual) == (6, 2, 3, (1, 2, 3, 4, 5, 6))
    assert layout.without_specials == grid_layout(2, 3)


def test_every_method_loads_and_prints_its_options():
    for name in tokprune.list_methods():
        assert str(METHODS.build(name)).endswith(")")
    assert str(tokprune.get_method("fastervlm")) == "VTCCLS(split=even, start_layer=-2)"
    assert str(tokprune.get_method("fopru:strategy=row", layer=3)) == "FoPru(strategy=row, layer=3)"


@pytest.mark.parametrize(
    ("spec", "value"),
    [("vtc_cls:start_layer=none", None), ("vtc_cls:start_layer=-3", -3), ("fastervlm:start_layer=2", 2)],
)
def test_specification_is_read_by_declared_type(spec, value):
    assert tokprune.get_method(spec).start_layer == value


@pytest.mark.parametrize("text", ["2.5", "two", "", "true"])
def test_specification_of_the_wrong_type_is_refused(text):
    with pytest.raises(OptionError, match="start_layer=.*a whole number or None"):
        tokprune.get_method(f"vtc_cls:start_layer={text}")


def test_registry_without_a_near_name_offers_none():
    with pytest.raises(tokprune.TokPruneError, match=r"^no fruit named 'xyz'\. Available: apple$"):
        Registry("fruit", {"apple": "a:A"}).load("xyz")


def test_unscored_method_must_be_written():
    from tokprune.methods.base import Method, ScoreMethod

    tokens = VisualTokens.of(torch.zeros(1, 4, 2), grid_layout(2, 2))
    with pytest.raises(NotImplementedError):
        Method().select(tokens, 2)
    with pytest.raises(NotImplementedError):
        ScoreMethod().select(tokens, 2)
