"""torch.compile and attach in any order: the answer is that of the attachment alone, or an error says what to do.

Every order with every method takes half an hour: COMPILED=all in the environment, or make test-compiled.
"""

from __future__ import annotations

import itertools
import os

import pytest
import tiny
import torch

import tokprune
from tokprune.core import errors

pytestmark = pytest.mark.slow  # make check runs them


def whole(model, backend):
    model.compile(backend=backend)
    return model


def wrapped(model, backend):
    return torch.compile(model, backend=backend)


def forward(model, backend):
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def language_model(model, backend):
    model.model.language_model.compile(backend=backend)
    return model


def language_model_forward(model, backend):
    part = model.model.language_model
    part.forward = torch.compile(part.forward, backend=backend)
    return model


def decoder_layers(model, backend):
    for layer in model.model.language_model.layers:
        layer.compile(backend=backend)
    return model


def vision_tower(model, backend):
    model.model.vision_tower.compile(backend=backend)
    return model


def function(model, backend):
    return torch.compile(lambda **inputs: model(**inputs), backend=backend)


def language_model_replaced(model, backend):
    model.model.language_model = torch.compile(model.model.language_model, backend=backend)
    return model


WAYS = {
    f.__name__: f
    for f in (
        whole,
        wrapped,
        forward,
        language_model,
        language_model_forward,
        decoder_layers,
        vision_tower,
        function,
    )
}
ORDERS = ("attach, compile", "compile, attach", "compile, run, attach")
METHODS = ("uniform", "vtc_cls", "cdpruner", "visionzip", "fastv")
# Hooks inside of a compiled tower do not run: methods that read it are refused there.
READS_TOWER = ("vtc_cls", "visionzip")
EVERY = [("eager", *case) for case in itertools.product(METHODS, WAYS, ORDERS)]
EVERY = [case for case in EVERY if case[1] not in READS_TOWER or case[2] != "vision_tower"]
EVERY += [("inductor", method, "decoder_layers", order) for method in ("vtc_cls", "fastv") for order in ORDERS]
# One of each way, order and method, and what silently went wrong without hooks that torch.compile leaves alone.
SOME = [
    ("eager", "vtc_cls", "whole", "attach, compile"),
    ("eager", "uniform", "language_model", "compile, run, attach"),
    ("eager", "vtc_cls", "wrapped", "compile, run, attach"),
    ("eager", "cdpruner", "decoder_layers", "compile, attach"),
    ("eager", "cdpruner", "vision_tower", "compile, run, attach"),
    ("eager", "fastv", "decoder_layers", "compile, run, attach"),
    ("eager", "fastv", "function", "compile, run, attach"),
    ("eager", "uniform", "language_model_forward", "attach, compile"),
    ("inductor", "vtc_cls", "decoder_layers", "attach, compile"),
]


@pytest.fixture(autouse=True)
def _forget():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("backend", "method", "way", "order"), EVERY if os.environ.get("COMPILED") == "all" else SOME)
@torch.no_grad()
def test_compiling_in_any_order_changes_nothing(backend, method, way, order):
    inputs, model = tiny.batch(((0,), ())), tiny.fresh_model()
    valid = inputs["attention_mask"].bool()
    bare = model(**inputs).logits[valid]
    with tokprune.attach(model, method, keep_ratio=0.3) as attachment:
        want, kept = model(**inputs).logits[valid], str(attachment.kept)
    model = tiny.fresh_model()
    if order == "attach, compile":
        attachment = tokprune.attach(model, method, keep_ratio=0.3)
        run = WAYS[way](model, backend)
    else:
        run = WAYS[way](model, backend)
        if order == "compile, run, attach":
            run(**inputs)
        attachment = tokprune.attach(model, method, keep_ratio=0.3)
    tolerance = dict(rtol=0, atol=0) if backend == "eager" else dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(**inputs).logits[valid], want, **tolerance)
    assert str(attachment.kept) == kept
    with attachment.paused():
        torch.testing.assert_close(run(**inputs).logits[valid], bare, **tolerance)
    attachment.detach()
    torch.testing.assert_close(run(**inputs).logits[valid], bare, **tolerance)


@pytest.mark.parametrize("method", ["vtc_cls", "fastv"])
@torch.no_grad()
def test_generate_with_compiled_layers(method):
    inputs, model = tiny.batch(((0,), ())), tiny.fresh_model()
    with tokprune.attach(model, method, keep_ratio=0.3):
        want = tiny.generate(model, inputs, max_new_tokens=3)
        decoder_layers(model, "eager")
        assert torch.equal(tiny.generate(model, inputs, max_new_tokens=3), want)


@pytest.mark.parametrize("method", READS_TOWER)
@torch.no_grad()
def test_a_compiled_tower_that_is_read_is_refused(method):
    model = tiny.fresh_model()
    with tokprune.attach(model, method, keep_ratio=0.3):
        vision_tower(model, "eager")
        with pytest.raises(errors.TokPruneError, match="compile decoder"):
            model(**tiny.batch(((0,), ())))


@torch.no_grad()
def test_a_part_in_another_module_is_refused_in_every_order():
    """torch.compile(module) is another module, which has no hooks."""
    model = language_model_replaced(tiny.fresh_model(), "eager")
    with pytest.raises(errors.UnsupportedModelError, match=r"language_model\.compile\(\)"):
        tokprune.attach(model, "uniform", keep_ratio=0.3)
    model = tiny.fresh_model()
    with tokprune.attach(model, "uniform", keep_ratio=0.3):
        language_model_replaced(model, "eager")
        with pytest.raises(errors.ModelChangedError, match=r"detach\(\)"):
            model(**tiny.batch())


def test_code_compiled_for_other_models_is_left_where_nothing_was_compiled():
    """attach resets torch.compile only where it made code before."""
    calls, reset = [], torch.compiler.reset
    torch.compiler.reset = lambda: calls.append(True)
    try:
        tokprune.attach(tiny.fresh_model(), "uniform", keep_ratio=0.3).detach()
        assert not calls
        torch.compile(torch.sin, backend="eager")(torch.ones(2))
        tokprune.attach(tiny.fresh_model(), "uniform", keep_ratio=0.3).detach()
        assert calls
    finally:
        torch.compiler.reset = reset
