"""Steps of decoding: nothing is done again that was known, and what changes between them is noticed."""

from __future__ import annotations

import copy
import importlib.metadata

import pytest
import tiny
import torch
from tokprune.integrations.transformers.caches import find_marks
from tokprune.integrations.transformers.layers.shorten import LayerShortener
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import tokprune

METHODS = ("divprune", "fastv")


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_step_reads_no_package_metadata(method, monkeypatch):
    model, inputs, read = tiny.model(), tiny.batch(), []
    original = importlib.metadata.version
    with tokprune.attach(model, method, keep_ratio=0.3):
        tiny.generate(model, inputs)  # what is found out once has been
        monkeypatch.setattr(importlib.metadata, "version", lambda name: read.append(name) or original(name))
        tiny.generate(model, inputs)
    assert not read


def started(model, inputs, **more):
    """The cache of a prefill, and the token and the position (B, 1) after it."""
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config.text_config)
    out = model(**inputs, position_ids=places, **tiny.cached(cache), **more)
    return cache, out.logits[:, -1:].argmax(-1), places[:, -1:] + 1


def by_hand(model, cache):
    """The same keys and values in a cache on which nothing is written."""
    found = DynamicCache(config=model.config.text_config)
    for i, layer in enumerate(cache.layers):
        found.update(layer.keys.clone(), layer.values.clone(), i)
    return found


class Ops(TorchDispatchMode):
    """Counts what tensors compute."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("method", "more"), [("divprune", 1), ("fastv", 0)])
@torch.no_grad()
def test_a_step_without_padding_computes_no_more_than_on_a_cache_by_hand(method, more):
    """Contiguous positions are one subtraction."""
    bare, model, inputs, counts = tiny.model(), tiny.fresh_model(), tiny.batch(((0,),)), []
    with tokprune.attach(model, method, keep_ratio=0.3):
        cache, token, place = started(model, inputs)
        for asked, held in ((bare, by_hand(bare, cache)), (model, cache)):
            with Ops() as ops:
                asked(input_ids=token, position_ids=place, **tiny.cached(held))
            counts.append(ops.n)
    assert counts[1] - counts[0] == more


@torch.no_grad()
def test_layers_are_left_alone_in_a_step_without_padding(monkeypatch):
    served, original = [], LayerShortener._serve

    def serve(self, *args):
        served.append(1)
        return original(self, *args)

    monkeypatch.setattr(LayerShortener, "_serve", serve)
    model = tiny.model()
    with tokprune.attach(model, "fastv", keep_ratio=0.3):
        tiny.generate(model, tiny.batch(((0,),)))
        # Older releases pass a mask of ones at every step.
        assert not served or tiny.CACHE != "cache"
        tiny.generate(model, tiny.batch(((0,), ())))
        assert served


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@torch.no_grad()
def test_a_mask_that_hides_more_in_a_step_is_obeyed(positions):
    """Outside of generate() nothing is taken for granted."""
    bare, model, inputs = tiny.model(), tiny.fresh_model(), tiny.batch(((0,),))
    with tokprune.attach(model, "divprune", keep_ratio=0.3, positions=positions):
        cache, token, place = started(model, inputs)
        held = by_hand(bare, cache)
        n_inner, n_outer = held.get_seq_length(), inputs["input_ids"].shape[1]
        for step in range(3):
            mask, inner = torch.ones(1, n_outer + step + 1), torch.ones(1, n_inner + step + 1)
            if step:
                mask[:, n_outer - 2], inner[:, n_inner - 2] = 0, 0  # text, at the end of both
            got = model(input_ids=token, attention_mask=mask.long(), position_ids=place + step, **tiny.cached(cache))
            where = place + step - (n_outer - n_inner) * (positions == "contiguous")
            want = bare(input_ids=token, attention_mask=inner.long(), position_ids=where, **tiny.cached(held))
            torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)


def broken_step(model, given, cache):
    """A step that ends in its first layer."""

    def broken(*ignored):
        raise KeyError("broken off")

    handle = model.model.language_model.layers[0].register_forward_pre_hook(broken)
    with pytest.raises(KeyError):
        model(**given, **tiny.cached(cache))
    handle.remove()


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_step_that_was_broken_off_leaves_the_next_one_as_it_is(method):
    model, inputs = tiny.fresh_model(), tiny.batch(((0,),))
    with tokprune.attach(model, method, keep_ratio=0.3):
        cache, token, place = started(model, inputs)
        given = {"input_ids": token, "position_ids": place}
        want = model.model(**given, **tiny.cached(copy.deepcopy(cache))).last_hidden_state
        broken_step(model, given, cache)
        assert torch.equal(model.model(**given, **tiny.cached(cache)).last_hidden_state, want)
        again = started(model, inputs)[0]
        assert [layer.get_seq_length() + 1 for layer in again.layers] == [x.get_seq_length() for x in cache.layers]


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_picture_right_after_a_step_that_was_broken_off_is_pruned(method):
    """It enters below the head, on the same cache, as the step would go on."""
    model, inputs = tiny.fresh_model(), tiny.batch(((0,),))
    n = inputs["input_ids"].shape[1]
    with tokprune.attach(model, method, keep_ratio=0.3):
        cache, token, place = started(model, inputs)
        turn = {**inputs, "attention_mask": torch.ones(1, 2 * n).long(), "position_ids": place + torch.arange(n)}
        want = model.model(**turn, **tiny.cached(copy.deepcopy(cache))).last_hidden_state
        broken_step(model, {"input_ids": token, "position_ids": place}, cache)
        assert torch.equal(model.model(**turn, **tiny.cached(cache)).last_hidden_state, want)


@pytest.mark.parametrize("value", [1e30, -1.0, float("inf"), float("nan"), 6e-8])
def test_a_mark_has_zeros_alone_beside_its_nan(value):
    rows = torch.zeros(5, 8)
    rows[:4, 0], rows[1, 3], rows[2, 3:5] = torch.nan, value, torch.tensor([value, -value])
    rows[3, 5] = -0.0
    marked, bad = find_marks(rows)
    assert marked.tolist() == [True, False, False, True, False]
    assert bad.tolist() == [False, True, True, False, False]
