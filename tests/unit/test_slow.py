"""Selections that take long on a CPU say so before they start."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch
from specs import CUTTING, SPECS, build, tokens_for

import tokprune
from tokprune.core.layout import frames_layout, grid_layout
from tokprune.prune import Picture, slow


def chosen(spec, layout, keep_tokens=8):
    features = torch.randn(layout.n_visual, 16, generator=torch.Generator().manual_seed(0))
    return tokprune.select([Picture(features, layout)], spec, keep_tokens=keep_tokens)


@pytest.mark.parametrize(
    ("spec", "layout", "instead"),
    [
        ("divprune", frames_layout(4, 8, 8), "split=even to select in each of the 4 "),
        ("divprune", grid_layout(16, 16), "such as fopru"),
        ("divprune:split=even", frames_layout(4, 8, 8), "such as vidcom2"),
    ],
)
def test_what_it_costs_is_said_with_what_is_cheaper(spec, layout, instead, monkeypatch):
    seconds = slow.seconds_of(tokprune.get_method(spec), layout, [8], slow.Widths(16, 16, 16, 16, False))
    monkeypatch.setattr(slow, "LONG", seconds)
    with pytest.warns(UserWarning, match=f"256 visual tokens.*{instead}"):
        chosen(spec, layout)
    monkeypatch.setattr(slow, "LONG", 1.01 * seconds)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen(spec, layout)


def test_usual_pictures_and_cheap_methods_say_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen("divprune", grid_layout(24, 24), 144)
        chosen("uniform", frames_layout(64, 14, 14), 64)


def test_sixteen_thousand_tokens_of_a_large_model_are_said():
    """The usual threshold, without the selection."""
    widths, layout = slow.Widths(3584, 0, 0, 0, False), frames_layout(64, 16, 16)
    joint, even = tokprune.get_method("divprune"), tokprune.get_method("divprune", split="even")
    seconds = [slow.seconds_of(method, layout, [4096], widths) for method in (even, joint)]
    assert seconds[0] < slow.LONG < seconds[1]


def costs(spec, layout, n_keep=8):
    return build(spec).cost(layout, n_keep, slow.Widths(16, 8, 4, 12, False)).flops


@pytest.mark.parametrize("spec", [s for s in [*SPECS, "fopru:calibrate=merge"] if costs(s, frames_layout(4, 4, 4))])
def test_every_costly_method_before_the_language_model_is_said(spec, monkeypatch):
    layout = frames_layout(4, 4, 4)
    tokens = tokens_for(spec, 1, layout)
    monkeypatch.setattr(slow, "LONG", 0)
    with pytest.warns(UserWarning, match="64 visual tokens"):
        slow.warn_if_slow(build(spec), spec, tokens, 8)


@pytest.mark.parametrize("spec", [s for s in CUTTING if costs(s, grid_layout(6, 6))])
@torch.no_grad()
def test_every_costly_method_between_layers_is_said_once_before_its_first_cut(spec, monkeypatch):
    model, inputs = tiny.fresh_model("clip"), tiny.batch()
    monkeypatch.setattr(slow, "LONG", 0)
    with tokprune.attach(model, spec, keep_ratio=0.3) as attachment:
        seen = []
        monkeypatch.setattr(type(attachment.method), "select", lambda *_: seen.append(len(said)) or 1 / 0)
        with warnings.catch_warnings(record=True) as said, pytest.raises(ZeroDivisionError):
            warnings.simplefilter("always")
            model(**inputs)
    found = [str(w.message) for w in said if "with each other" in str(w.message)]
    assert len(found) == len(set(found)) == 1
    assert "such as fastv" in found[0]
    assert seen == [len(said)]


def test_usual_cuts_say_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        widths = slow.Widths(4096, 4096, 128, 0, False)
        slow.warn_of_cuts(
            build("sparsevlm"), "sparsevlm", grid_layout(24, 24), [303, 110, 36], widths, torch.device("cpu")
        )
