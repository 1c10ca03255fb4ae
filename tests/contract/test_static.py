"""Static caches give the answers of dynamic ones, and compiled decoding is one graph for every picture."""

from __future__ import annotations

import pytest
import tiny
import torch
from tokprune.integrations.transformers import compat
from transformers import CompileConfig, DynamicCache, StaticCache

import tokprune
from tokprune.core import errors

pytestmark = pytest.mark.skipif(
    not compat.is_at_least(compat.STATIC_SINCE), reason="static caches are refused before transformers 5.24"
)
STATIC = {"cache_implementation": "static"}
EVERY_KIND = (*tiny.KINDS, *tiny.M_ROPE, *tiny.FIXED, *tiny.GEMMA4, *tiny.MORE, *tiny.KIN)
ROWS = ((0,), (), (1, 0))  # pictures by row: the others are padded on the left


def compiled(graphs, **options):
    """The options of a generate() whose steps are compiled without a break; every graph is noted."""

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return {**STATIC, "compile_config": config, **options}


@pytest.fixture(autouse=True)
def _forget():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def run(model, inputs, **options):
    """The whole output of a greedy generation with the logits of every step."""
    asked = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, **options}
    return model.generate(**inputs, suppress_tokens=tiny.SUPPRESSED, **asked)


def assert_same(got, want):
    """The same tokens, from the same logits."""
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", tiny.served(EVERY_KIND))
@torch.no_grad()
def test_a_static_cache_answers_like_a_dynamic_one(kind):
    model, inputs = tiny.model(kind), tiny.batch(ROWS, kind=kind)
    bare = run(model, inputs)
    with tokprune.attach(model, "divprune", keep_ratio=0.3) as attachment:
        want, kept = run(model, inputs), str(attachment.kept)
        assert_same(run(model, inputs, **STATIC), want)
        assert str(attachment.kept) == kept
        with attachment.paused():
            assert_same(run(model, inputs, **STATIC), bare)
    assert not torch.equal(torch.stack(want.logits), torch.stack(bare.logits))
    assert_same(run(model, inputs, **STATIC), bare)


@pytest.mark.parametrize("spec", ["vtc_cls", "cdpruner", "prumerge", "visionzip", "random", "vtc_cls:keep_ratio=1"])
@pytest.mark.parametrize("positions", ["contiguous", "original"])
@torch.no_grad()
def test_every_sort_of_method_on_a_static_cache(spec, positions):
    model, inputs = tiny.model(), tiny.batch(ROWS)
    spec, _, everything = spec.partition(":")
    budget = {} if spec == "prumerge" else {"keep_ratio": 1 if everything else 0.3}
    with tokprune.attach(model, spec, positions=positions, **budget):
        assert_same(run(model, inputs, **STATIC), run(model, inputs))


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True}, {"guidance_scale": 2.0}],
)
@torch.no_grad()
def test_beams_samples_and_guidance(options):
    model, inputs = tiny.model(), tiny.batch(ROWS)
    found = []
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3):
        for cache in ({}, STATIC):
            torch.manual_seed(0)
            found.append(tiny.generate(model, inputs, **cache, **options))
    assert torch.equal(*found)


@torch.no_grad()
def test_no_hook_acts_in_compiled_decoding_and_no_picture_compiles_anew():
    """Pictures of one size, texts of several lengths up to the first, and rows of which all is kept: one graph."""
    model, graphs = tiny.fresh_model(), []
    batches = [tiny.batch(rows) for rows in (((0, 1),), ((1,),), ((2,),), ((),))]
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3):
        wanted = [tiny.generate(model, inputs) for inputs in batches]
        options = compiled(graphs)
        for inputs, want in zip(batches, wanted, strict=True):
            assert torch.equal(tiny.generate(model, inputs, **options), want)
            assert len(graphs) == 1
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(tiny.generate(model, batches[1], **options), wanted[1])
    want = tiny.generate(model, batches[0])  # bare again
    assert torch.equal(tiny.generate(model, batches[0], **options), want)


@pytest.mark.parametrize("spec", ["vtc_cls", "prumerge", "tome"])
@torch.no_grad()
def test_a_static_cache_is_as_long_as_what_is_kept(spec):
    """Padding and dropped tokens take no columns; lengths are multiples of 64, as on the longest prompt so far."""
    model, longest, short = tiny.fresh_model(), tiny.batch(((0, 1, 2, 0), (1,), ())), tiny.batch(((1,),))
    bare = run(model, longest, **STATIC)[tiny.CACHE]
    budget = {} if spec == "prumerge" else {"keep_ratio": 0.5}
    with tokprune.attach(model, spec, **budget) as attachment:
        found = [run(model, inputs, **STATIC) for inputs in (short, longest, short)]
        n_kept = attachment.report.prefills[0].n_inner
        assert_same(found[1], run(model, longest))
        with attachment.paused():
            assert lengths(run(model, short, **STATIC)[tiny.CACHE]) == lengths(bare)
    columns = [lengths(out[tiny.CACHE]) for out in found]
    assert columns[0] == {-(-(n_kept + 8) // 64) * 64}
    assert columns[1] == columns[2], "a shorter cache after a longer one would be compiled for anew"
    assert max(columns[1]) < max(lengths(bare)) - 8


def lengths(cache):
    """Columns that the tensors of a cache have, over all layers."""
    return {layer.keys.shape[-2] for layer in cache.layers}


@torch.no_grad()
def test_a_later_turn_on_a_static_cache():
    """All ids with the pruned cache, as on the bare model; generate() has to know it before it is filled."""
    model, inputs = tiny.model(dtype=torch.float64), tiny.row(tiny.batch(dtype=torch.float64), 0)
    new, found = torch.tensor([[5, 6, 7]]), []
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3):
        for cache in (DynamicCache(), StaticCache(config=model.config.get_text_config(), max_cache_len=100)):
            first = run(model, inputs, **tiny.cached(cache))
            ids = torch.cat([first.sequences, new], 1)
            later = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            found.append(run(model, later, **tiny.cached(cache)))
    assert_same(*found)


@torch.no_grad()
def test_a_pass_by_hand_after_a_generation_is_hooked_again():
    model, inputs = tiny.model(dtype=torch.float64), tiny.row(tiny.batch(dtype=torch.float64), 0)
    found = []
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3, positions="original"):
        for options in ({}, STATIC):
            out = run(model, inputs, **options)
            mask = torch.ones_like(out.sequences)
            step = model(input_ids=out.sequences[:, -1:], attention_mask=mask, **tiny.cached(out[tiny.CACHE]))
            found.append(step.logits)
    assert (found[0] - found[1]).abs().max() < 1e-9


@pytest.mark.parametrize("spec", ["fastv", "pyramiddrop", "vtc_cls+fastv"])
@torch.no_grad()
def test_methods_between_layers_are_refused_by_name(spec):
    model, inputs = tiny.fresh_model(), tiny.row(tiny.batch(), 0)
    budget = 0.3 if "+" not in spec else [0.6, 0.5]
    with tokprune.attach(model, spec, keep_ratio=budget):
        with pytest.raises(errors.UnsupportedCacheError, match=r"static.*leave cache_implementation out"):
            tiny.generate(model, inputs, **STATIC)
        tiny.generate(model, inputs)
