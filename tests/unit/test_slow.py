"""Selections that take long on a CPU say so before they start."""

from __future__ import annotations

import warnings

import pytest
import torch

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
    flops = tokprune.get_method(spec).cost(layout, 8, slow.Widths(16, 16, 16, 16, False)).flops
    monkeypatch.setattr(slow, "LONG", flops)
    with pytest.warns(UserWarning, match=f"256 visual tokens.*{instead}"):
        chosen(spec, layout)
    monkeypatch.setattr(slow, "LONG", flops + 1)
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
    assert even.cost(layout, 4096, widths).flops < slow.LONG < joint.cost(layout, 4096, widths).flops
