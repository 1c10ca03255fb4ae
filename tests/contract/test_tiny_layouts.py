"""Laws of methods on the smallest pictures and on signals that tell nothing, for every name in the registry."""

from __future__ import annotations

import itertools
import typing
from dataclasses import fields

import pytest
import tiny
import torch
from specs import CUTTING, PRUNING, build, cut_tokens_for, mosaic_layout, most_kept, n_keeps, tokens_for

import tokprune
from tokprune.core.errors import OptionError
from tokprune.core.layout import Layout, frames_layout, grid_layout
from tokprune.core.tokens import Count, Stage, VisualTokens
from tokprune.methods import METHODS


def choices(declared) -> list:
    """All values of an option that has few of them."""
    kinds = typing.get_args(declared) if typing.get_origin(declared) is not typing.Literal else (declared,)
    found = []
    for kind in kinds or (declared,):
        if kind is bool:
            found += [False, True]
        elif typing.get_origin(kind) is typing.Literal:
            found += list(typing.get_args(kind))
    return found


def enumerated(name: str) -> list[str]:
    """Specifications with every combination of options that can be enumerated, as far as they go together."""
    cls = METHODS.load(name)
    hints = typing.get_type_hints(cls)
    values = {f.name: choices(hints[f.name]) for f in fields(cls) if f.init and choices(hints[f.name])}
    specs = []
    for chosen in itertools.product(*values.values()):
        spec = ":".join([name, *(f"{k}={v}" for k, v in zip(values, chosen, strict=True))])
        try:
            build(spec)
        except OptionError:
            continue
        specs.append(spec)
    return specs


NAMES = [n for n in METHODS.table if not METHODS.build(n).needs_file]
ALL = [spec for name in NAMES for spec in enumerated(name)]
FILTERS = [s for s in ALL if build(s).is_filter]
BEFORE = [s for s in ALL if build(s).stage is Stage.PRE_LLM and s not in FILTERS and s != "blind"]
BEFORE += [f"{f}+{s}" for f in FILTERS if build(f).stage is Stage.PRE_LLM for s in ("vtc_cls", "fopru")]
BEFORE = list(dict.fromkeys([*BEFORE, *PRUNING]))
BETWEEN = [s for s in ALL if build(s).stage is Stage.DECODER and s not in FILTERS]
BETWEEN = [s for s in dict.fromkeys([*BETWEEN, *CUTTING]) if not s.startswith("visual_exit")]  # keeps all, or none


LAYOUTS = {
    **{f"{h}x{w}": grid_layout(h, w) for h, w in ((1, 1), (1, 2), (2, 1))},
    **{f"thumbnail of 1 and {r}x{c} crops": mosaic_layout(1, (r, c)) for r, c in ((1, 1), (1, 2), (3, 3))},
    "thumbnail of 4 and 1x1 crops": mosaic_layout(2, (1, 1)),
    "thumbnail of 4 and 3x3 crops": mosaic_layout(2, (3, 3)),
    "a row of a mosaic": mosaic_layout(2, (3, 1), height=1),
    "a column of a mosaic": mosaic_layout(2, (1, 3), width=1),
    "the middle of a mosaic": mosaic_layout(1, (3, 3), height=1, width=1),
    "a thumbnail whose crops show nothing": Layout((0, 0), (0, 0), (0, 1), crop_grid=(2, 2)),
    "two frames of 1x1": frames_layout(2, 1, 1),
    "three frames of 1x2": frames_layout(3, 1, 2),
}
FILLED = {"random": None, "zeros": 0.0, "equal": 0.25}


def filled(tokens: VisualTokens, what: str) -> VisualTokens:
    """The same with signals that are all alike; with zeros and equal values features too."""
    if FILLED[what] is not None:
        tokens.features.fill_(FILLED[what])
        for signal in tokens.signals.values():
            signal.fill_(FILLED[what])
    return tokens


def assert_kept(spec: str, out: VisualTokens, tokens: VisualTokens, n_keep: int) -> None:
    method, counts = build(spec), out.keep.sum(1)
    assert out.keep.shape == tokens.keep.shape
    assert out.keep.dtype == torch.bool
    assert out.features.shape == tokens.features.shape
    assert out.features.isfinite().all()
    assert out.scores is None or not out.scores.isnan().any()
    if method.takes_budget and method.count is Count.EXACT:
        assert counts.tolist() == [n_keep] * len(counts)
    elif method.takes_budget:
        assert counts.max() <= most_kept(spec, n_keep, tokens.layout)
    else:
        assert out.keep.any(1).all()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("spec", BEFORE)
def test_tiny_pictures_are_selected_from(spec, layout):
    budgets = n_keeps(spec, layout) if build(spec).takes_budget else [layout.n_visual]
    for what, n_keep in itertools.product(FILLED, sorted({budgets[0], budgets[-1]})):
        tokens = filled(tokens_for(spec, n_images=2, layout=layout), what)
        assert_kept(spec, build(spec).select(tokens, n_keep), tokens, n_keep)


@pytest.mark.parametrize("n", [1, 2, 36])
@pytest.mark.parametrize("spec", BETWEEN)
def test_few_tokens_between_layers_are_selected_from(spec, n):
    for what, n_keep in itertools.product(FILLED, sorted({1, max(n - 1, 1), n})):
        tokens = filled(cut_tokens_for(spec, n_images=2, n=n), what)
        assert_kept(spec, build(spec).select(tokens, n_keep), tokens, n_keep)


def test_options_are_enumerated():
    assert {s.split(":")[0].split("+")[0] for s in BEFORE + BETWEEN} >= {
        n for n in NAMES if n not in ("blind", "visual_exit")
    }
    assert sum("faithful=True" in s for s in ALL) >= 4
    assert tokprune.get_method("hired:faithful=True:without_cls=received") == build(
        next(s for s in ALL if s.startswith("hired") and "faithful=True" in s and "received" in s)
    )


def test_a_kind_without_pictures_says_where_they_are_added():
    with pytest.raises(ValueError, match=r"'new_family': add them here, in pixels\(\) of tests/tiny.py"):
        tiny.pixels("new_family", [[0]])
