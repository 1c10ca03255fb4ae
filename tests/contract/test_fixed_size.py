"""Laws of families with a SigLIP tower of one size whose masks are their own: Gemma 3, PaliGemma, Command A, Aya."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F
from counter import counted
from tokprune.integrations.transformers import family_of
from tokprune.integrations.transformers.hooks import Hooks
from tokprune.integrations.transformers.passes import Passes
from tokprune.integrations.transformers.tower_taps import TowerTap

import tokprune
from tokprune.core.errors import UnsupportedModelError
from tokprune.core.signals import Kind, Signal

pytestmark = pytest.mark.skipif(tiny.RELEASE.release < (5, 18), reason="attach refuses these families there")
kinds = pytest.mark.parametrize("kind", tiny.FIXED)
BEFORE = ("uniform", "fopru", "divprune")
DTYPE = torch.float64
TYPES = "token_type_ids"


def batch_of(kind):
    """Left-padded; PaliGemma's pictures come first, in every row as many."""
    layout = ((0,), (1,), (2,)) if kind == "paligemma" else tiny.MIXED
    inputs = tiny.batch(layout, DTYPE, kind=kind, lead=kind != "paligemma")
    return inputs, [tiny.row(inputs, r, layout, kind) for r in range(3)]


def positions_of(kind, inputs):
    """What generate numbers columns by: text from the first one that is not padding, PaliGemma's from 1."""
    return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0) + (kind == "paligemma")


def kept_columns(inputs, kept):
    keep = inputs["attention_mask"].bool().clone()
    n = int((inputs["input_ids"] == tiny.IMAGE).sum()) // len(kept)
    keep[inputs["input_ids"] == tiny.IMAGE] = torch.cat([torch.zeros(n).bool().index_fill(0, k, True) for k in kept])
    return keep


@torch.no_grad()
def masked(model, inputs, keep, positions):
    rest = {k: v for k, v in inputs.items() if k != "attention_mask"}
    return model(**rest, attention_mask=keep.long(), position_ids=positions, use_cache=False).logits


@torch.no_grad()
def masked_greedy(kind, model, inputs, keep, positions, n_new=5):
    inputs, tokens = dict(inputs), []
    for _ in range(n_new):
        logits = masked(model, inputs, keep, positions)[:, -1]
        logits[:, tiny.SUPPRESSED] = -torch.inf
        tokens.append(logits.argmax(-1, keepdim=True))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[-1]], 1)
        if TYPES in inputs:  # PaliGemma's answer is no part of the prefix that sees itself
            inputs[TYPES] = F.pad(inputs[TYPES], (0, 1), value=int(kind == "paligemma"))
        keep, positions = F.pad(keep, (0, 1), value=True), torch.cat([positions, positions[:, -1:] + 1], 1)
    return torch.cat(tokens, 1)


@kinds
@torch.no_grad()
def test_keep_all_is_bit_identical(kind):
    model, (inputs, _) = tiny.model(kind, "sdpa", DTYPE), batch_of(kind)
    logits, tokens = model(**inputs).logits, tiny.generate(model, inputs)
    for method in (*BEFORE, "tome", "cdpruner"):
        with tokprune.attach(model, method, keep_ratio=1.0):
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(tiny.generate(model, inputs), tokens)


@kinds
@pytest.mark.parametrize("method", BEFORE)
@torch.no_grad()
def test_pruned_equals_the_bare_model_with_dropped_columns_masked(kind, method):
    model, (inputs, _) = tiny.model(kind, "sdpa", DTYPE), batch_of(kind)
    positions = positions_of(kind, inputs)
    bare = model(**inputs, position_ids=positions, use_cache=False).logits
    with tokprune.attach(model, method, keep_ratio=0.3, positions="original") as attachment:
        pruned, kept = model(**inputs, position_ids=positions).logits, attachment.kept
    keep = kept_columns(inputs, kept)
    assert (pruned - masked(model, inputs, keep, positions))[keep].abs().max() < 1e-9
    assert (pruned - bare)[:2][keep[:2]].abs().max() > 1e-2


@kinds
@pytest.mark.parametrize("positions", ["original", "contiguous"])
@torch.no_grad()
def test_generation_equals_recomputing_and_rows_alone(kind, positions):
    model, (inputs, singles) = tiny.model(kind, "sdpa", DTYPE), batch_of(kind)
    with tokprune.attach(model, "fopru", keep_ratio=0.3, positions=positions) as attachment:
        tokens = tiny.generate(model, inputs, max_new_tokens=5)
        kept, report = attachment.kept, attachment.report
        uncached = tiny.generate(model, inputs, max_new_tokens=5, use_cache=False)
        alone = torch.cat([tiny.generate(model, single, max_new_tokens=5) for single in singles])
    keep = kept_columns(inputs, kept)
    assert report.n_prompt_kept == int(keep.sum(1).max())
    assert torch.equal(tokens, uncached)
    assert torch.equal(tokens, alone)
    if positions == "original":
        assert torch.equal(tokens, masked_greedy(kind, model, inputs, keep, positions_of(kind, inputs)))


@kinds
@torch.no_grad()
def test_beams_of_a_batch_equal_rows_alone(kind):
    model, (inputs, singles) = tiny.model(kind, "sdpa", DTYPE), batch_of(kind)
    options = dict(max_new_tokens=4, num_beams=3)
    with tokprune.attach(model, "uniform", keep_ratio=0.3):
        together = tiny.generate(model, inputs, **options)
        assert torch.equal(together, torch.cat([tiny.generate(model, single, **options) for single in singles]))


@kinds
@torch.no_grad()
def test_sampling_repeats_itself_without_a_cache(kind):
    model, (inputs, _) = tiny.model(kind, "sdpa", DTYPE), batch_of(kind)
    options, found = dict(max_new_tokens=4, do_sample=True, top_k=5), []
    with tokprune.attach(model, "uniform", keep_ratio=0.3):
        for use_cache in (True, False):
            torch.manual_seed(0)
            found.append(tiny.generate(model, inputs, use_cache=use_cache, **options))
    assert torch.equal(*found)


@kinds
@torch.no_grad()
def test_a_second_turn_equals_the_long_sequence_masked(kind):
    """Its text is causal in PaliGemma, too, where the first prompt sees itself."""
    model, (_, singles) = tiny.model(kind, "sdpa", DTYPE), batch_of(kind)
    single, more = singles[1], torch.tensor([[5, 6, 7]])
    positions = positions_of(kind, single)
    with tokprune.attach(model, "uniform", keep_ratio=0.3, positions="original") as attachment:
        out = model(**single, position_ids=positions, use_cache=True)
        keep = F.pad(kept_columns(single, attachment.kept), (0, 3), value=True)
        ids = torch.cat([single["input_ids"], more], 1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if TYPES in single:
            again[TYPES] = F.pad(single[TYPES], (0, 3), value=int(kind == "paligemma"))
        tokens = tiny.generate(model, again, max_new_tokens=4, **tiny.cached(out[tiny.CACHE]))
    positions = torch.cat([positions, positions[:, -1:] + torch.arange(1, 4)], 1)
    assert torch.equal(tokens, masked_greedy(kind, model, single | again, keep, positions, 4))


@kinds
@torch.no_grad()
def test_detaching_gives_everything_back(kind):
    model, (inputs, _) = tiny.fresh_model(kind, dtype=DTYPE), batch_of(kind)
    logits = model(**inputs).logits
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with tokprune.attach(model, "fopru", keep_ratio=0.5):
        model(**inputs)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("kind", ["gemma3", "cohere2_vision"])
@torch.no_grad()
def test_a_window_counts_kept_tokens(kind):
    """With a window shorter than the prompt: cached, uncached and alone agree."""
    model = tiny.fresh_model(kind, "sdpa", DTYPE)
    for config in (model.config.text_config, *(m.config for m in model.modules() if hasattr(m, "config"))):
        if getattr(config, "sliding_window", None):
            config.sliding_window = 8
    for layer in model.model.language_model.layers:
        if getattr(layer.self_attn, "sliding_window", None):
            layer.self_attn.sliding_window = 8
    inputs, singles = batch_of(kind)
    with tokprune.attach(model, "uniform", keep_ratio=0.4):
        tokens = tiny.generate(model, inputs, max_new_tokens=6)
        assert torch.equal(tokens, tiny.generate(model, inputs, max_new_tokens=6, use_cache=False))
        assert torch.equal(tokens, torch.cat([tiny.generate(model, single, max_new_tokens=6) for single in singles]))


@kinds
def test_cuts_between_layers_are_refused_with_the_reason(kind):
    with pytest.raises(UnsupportedModelError, match="masks and caches.*divprune"):
        tokprune.attach(tiny.model(kind), "fastv", keep_ratio=0.5)
    answers = {p.method: p.answer for p in tokprune.list_support() if p.model == kind}
    assert answers["fastv"] == "no"
    assert answers["divprune"] == "yes"


@kinds
@torch.no_grad()
def test_received_attention_is_the_towers_own(kind):
    model = tiny.fresh_model(kind, "eager")
    family, layer = family_of(model), 3
    signal = Signal(Kind.RECEIVED, (layer,))
    tap, hooks = TowerTap(family, frozenset({signal}), Passes()), Hooks(model)
    tap.install(hooks)
    pixels = tiny.pictures(2)
    _, found = tap.collect(lambda: model.model.get_image_features(pixel_values=pixels))
    hooks.close()
    maps = model.model.vision_tower(pixels, output_attentions=True).attentions[layer]
    torch.testing.assert_close(found[signal][:, :, 0], maps.mean((1, 2)), rtol=1e-4, atol=1e-7)


@kinds
def test_a_token_shows_the_patches_that_its_score_is_of(kind):
    model = tiny.fresh_model(kind)
    family = family_of(model)
    for layer in family.vision_layers:
        torch.nn.init.zeros_(layer.self_attn.out_proj.weight)
        torch.nn.init.zeros_(layer.self_attn.out_proj.bias)
    pixels = tiny.pictures(1).requires_grad_()
    (rows,) = family.encode("get_image_features", pixel_values=pixels)
    side = tiny.SIDE // tiny.PATCH
    marks = torch.arange(side * side, dtype=torch.float32)
    for t, feature in enumerate(rows):
        (gradient,) = torch.autograd.grad(feature.square().sum(), pixels, retain_graph=True)
        blocks = gradient[0].abs().sum(0).unflatten(0, (side, -1)).unflatten(2, (side, -1)).sum((1, 3))
        touched = blocks.flatten().gt(0)
        packed = family.pack("get_image_features", {}, marks[None, :, None])[0][t, 0]
        assert packed == marks[touched].mean()
        assert int(touched.sum()) == side * side // len(rows)


@kinds
@torch.no_grad()
def test_the_ledger_equals_the_counter(kind):
    model = tiny.fresh_model(kind)
    inputs, _ = batch_of(kind)
    single = {k: v.float() if v.is_floating_point() else v for k, v in tiny.row(inputs, 0, ((0,),), kind).items()}
    parts = ("vision_tower", "multi_modal_projector", "language_model")
    seen = counted(lambda: model(**single, logits_to_keep=1, use_cache=False), parts)
    shape = family_of(model).shape
    ledger = shape.encode(1) + shape.read(single["input_ids"].shape[1])
    for part, name in zip((ledger.vision, ledger.projector, ledger.decoder), parts, strict=True):
        assert abs(part.flops - seen[name]) <= 0.01 * seen[name], name
