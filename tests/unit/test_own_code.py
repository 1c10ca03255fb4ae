"""Labels of a user's own classes."""

from __future__ import annotations

import pytest

from tokprune.core.own_code import short


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("./my.py:Norm", "Norm"),
        ("/a/long/way/my.py:Norm:power=1", "Norm:power=1"),
        ("pack.module:Norm", "Norm"),
        ("sink_filter+./my.py:Norm:power=1", "sink_filter+Norm:power=1"),
        ("vtc_cls:without_cls=received", "vtc_cls:without_cls=received"),
        ("random:seed=1+fastv:layer=2", "random:seed=1+fastv:layer=2"),
        ("./deploy", "./deploy"),
    ],
)
def test_a_label_is_short_without_losing_options(label, shown):
    assert short(label) == shown
