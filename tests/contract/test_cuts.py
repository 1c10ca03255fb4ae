"""Laws of cuts between decoder layers, against the bare model whose dropped columns are masked behind the cut."""

from __future__ import annotations

import copy

import oracle
import pytest
import tiny
import torch
import transformers
from contract.test_adapters import (
    KINDS,
    MULTI_IMAGE_BEAMS_WORK,
    NUMERICS,
    WAYS,
    Widths,
    bare,
    by_row,
    images_that_beams_can_show,
    model_and_batch,
)
from packaging.version import Version
from specs import CUTTING, build
from tokprune.integrations.transformers.layers.shorten import LayerShortener
from tokprune.integrations.transformers.layers.shorten import _Here as Here
from tokprune.integrations.transformers.layers.taps import Attention

import tokprune
from tokprune.core.tokens import Count

PLAIN = [s for s in CUTTING if build(s).keeps_features]  # those that leave kept tokens as they are
kinds = pytest.mark.parametrize("kind", KINDS)
numerics = pytest.mark.parametrize("attn", NUMERICS)
# A cut at one layer, at two, at three with merges, after a method before the language model, and ragged exits.
METHODS = ["fastv", "pyramiddrop", "vtc_cls+fastv", "sparsevlm"]


def spec_for(kind, spec):
    if kind in ("siglip", "llava_onevision"):
        spec = spec.replace("vtc_cls", "fopru")
    return spec


# Before 5.6 or so every step of a generation without cache encodes the pictures again, so it is a call of its own.
ENCODES_ONCE = Version(transformers.__version__) >= Version("5.18")


def repeated(kept, n):
    """Of every image as often as it is encoded."""
    return [image for image in kept for _ in range(n)]


def budget(spec, keep=0.3):
    n = build(spec).n_budgets
    return {} if not n else {"keep_ratio": keep if n == 1 else [0.6, 0.5]}


def attach(model, kind, spec, **more):
    spec = spec_for(kind, spec)
    return tokprune.attach(model, spec, **({} if "replay" in more else budget(spec)), **more)


def gone_by_layer(single, kept):
    """Columns of one row that are dropped, by the first layer without them; kept has an entry an image."""
    found = {}
    for layer in sorted({layer for by_layer in kept for layer in by_layer}):
        at = [[by_layer[m] for m in sorted(by_layer) if m <= layer][-1:] or [None] for by_layer in kept]
        whole = [torch.arange(oracle.run_lengths(single)[i]) if k[0] is None else k[0] for i, k in enumerate(at)]
        found[layer] = ~oracle.kept_columns(single, whole)
    return found


# ---- one pass


@kinds
@numerics
@pytest.mark.parametrize("spec", ["fastv", "pyramiddrop", "dart"])
@torch.no_grad()
def test_cut_equals_the_bare_model_with_masked_columns(kind, attn, spec):
    model, inputs = model_and_batch(kind, attn)
    with attach(model, kind, spec) as attachment:
        logits, kept = model(**inputs).logits, by_row(attachment.kept)
    for r in range(3):
        single = tiny.row(inputs, r, kind=kind)
        gone = gone_by_layer(single, kept[r])
        assert gone or r == 2
        padding = inputs["input_ids"].shape[1] - single["input_ids"].shape[1]
        want = oracle.masked_logits(model, oracle.full_embeds(model, single), gone, padding)
        alive = ~torch.stack([*gone.values(), torch.zeros_like(single["input_ids"][0]).bool()]).any(0)
        assert (logits[r, padding:][alive] - want[0, alive]).abs().max() < NUMERICS[attn][1]


@kinds
@torch.no_grad()
def test_cut_twins_differ(kind):
    """A layer later, a layer earlier, another token, nothing dropped: the oracle sees each."""
    model, inputs = model_and_batch(kind)
    single = tiny.row(inputs, 0, kind=kind)
    with attach(model, kind, "fastv:layer=2") as attachment:
        logits, (kept,) = model(**single).logits[0, -1], attachment.kept
    embeds, gone = oracle.full_embeds(model, single), gone_by_layer(single, [kept])[2]

    def twin(layers):
        return (logits - oracle.masked_logits(model, embeds, layers)[0, -1]).abs().max()

    assert twin({2: gone}) < 1e-9
    other = gone.clone()
    visual = (single["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0]
    one_gone, one_kept = visual[gone[visual]][-1], visual[~gone[visual]][0]
    other[one_gone], other[one_kept] = False, True
    assert min(twin({3: gone}), twin({1: gone}), twin({2: other}), twin({})) > 1e-2


BUDGETED = [s for s in CUTTING if build(s).takes_budget]


@pytest.mark.parametrize(("kind", "spec"), [(k, s) for k in KINDS for s in BUDGETED if k == "clip" or ":" not in s])
@torch.no_grad()
def test_keep_all_is_bit_identical_between_layers(kind, spec):
    model, inputs = tiny.model(kind), tiny.batch(kind=kind)
    logits, tokens = bare(kind)
    for everything in ({"keep_ratio": 1.0}, {"keep_tokens": 10_000}):
        with tokprune.attach(model, spec, **everything) as attachment:
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(tiny.generate(model, inputs), tokens)
            assert set(attachment.report.layers) == {inputs["input_ids"].shape[1]}


@kinds
@pytest.mark.parametrize("spec", METHODS)
@torch.no_grad()
def test_report_equals_what_the_layers_saw(kind, spec):
    model, inputs = model_and_batch(kind)
    with attach(model, kind, spec) as attachment:
        witness = Widths(model)
        out = model(**inputs, use_cache=True)
        report = attachment.report
        witness.remove()
    assert report.layers == [seen[0] for seen in witness.seen]
    assert [layer.get_seq_length() for layer in out.past_key_values.layers] == report.layers
    assert report.layers[-1] < report.layers[0]
    text = (inputs["input_ids"] != tiny.IMAGE).logical_and(inputs["attention_mask"].bool()).sum(1)
    left = [[image[max(image)] for image in row] for row in by_row(attachment.kept)]
    lengths = [int(t) + sum(map(len, row)) for t, row in zip(text, left, strict=True)]
    assert report.prefills[0].layer_rows[-1] == lengths
    assert report.layers[-1] == max(lengths)
    for image in report.images:
        given = image.n_given
        ratio = {2: 0.5, 1: 0.3}[build(spec_for(kind, spec)).n_budgets]
        assert image.n_kept == int(ratio * given + 0.5)
        assert image.n_by_layer(5)[-1] == image.n_kept


# ---- generating


@kinds
@numerics
@pytest.mark.parametrize("spec", ["fastv", "pyramiddrop", "vtc_cls+fastv"])
@torch.no_grad()
def test_cached_generation_equals_masked_recomputing(kind, attn, spec):
    model, inputs = model_and_batch(kind, attn)
    positions = {"positions": "original"} if "+" in spec else {}  # the oracle knows no others
    with attach(model, kind, spec, **positions) as attachment:
        tokens, kept = tiny.generate(model, inputs), by_row(attachment.kept)
        if ENCODES_ONCE:
            assert torch.equal(tokens, tiny.generate(model, inputs, use_cache=False))
    for r in range(3):
        single = tiny.row(inputs, r, kind=kind)
        gone = gone_by_layer(single, kept[r])
        assert tokens[r].tolist() == oracle.masked_greedy(model, oracle.full_embeds(model, single), gone)


@pytest.mark.parametrize(("kind", "spec"), [(k, s) for k in KINDS for s in PLAIN if k == "clip" or ":" not in s])
@torch.no_grad()
def test_replayed_selection_generates_the_same(kind, spec):
    model, inputs = model_and_batch(kind)
    with attach(model, kind, spec) as attachment:
        tokens, kept = tiny.generate(model, inputs), attachment.kept
    with attach(model, kind, spec, replay=kept) as attachment:
        assert torch.equal(tiny.generate(model, inputs), tokens)
        assert torch.equal(tiny.generate(model, inputs, use_cache=False), tokens)
        again = attachment.kept
    assert [{k: v.tolist() for k, v in image.items()} for image in again] == [
        {k: v.tolist() for k, v in image.items()} for image in kept
    ]


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spec", METHODS)
@torch.no_grad()
def test_every_way_of_generating_with_cuts(kind, way, spec):
    layout = ((0,),) if way == "prompt lookup" else images_that_beams_can_show(kind)
    model, inputs = model_and_batch(kind, layout=layout)
    if not ENCODES_ONCE and not build(spec_for(kind, spec)).keeps_features:
        pytest.skip("what is merged cannot be replayed, and here every step without cache is a call of its own")
    with attach(model, kind, spec) as attachment:
        torch.manual_seed(0)
        cached, kept = tiny.generate(model, inputs, **WAYS[way]), attachment.kept
    plain = {} if way == "prompt lookup" else WAYS[way]
    replay = (
        {} if ENCODES_ONCE else {"replay": repeated(kept, plain.get("num_beams", plain.get("num_return_sequences", 1)))}
    )
    with attach(model, kind, spec, **replay):
        torch.manual_seed(0)
        uncached = tiny.generate(model, inputs, use_cache=False, **plain)
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("spec", METHODS)
@torch.no_grad()
def test_prompt_lookup_takes_candidates_back_in_every_layer(spec):
    model = tiny.model(dtype=torch.float64)
    text = [5, 6, 7, 8, 9] * 4
    inputs = tiny.collate([[1, *text, *[tiny.IMAGE] * tiny.N_VISUAL, *text]], [0], torch.float64)
    with attach(model, "clip", spec):
        witness = Widths(model)
        found = tiny.generate(model, inputs, prompt_lookup_num_tokens=4, max_new_tokens=12)
        witness.remove()
        # transformers 4 may give one token more than it was asked for
        assert torch.equal(found[:, :12], tiny.generate(model, inputs, max_new_tokens=12))
    assert witness.seen[0][0] > inputs["input_ids"].shape[1] or max(witness.seen[0][1:]) > 1  # candidates were proposed


@pytest.mark.parametrize(("kind", "spec"), [(k, s) for k in KINDS for s in CUTTING if k != "siglip"])
@torch.no_grad()
def test_batch_equals_its_rows_between_layers(kind, spec):
    model, inputs = model_and_batch(kind)
    with attach(model, kind, spec) as attachment:
        together = tiny.generate(model, inputs, max_new_tokens=3)
        kept = by_row(attachment.kept)
        for r in range(3):
            alone = tiny.generate(model, tiny.row(inputs, r, kind=kind), max_new_tokens=3)
            assert torch.equal(together[r : r + 1], alone)
            for a, b in zip(kept[r], attachment.kept, strict=True):
                assert a.keys() == b.keys()
                assert all(torch.equal(a[layer], b[layer]) for layer in a)


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("spec", METHODS)
@torch.no_grad()
def test_batch_equals_its_rows_with_beams(kind, spec):
    layout = tiny.MIXED if MULTI_IMAGE_BEAMS_WORK else images_that_beams_can_show(kind)
    model, inputs = model_and_batch(kind, layout=layout)
    with attach(model, kind, spec):
        together = tiny.generate(model, inputs, num_beams=3)
        alone = [tiny.generate(model, tiny.row(inputs, r, layout, kind), num_beams=3) for r in range(3)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("spec", METHODS)
@torch.no_grad()
def test_beams_of_a_prompt_share_one_selection(spec):
    """Selected once a prompt, whatever rounding does to its copies."""
    model, inputs = model_and_batch("clip", layout=((0,), (1,)))
    with attach(model, "clip", spec) as attachment:
        tiny.generate(model, inputs, num_beams=3)
        beams = attachment.kept
        tiny.generate(model, inputs)
        plain = attachment.kept
    assert len(beams) == len(plain) == 2
    for a, b in zip(beams, plain, strict=True):
        assert all(torch.equal(a[layer], b[layer]) for layer in b)


# ---- reads from the device

READS = ("tolist", "item", "cpu", "__bool__", "__int__", "__float__", "nonzero", "numpy")


def reads_inside(monkeypatch, owner, name, found, note):
    """Notes every read of a tensor while `owner.name` runs."""
    plain, inside = getattr(owner, name), []

    def watched(*args, **kwargs):
        inside.append(note(*args, **kwargs))
        try:
            return plain(*args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(owner, name, watched)
    for read in READS:
        original = getattr(torch.Tensor, read)

        def spy(self, *args, original=original, **kwargs):
            if inside:
                found.append(inside[-1])
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, read, spy)


@kinds
@pytest.mark.parametrize(
    "spec", ["fastv", "pyramiddrop", "sparsevlm", "dart", "sink_filter+fastv", "fastv:schedule=cosine"]
)
@torch.no_grad()
def test_at_most_one_read_a_cut_and_none_while_decoding(kind, spec, monkeypatch):
    """Counts are known on the host; only which newlines stay has to be read."""
    model, inputs = model_and_batch(kind)
    with attach(model, kind, spec) as attachment:
        cutter, cuts, decoding = attachment._observer.cutter, [], []
        with monkeypatch.context() as patched:
            reads_inside(patched, cutter, "cut", cuts, lambda layer, *_: layer)
            model(**inputs)
        with monkeypatch.context() as patched:
            steps = lambda self, i, module, args, kwargs: args[0].shape[1] == 1  # noqa: E731
            reads_inside(patched, LayerShortener, "_layer", decoding, steps)
            tiny.generate(model, inputs)
    made = sorted({layer for image in attachment.kept for layer in image})
    assert made
    assert cuts == (made if kind in tiny.TILED else [])
    assert not any(decoding)


def test_a_read_in_a_cut_is_seen(monkeypatch):
    model, inputs = tiny.model(), tiny.row(tiny.batch(), 0)
    with tokprune.attach(model, "fastv", keep_ratio=0.3) as attachment:
        found = []
        plain = attachment._observer.cutter.cut
        monkeypatch.setattr(
            attachment._observer.cutter,
            "cut",
            lambda layer, hidden, here: hidden.sum().item() and plain(layer, hidden, here),
        )
        reads_inside(monkeypatch, attachment._observer.cutter, "cut", found, lambda layer, *_: layer)
        model(**inputs)
    assert found


# ---- turns


@pytest.mark.parametrize("spec", ["fastv", "pyramiddrop", "vtc_cls+fastv"])
@torch.no_grad()
def test_second_turn_on_a_cut_cache_equals_masked_recomputing(spec):
    """Text, then another picture, on a cache whose layers differ in length."""
    model = tiny.model(dtype=torch.float64)
    first = tiny.row(tiny.batch(dtype=torch.float64), 1)
    text, image = torch.tensor([[5, 6, 7]]), torch.tensor([[8] + [tiny.IMAGE] * 36 + [9, 10]])
    picture = tiny.pictures(1, seed=5).double()
    n = first["input_ids"].shape[1]
    with attach(model, "clip", spec, positions="original") as attachment:
        cache = model(**first, use_cache=True).past_key_values
        kept = attachment.kept
        one = model(input_ids=text, **tiny.cached(cache), attention_mask=torch.ones(1, n + 3).long()).logits
        two = model(
            input_ids=image, pixel_values=picture, **tiny.cached(cache), attention_mask=torch.ones(1, n + 42).long()
        ).logits
        kept = kept + attachment.kept
    ids = torch.cat([first["input_ids"], text, image], 1)
    whole = {"input_ids": ids, "pixel_values": torch.cat([first["pixel_values"], picture])}
    gone = gone_by_layer(whole, kept)
    want = oracle.masked_logits(model, oracle.full_embeds(model, whole), gone)
    assert (one - want[:, n : n + 3]).abs().max() < 1e-9
    assert (two[:, -2:] - want[:, -2:]).abs().max() < 1e-9
    lengths = [layer.get_seq_length() for layer in cache.layers]
    assert lengths[0] > lengths[-1]


@torch.no_grad()
def test_cut_cache_is_served_while_paused_and_after_detaching_is_not_needed():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.row(tiny.batch(dtype=torch.float64), 0)
    n = inputs["input_ids"].shape[1]
    more = dict(input_ids=torch.tensor([[5, 6]]), attention_mask=torch.ones(1, n + 2).long())
    with attach(model, "clip", "fastv") as attachment:
        want = model(**more, **tiny.cached(model(**inputs, use_cache=True).past_key_values)).logits
        cache = model(**inputs, use_cache=True).past_key_values
        with attachment.paused():
            got = model(**more, **tiny.cached(cache)).logits
            assert torch.equal(model(**inputs).logits, tokprune_free(model, inputs))
    assert torch.equal(got, want)


def tokprune_free(model, inputs):
    return tiny.fresh_model(dtype=torch.float64)(**inputs).logits


@torch.no_grad()
def test_right_padded_rows_equal_the_rows_alone():
    model = tiny.model(dtype=torch.float64)
    left = tiny.batch(dtype=torch.float64)
    rows = [tiny.row(left, r) for r in range(3)]
    length = left["input_ids"].shape[1]
    right = {
        key: torch.cat([torch.nn.functional.pad(r[key], (0, length - r[key].shape[1])) for r in rows])
        for key in ("input_ids", "attention_mask")
    } | {"pixel_values": left["pixel_values"]}
    with attach(model, "clip", "pyramiddrop"):
        together = model(**right).logits
        for r, row in enumerate(rows):
            alone = model(**row).logits[0]
            assert (together[r, : len(alone)] - alone).abs().max() < 1e-9


@kinds
@torch.no_grad()
def test_flash_contract_equals_sdpa(kind, monkeypatch):
    """Flash attention gets two-dimensional masks and no positions with gaps; the kernel is emulated here."""
    with oracle.emulated_flash(monkeypatch) as seen:
        flash = tiny.fresh_model(kind)
        flash.model.language_model.set_attn_implementation("sdpa")
        model, inputs = tiny.model(kind), tiny.batch(kind=kind)
        for spec in ("fastv", "pyramiddrop", "sparsevlm"):
            with attach(model, kind, spec):
                want, tokens = model(**inputs).logits, tiny.generate(model, inputs)
            flash.model.language_model.config._attn_implementation = oracle.FLASH
            with attach(flash, kind, spec):
                got, again = flash(**inputs).logits, tiny.generate(flash, inputs)
            real = inputs["attention_mask"].bool()
            assert (got - want)[real].abs().max() < 1e-4
            assert torch.equal(tokens, again)
    assert seen


def test_counts_of_the_registry():
    assert {s for s in CUTTING if build(s).count is Count.CONTENT and ":" not in s} <= {"dyvte", "visual_exit"}


# ---- what a cut computes


@pytest.mark.parametrize("spec", ["fastv", "visual_exit", "pyramiddrop"])
@pytest.mark.parametrize("attn", NUMERICS)
@torch.no_grad()
def test_keys_of_the_layer_before_come_from_the_cache(attn, spec, monkeypatch):
    """The same numbers as without a cache, in a first prompt and in a second one on the same cache."""
    model, inputs = model_and_batch("clip", attn)
    made = []
    original = Attention.keys

    def keys(self, *args):
        made.append(self)
        return original(self, *args)

    monkeypatch.setattr(Attention, "keys", keys)
    budget = {} if spec == "visual_exit" else {"keep_ratio": 0.3}
    with tokprune.attach(model, spec, **budget) as attachment:
        model(**inputs, use_cache=False)
        alone, n_alone = attachment.kept, len(made)
        assert n_alone
        out = model(**inputs, use_cache=True)
        assert [dict_of(image) for image in attachment.kept] == [dict_of(image) for image in alone]
        assert len(made) == n_alone + (n_alone if spec == "pyramiddrop" else 0)  # which asks the layer that comes
        turn = {**inputs, "attention_mask": torch.cat([inputs["attention_mask"]] * 2, 1)}
        made.clear()
        cache = out.past_key_values
        whole = model(**turn, **tiny.cached(copy.deepcopy(cache))).logits
        assert bool(made) == (spec == "pyramiddrop")
        monkeypatch.setattr(Here, "held", lambda self, layer: None)
        torch.testing.assert_close(model(**turn, **tiny.cached(cache)).logits, whole, rtol=0, atol=0)
        assert made


def dict_of(image):
    """Kept tokens of an image by layer."""
    return {layer: kept.tolist() for layer, kept in image.items()}
