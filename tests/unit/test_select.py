"""`tokprune.select`: plain tensors in, kept rows out, without a model."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tiny
import torch

import tokprune
from tokprune.core import Kind, Layout, Signal, Tower, grid_layout
from tokprune.core.errors import BudgetError, MissingSignalError, OptionError
from tokprune.core.layout import NEWLINE
from tokprune.prune import Picture

CLS = Signal(Kind.CLS_ROW, (3,))


def picture(side: int = 4, width: int = 8, seed: int = 0, **scores: torch.Tensor) -> Picture:
    """A square picture of noise, with [CLS] attention that rises."""
    features = torch.randn(side * side, width, generator=torch.Generator().manual_seed(seed))
    signal = scores.get("cls", torch.arange(side * side).float())
    return Picture(features, grid_layout(side, side), {CLS: signal[None]})


def test_the_highest_scores_are_kept_in_their_order():
    cls = torch.zeros(16)
    cls[[3, 11, 7]] = torch.tensor([2.0, 3.0, 1.0])
    given = picture(cls=cls)
    (kept,) = tokprune.select([given], "vtc_cls", keep_tokens=3)
    assert kept.index.tolist() == [3, 7, 11]
    assert torch.equal(kept.features, given.features[[3, 7, 11]])


def test_pictures_of_several_layouts_equal_single_calls():
    given = [picture(4, seed=1), picture(3, seed=2), picture(4, seed=3)]
    together = tokprune.select(given, "random", keep_ratio=0.3, salts=[5, 6, 7])
    for one, salt, found in zip(given, (5, 6, 7), together, strict=True):
        (alone,) = tokprune.select([one], "random", keep_ratio=0.3, salts=[salt])
        assert torch.equal(found.index, alone.index)
        assert len(found.index) == max(1, round(0.3 * len(one.features)))


def test_merged_rows_are_compact_and_go_through_the_projector():
    given = picture()
    (pooled,) = tokprune.select([given], "pool", keep_tokens=4)
    cells = given.features.view(2, 2, 2, 2, 8).mean((1, 3)).view(4, 8)
    torch.testing.assert_close(pooled.features, cells)
    states = torch.randn(16, 6, generator=torch.Generator().manual_seed(4))
    matrix = torch.randn(6, 8, generator=torch.Generator().manual_seed(5))
    signals = {CLS: given.signals[CLS], Signal(Kind.KEYS, (3,)): torch.randn(1, 16, 2, 3)}
    with_states = Picture(given.features, given.layout, signals, states)
    (merged,) = tokprune.select([with_states], "visionzip", keep_tokens=6, project=lambda rows: rows @ matrix)
    assert merged.features.shape == (6, 8)
    projected = states[15] @ matrix  # of the token that [CLS] sees most
    assert any(torch.allclose(row, projected, atol=1e-5) for row in merged.features)


def test_newlines_follow_their_rows():
    layout = Layout(
        crop=(1, 1, NEWLINE, 1, 1, NEWLINE), row=(0, 0, 0, 1, 1, 1), column=(0, 1, -1, 0, 1, -1), crop_grid=(1, 1)
    )
    given = Picture(torch.randn(6, 4), layout, {CLS: torch.tensor([[0.0, 3.0, 1.0, 2.0]])})
    (kept,) = tokprune.select([given], "vtc_cls", keep_tokens=1)
    assert kept.index.tolist() == [1, 2]
    (kept,) = tokprune.select([given], "vtc_cls", keep_tokens=1, newlines="keep")
    assert kept.index.tolist() == [1, 2, 5]


def test_everything_stays_bit_identical():
    given = picture()
    (kept,) = tokprune.select([given], "tome", keep_ratio=1)
    assert kept.index.tolist() == list(range(16))
    assert torch.equal(kept.features, given.features)


@pytest.mark.parametrize(
    ("method", "options", "error", "says"),
    [
        ("fastv", {"keep_ratio": 0.5}, OptionError, "vtc_cls"),
        ("vtc_cls", {}, BudgetError, "keep_ratio=0.25"),
        ("fopru", {"keep_ratio": 0.5}, MissingSignalError, "RECEIVED"),
        ("vtc_cls", {"keep": 0.5}, OptionError, "keep_ratio=0.25"),
        ("random", {"keep_ratio": 0.5, "salts": (1, 2)}, OptionError, "salts"),
    ],
)
def test_what_cannot_be_selected_says_what_to_use(method, options, error, says):
    with pytest.raises(error, match=says):
        tokprune.select([picture()], method, **options)


@torch.no_grad()
def test_a_model_keeps_what_select_keeps():
    """The host's selection is this one: [CLS] attention from the eager tower's own maps, selected here."""
    model, inputs = tiny.model("clip"), tiny.batch(((0,),))
    maps = tiny.model("clip", "eager").model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    with tokprune.attach(model, "vtc_cls:start_layer=1", keep_tokens=9) as attachment:
        model(**inputs)
        want = attachment.kept[0]
    (signal,) = tokprune.get_method("vtc_cls:start_layer=1").needs(Tower(4, has_cls=True))
    rows = torch.stack([maps[layer][0, :, 0, 1:].mean(0) for layer in signal.layers])
    given = Picture(torch.zeros(36, 4), grid_layout(6, 6), {signal: rows})
    assert torch.equal(tokprune.select([given], "vtc_cls:start_layer=1", keep_tokens=9)[0].index, want)


def test_transformers_is_not_needed():
    code = (
        "import sys, torch, tokprune\n"
        "from tokprune.core import grid_layout\n"
        "from tokprune.prune import Picture\n"
        "kept = tokprune.select([Picture(torch.randn(16, 4), grid_layout(4, 4))], 'divprune', keep_tokens=4)\n"
        "assert len(kept[0].index) == 4 and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
