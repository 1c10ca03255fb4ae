"""Attention rows against the maps of real towers, and against products written out."""

from __future__ import annotations

import contextlib

import pytest
import tiny
import torch
from tokprune.integrations.transformers.families.llava import Llava
from tokprune.integrations.transformers.hooks import Hooks
from tokprune.integrations.transformers.passes import Passes
from tokprune.integrations.transformers.tower_taps import TowerTap

from tokprune.core import attention
from tokprune.core.signals import Kind, Signal

FORMS = ("softmax", "logits")


def written_out(q, k, scale, form, n_special):
    """(B, T, T) mean over heads of the map among all tokens."""
    logits = q.double() @ k.double().transpose(-1, -2) * scale
    full = logits.softmax(-1) if form == "softmax" else logits
    return full.mean(1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_special", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_means_equal_the_map(form, n_special, dtype):
    torch.manual_seed(0)
    q, k = (torch.randn(2, 3, 300, 8).to(dtype) for _ in "qk")  # more queries than a chunk
    full = written_out(q, k, 0.35, form, n_special)
    patches = full[:, n_special:, n_special:]
    close = dict(rtol=1e-4, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(attention.received(q, k, 0.35, form, n_special), patches.mean(1), **close)
    torch.testing.assert_close(attention.given(q, k, 0.35, form, n_special), patches.mean(2), **close)
    received, given = attention.received_and_given(q, k, 0.35, form, n_special)
    torch.testing.assert_close(received, patches.mean(1), **close)
    torch.testing.assert_close(given, patches.mean(2), **close)
    torch.testing.assert_close(attention.cls_row(q, k, 0.35, form, n_special), full[:, 0, n_special:], **close)
    assert received.dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_special", [1, 5])
def test_special_tokens_take_part_as_it_is_asked(form, n_special):
    """ "none" is the map of a tower without them, but for the query of the first; "both" averages over all queries."""
    q, k = (torch.randn(2, 3, 150, 8) for _ in "qk")
    close = dict(rtol=1e-4, atol=1e-6, check_dtype=False)
    patches = (q[:, :, n_special:], k[:, :, n_special:], 0.35)
    for function in (attention.received, attention.given):
        alone = function(q, k, 0.35, form, n_special, "none")
        torch.testing.assert_close(alone, function(*patches, form, 0), **close)
    alone = attention.cls_row(q, k, 0.35, form, n_special, "none")
    torch.testing.assert_close(alone, written_out(q[:, :, :1], patches[1], 0.35, form, 0)[:, 0], **close)
    full = written_out(q, k, 0.35, form, n_special)[..., n_special:]
    both = attention.received_and_given(q, k, 0.35, form, n_special, "both")
    torch.testing.assert_close(both[0], full.mean(1), **close)
    torch.testing.assert_close(both[1], full[:, n_special:].mean(2), **close)


def test_chunks_do_not_change_the_result():
    q, k = (torch.randn(1, 2, 100, 4) for _ in "qk")
    whole = attention._received_and_given(q, k, 0.5, 1, chunk=100)
    for chunk in (1, 7, 64):
        for a, b in zip(attention._received_and_given(q, k, 0.5, 1, chunk=chunk), whole, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tower", tiny.TOWERS)
@torch.no_grad()
def test_tap_equals_the_towers_own_attention_maps(tower):
    """The eager tower hands out its maps; the tap reads the same numbers from queries and keys under sdpa."""
    n_special = int(tower == "clip")
    layers = (0, 2, 3)
    kinds = [Kind.RECEIVED, Kind.GIVEN] + [Kind.CLS_ROW] * n_special
    signals = frozenset(Signal(kind, layers) for kind in kinds)
    model, pixels = tiny.model(tower), tiny.pictures(3)
    tap = TowerTap(Llava(model), signals, Passes())
    with contextlib.closing(Hooks(model)) as hooks:
        tap.install(hooks)
        collected = tap.collect(lambda: model.model.vision_tower(pixels))[1]
    maps = tiny.model(tower, "eager").model.vision_tower(pixels, output_attentions=True).attentions
    for kind in kinds:
        for place, layer in enumerate(layers):
            full = maps[layer].mean(1)
            patches = full[:, n_special:, n_special:]
            want = {Kind.RECEIVED: patches.mean(1), Kind.GIVEN: patches.mean(2), Kind.CLS_ROW: full[:, 0, n_special:]}
            torch.testing.assert_close(collected[Signal(kind, layers)][:, :, place], want[kind], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tower", tiny.TOWERS)
@torch.no_grad()
def test_tower_states_are_what_the_projector_takes(tower):
    signal = Signal(Kind.TOWER_STATES)
    model, pixels = tiny.model(tower), tiny.pictures(3)
    tap = TowerTap(Llava(model), frozenset({signal}), Passes())
    taken = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    with contextlib.closing(Hooks(model)) as hooks:
        tap.install(hooks)
        collected = tap.collect(lambda: model.model.get_image_features(pixels))[1]
    hook.remove()
    assert collected[signal].shape == (3, 36, 1, taken[0].shape[-1])
    torch.testing.assert_close(collected[signal][:, :, 0], taken[0])


@torch.no_grad()
def test_tap_notices_a_layer_that_did_not_run():
    model = tiny.fresh_model()
    tap = TowerTap(Llava(model), frozenset({Signal(Kind.CLS_ROW, (3,))}), Passes())
    with contextlib.closing(Hooks(model)) as hooks:
        tap.install(hooks)
        with pytest.raises(ValueError, match=r"layers \[3\] did not run"):
            tap.collect(lambda: None)
