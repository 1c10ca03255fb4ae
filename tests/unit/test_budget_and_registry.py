"""Counts, pure verbs and names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

import tokprune
from tokprune.core import ops
from tokprune.core.budget import Budget
from tokprune.core.errors import BudgetError, MethodError, MissingSignalError, OptionError
from tokprune.core.layout import grid_layout
from tokprune.core.registry import Registry, check, nearest
from tokprune.core.signals import Decoder, Kind, Signal, Tower
from tokprune.core.tokens import VisualTokens
from tokprune.methods import METHODS
from tokprune.methods.base import ScoreMethod
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
    for name in METHODS.own_names():
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


@pytest.mark.parametrize(
    ("typed", "meant"), [("nrm", ""), ("vtc", "vtc_cls"), ("vtc_csl", "vtc_cls"), ("unifrm", "uniform"), ("u", "")]
)
def test_only_a_name_that_is_near_is_offered(typed, meant):
    assert nearest(typed, METHODS.own_names()) == meant


def test_unscored_method_must_be_written():
    from tokprune.methods.base import Method

    tokens = VisualTokens.of(torch.zeros(1, 4, 2), grid_layout(2, 2))
    with pytest.raises(MethodError, match=r"Method does not write select\(.*\): return tokens.keeping"):
        Method().select(tokens, 2)
    with pytest.raises(MethodError, match=r"ScoreMethod does not write score\(.*\): return \(images, tokens\)"):
        ScoreMethod().select(tokens, 2)


# ---- options that are not declared as they have to be


class Undecorated(ScoreMethod):
    """Its option is no dataclass field."""

    power: int = 2
    source: ClassVar[str] = "nowhere"


@dataclass(frozen=True)
class Demanding(ScoreMethod):
    """Its option has no default."""

    power: int = field(kw_only=True)


def test_an_option_without_the_decorator_is_named_with_what_to_write():
    with pytest.raises(OptionError, match=r"power of Undecorated .*@dataclass\(frozen=True\)") as raised:
        check(Undecorated, "power", 3)
    assert "source" not in str(raised.value)
    with pytest.raises(OptionError) as raised:
        check(Demanding, "powr", 3)
    assert "dataclass" not in str(raised.value)


def test_an_option_without_a_default_is_asked_for():
    class One(Registry):
        def load(self, name):
            return Demanding

    with pytest.raises(OptionError, match="demanding:power=VALUE"):
        One("method", {}).build("demanding")
    assert One("method", {}).build("demanding:power=3").power == 3


@pytest.mark.parametrize(
    ("keyword", "meant"),
    [
        ("keepratio", "keep_ratio"),
        ("keep_ration", "keep_ratio"),
        ("keep_token", "keep_tokens"),
        ("position", "positions"),
    ],
)
def test_a_misspelt_argument_of_attach_is_told_from_an_option(keyword, meant):
    with pytest.raises(OptionError, match=f"{meant}, an argument of attach"):
        request_of("vtc_cls", {keyword: 0.2})
    for several in ("vtc_cls+fastv", ["vtc_cls", "fastv"]):
        with pytest.raises(OptionError, match=f"Did you mean {meant}, an argument of attach"):
            request_of(several, {keyword: 0.2})
    with pytest.raises(OptionError) as raised:
        request_of("vtc_cls", {"start_layr": 2}, keep_ratio=0.5)
    assert "argument of attach" not in str(raised.value)
    assert "Did you mean 'start_layer'" in str(raised.value)
