"""Laws of calibrate=: the bare model on a sequence made by hand, with the bias of RESTORE given as a mask."""

from __future__ import annotations

import math

import oracle
import pytest
import tiny
import torch
import torch.nn.functional as F
from m_rope import captured, columns_kept, model_of, placeholder_of
from m_rope import row as row_of

import tokprune
from tokprune.core.errors import (
    BudgetError,
    OptionError,
    TokPruneError,
    UnsupportedCacheError,
    UnsupportedModelError,
)
from tokprune.methods.restore import merged_anchors

KINDS = (*tiny.KINDS, "vipllava", "deepseek_vl")  # positions are numbers of columns
M_ROPE = tuple(kind for kind in tiny.M_ROPE if kind != "qwen3_5")
REFUSED = ("gemma3", "paligemma", "cohere2_vision", "aya_vision", "gemma4", "qwen3_5")
NUMERICS = {"sdpa": (torch.float64, 1e-4), "eager": (torch.float32, 5e-4)}
kinds = pytest.mark.parametrize("kind", tiny.served(KINDS))
every_kind = pytest.mark.parametrize("kind", tiny.served([*KINDS, *tiny.MORE, *M_ROPE]))


def model_and_batch(kind, attn="sdpa", layout=tiny.MIXED):
    dtype = NUMERICS[attn][0]
    model = model_of(kind, dtype) if attn == "sdpa" else tiny.model(kind, attn, dtype)
    return model, tiny.batch(layout, dtype, kind=kind)


def head_of(model):
    return oracle.language_model(model).layers[0].self_attn.head_dim


def cosine_of_distance(model, apart):
    """D of the paper, in float64: the mean over frequencies of the cosine of distance times frequency."""
    head = head_of(model)
    frequencies = 10000.0 ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
    return (apart[..., None].double() * frequencies).cos().mean(-1)


def mask_of(model, positions, sizes, everywhere, distance=True):
    """(1, 1, n, n): log(s (2 - D)), and nothing from a query to what comes after it."""
    near = cosine_of_distance(model, (positions[:, None] - positions).abs()) if distance else torch.ones(())
    added = (sizes.clamp(min=1) * (2 - near)).log()
    added = torch.where((sizes > 0) | everywhere, added, 0.0).expand(len(positions), -1)
    later = torch.ones(len(positions), len(positions), dtype=torch.bool).triu(1)
    return added.masked_fill(later, -1e30)[None, None]


@torch.no_grad()
def logits_of(model, embeds, positions, mask):
    out = oracle.language_model(model)(
        inputs_embeds=embeds, position_ids=positions[None], attention_mask=mask.to(embeds.dtype), use_cache=False
    )
    return model.lm_head(out.last_hidden_state)[0]


@torch.no_grad()
def answer(model, embeds, positions, sizes, everywhere, n_new=6, distance=True):
    """Logits of a short sequence, and greedy tokens, every step computed anew with a mask of its own."""
    first, tokens = None, []
    for _ in range(n_new):
        logits = logits_of(model, embeds, positions, mask_of(model, positions, sizes, everywhere, distance))
        first = logits if first is None else first
        last = logits[-1].clone()
        last[tiny.SUPPRESSED] = -torch.inf
        tokens.append(int(last.argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([tokens[-1:]]))], 1)
        positions, sizes = torch.cat([positions, positions[-1:] + 1]), F.pad(sizes, (0, 1))
    return first, tokens


def pieces(kept, layout=tiny.MIXED):
    kept = iter(kept)
    return [[next(kept) for _ in images] for images in layout]


@kinds
@pytest.mark.parametrize("attn", NUMERICS)
@pytest.mark.parametrize("calibrate", ["bias", "bias_all"])
@torch.no_grad()
def test_prefill_and_decoding_are_those_of_the_short_sequence_with_the_bias(kind, attn, calibrate):
    model, inputs = model_and_batch(kind, attn)
    with tokprune.attach(model, "divprune", calibrate=calibrate, keep_ratio=0.3) as attachment:
        logits, kept = model(**inputs).logits, pieces(attachment.kept)
        tokens = tiny.generate(model, inputs, max_new_tokens=6)
        assert torch.equal(tokens, tiny.generate(model, inputs, max_new_tokens=6, use_cache=False))
    with tokprune.attach(model, "divprune", calibrate="positions", keep_ratio=0.3):
        plain = model(**inputs).logits
    for r in range(3):
        single = tiny.row(inputs, r, kind=kind)
        columns, embeds = oracle.kept_columns(single, kept[r]), oracle.full_embeds(model, single)
        padding = inputs["input_ids"].shape[1] - len(columns)
        positions = torch.arange(len(columns))[columns]
        sizes = (single["input_ids"][0][columns] == tiny.IMAGE).double()
        everywhere = torch.tensor(calibrate == "bias_all" and bool(kept[r]))  # text alone is as it is
        want, said = answer(model, embeds[:, columns], positions, sizes, everywhere)
        assert (logits[r, padding:][columns] - want).abs().max() < NUMERICS[attn][1]
        assert tokens[r].tolist() == said
        if r < 2:
            assert (logits[r, -1] - plain[r, -1]).abs().max() > 1e-2  # the bias matters


def merged_by_hand(x, n_anchors):
    """Means, the places of medians, and sizes, token by token."""
    x = x.double()
    near = F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).T
    total = near.sum(1)
    scores = []
    for i in range(len(x)):
        larger = [float(near[i, j]) for j in range(len(x)) if total[j] > total[i]]
        scores.append(float(total[i]) * (1 - (max(larger) if larger else 0)))
    anchors = sorted(sorted(range(len(x)), key=lambda i: -scores[i])[:n_anchors])
    groups = {a: [a] for a in anchors}
    for i in set(range(len(x))) - set(anchors):
        groups[max(anchors, key=lambda a: float(near[i, a]))].append(i)
    members = [sorted(groups[a]) for a in anchors]
    return [(x[m].mean(0), m[(len(m) - 1) // 2], len(m)) for m in members]


def test_anchors_are_those_of_the_formula():
    x = torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(0))
    rows, places, sizes = merged_anchors(x, 7)
    for g in range(3):
        by_hand = merged_by_hand(x[g], 7)
        assert places[g].tolist() == [place for _, place, _ in by_hand]
        assert sizes[g].tolist() == [size for _, _, size in by_hand]
        assert (rows[g] - torch.stack([mean for mean, _, _ in by_hand])).abs().max() < 1e-5
    assert sizes.sum(1).tolist() == [40] * 3


def test_of_equal_tokens_one_is_an_anchor(monkeypatch):
    x = torch.eye(4)[[0, 1, 0, 2, 1, 0, 3]][None]
    rows, _, sizes = merged_anchors(x, 4)
    assert sorted(zip(rows[0].argmax(1).tolist(), sizes[0].tolist(), strict=True)) == [(0, 3), (1, 2), (2, 1), (3, 1)]
    assert torch.equal(rows.amax(2), torch.ones(1, 4))
    monkeypatch.setattr("tokprune.core.ops.LARGEST", 20)  # a few rows at a time
    assert all(torch.equal(a, b) for a, b in zip(merged_anchors(x, 4), merged_anchors(x, 4), strict=True))


@pytest.mark.parametrize("calibrate", [True, "merge"])
@torch.no_grad()
def test_half_of_the_budget_are_anchors(calibrate):
    model, inputs = model_and_batch("clip", layout=((0,), (1, 2)))
    spec = f"divprune:calibrate={str(calibrate).lower()}"
    with tokprune.attach(model, "divprune", keep_tokens=6) as attachment:
        model(**inputs)
        base = attachment.kept
    with tokprune.attach(model, spec, keep_tokens=11) as attachment:
        logits, kept = model(**inputs).logits, attachment.kept
        tokens = tiny.generate(model, inputs, max_new_tokens=6)
    assert [len(k) for k in kept] == [11] * 3
    number = 0
    for r, n_images in enumerate((1, 2)):
        single = tiny.row(inputs, r, ((0,), (1, 2)))
        ids, embeds = single["input_ids"][0], oracle.full_embeds(model, single).clone()
        sizes = torch.zeros(len(ids), dtype=torch.double)
        starts = [i for i in range(len(ids)) if ids[i] == tiny.IMAGE and ids[i - 1] != tiny.IMAGE]
        for start in starts:
            own = base[number].tolist()
            rest = [i for i in range(tiny.N_VISUAL) if i not in own]
            features = embeds[0, start : start + tiny.N_VISUAL].clone()
            sizes[[start + i for i in own]] = 1
            for mean, place, size in merged_by_hand(features[rest], 5):
                embeds[0, start + rest[place]], sizes[start + rest[place]] = mean.to(embeds), size
                own.append(rest[place])
            assert kept[number].tolist() == sorted(own)
            number += 1
        columns = (sizes > 0) | (ids != tiny.IMAGE)
        positions, short = torch.arange(len(ids))[columns], embeds[:, columns]
        own = sizes[columns] if calibrate is True else torch.zeros(int(columns.sum()))
        want, said = answer(model, short, positions, own, torch.tensor(False))
        padding = inputs["input_ids"].shape[1] - len(columns)
        assert (logits[r, padding:][columns] - want).abs().max() < 1e-4
        assert tokens[r].tolist() == said
        assert n_images == len(starts)


@torch.no_grad()
def test_sizes_alone_are_proportional_attention():
    model, inputs = model_and_batch("clip", layout=((0,),))
    with tokprune.attach(model, "tome:calibrate=positions", keep_tokens=9):
        plain = model(**inputs).logits
    with tokprune.attach(model, "tome:calibrate=sizes", keep_tokens=9) as attachment:
        logits, kept = model(**inputs).logits, attachment.kept[0]
    embeds = oracle.full_embeds(model, inputs)
    visual = (inputs["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0]
    method, tokens = tokprune.get_method("tome"), embeds[:, visual]
    from tokprune.core.layout import grid_layout
    from tokprune.core.tokens import VisualTokens

    merged = method.select(VisualTokens.of(tokens, grid_layout(6, 6)), 9)
    assert merged.sizes[merged.keep].sum() == tiny.N_VISUAL
    embeds[:, visual] = merged.features
    sizes = torch.zeros(embeds.shape[1], dtype=torch.double)
    sizes[visual[kept]] = merged.sizes[0, kept].double()
    columns = (sizes > 0) | (inputs["input_ids"][0] != tiny.IMAGE)
    want, _ = answer(
        model,
        embeds[:, columns],
        torch.arange(len(columns))[columns],
        sizes[columns],
        torch.tensor(False),
        n_new=1,
        distance=False,
    )
    assert (logits[0][columns] - want).abs().max() < 1e-5
    assert (logits - plain)[0, -1].abs().max() > 1e-2


@pytest.mark.parametrize("kind", tiny.served(["qwen2_vl", "qwen2_5_vl"]))
@torch.no_grad()
def test_distance_under_m_rope_is_over_all_axes(kind):
    """Time, height and width turn a section of the frequencies each."""
    model = tiny.model(kind, "sdpa", torch.float64)
    for parts in ((("image", 0),), (("image", 1), ("image", 2)), (("video", 0),)):
        single = row_of(kind, parts)
        positions = captured(model, single)[-3:, 0]
        with tokprune.attach(model, "divprune:calibrate=bias", keep_ratio=0.3) as attachment:
            logits, kept = model(**single).logits[0], attachment.kept
        keep = columns_kept(kind, single, kept, [parts])[0]
        positions = positions[:, keep]
        head = head_of(model)
        half = head // 2
        sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
        axis = torch.tensor([a for a, n in enumerate(sections) for _ in range(n)])
        frequencies = 10000.0 ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
        apart = (positions[:, :, None] - positions[:, None]).double()  # (3, n, n)
        near = (apart[axis] * frequencies[:, None, None]).cos().mean(0)
        visual = single["input_ids"][0][keep] == placeholder_of(kind, parts[0][0])
        later = torch.ones_like(near, dtype=torch.bool).triu(1)
        mask = torch.where(visual, (2 - near).log(), 0.0).masked_fill(later, -1e30)[None, None]
        seen = {}
        hook = oracle.language_model(model).register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.update(kwargs), with_kwargs=True
        )
        model(**single, use_cache=False)
        hook.remove()
        out = oracle.language_model(model)(
            inputs_embeds=seen["inputs_embeds"][:, keep],
            position_ids=positions[:, None],
            attention_mask=mask,
            use_cache=False,
        )
        want = model.lm_head(out.last_hidden_state)[0]
        assert (logits[keep] - want).abs().max() < 1e-5


@every_kind
@pytest.mark.parametrize("spec", ["divprune:calibrate=restore", "framefusion:calibrate=bias_all"])
@torch.no_grad()
def test_cached_decoding_and_rows_alone_are_the_same(kind, spec):
    model, inputs = model_and_batch(kind)
    spec = "divprune:calibrate=bias_all" if kind == "got_ocr2" else spec
    with tokprune.attach(model, spec, keep_ratio=0.3):
        tokens, logits = tiny.generate(model, inputs), model(**inputs).logits
        assert torch.equal(tokens, tiny.generate(model, inputs, use_cache=False))
        for r in range(3):
            single = tiny.row(inputs, r, kind=kind)
            assert torch.equal(tiny.generate(model, single)[0], tokens[r])
            assert (model(**single).logits[0, -1] - logits[r, -1]).abs().max() < 1e-4


@every_kind
@torch.no_grad()
def test_off_changes_no_bit_and_positions_are_the_original_ones(kind):
    model, inputs = tiny.model(kind), tiny.batch(kind=kind)
    with tokprune.attach(model, "divprune", keep_ratio=0.3):
        today = model(**inputs).logits
    with tokprune.attach(model, "divprune", keep_ratio=0.3, positions="original"):
        original = model(**inputs).logits
    with tokprune.attach(model, "divprune:calibrate=off", keep_ratio=0.3):
        assert torch.equal(model(**inputs).logits, today)
    with tokprune.attach(model, "divprune:calibrate=positions", keep_ratio=0.3):
        assert torch.equal(model(**inputs).logits, original)
    with tokprune.attach(model, "divprune:calibrate=restore", keep_ratio=1.0):
        with_everything = model(**inputs).logits
    assert torch.equal(with_everything, model(**inputs).logits)


@torch.no_grad()
def test_beams_equal_those_of_rows_alone():
    model, inputs = model_and_batch("clip", layout=((0,), (1,)))
    with tokprune.attach(model, "vtc_cls:calibrate=restore", keep_ratio=0.3):
        tokens = tiny.generate(model, inputs, num_beams=3)
        for r in range(2):
            single = tiny.row(inputs, r, ((0,), (1,)))
            assert torch.equal(tiny.generate(model, single, num_beams=3)[0], tokens[r])


@tiny.pictures_in_chunks
@torch.no_grad()
def test_parts_of_a_prompt_get_the_bias_and_merged_tokens_need_it_whole():
    model, inputs = model_and_batch("clip", layout=((0,),))
    with tokprune.attach(model, "divprune:calibrate=bias_all", keep_ratio=0.3):
        whole = tiny.generate(model, inputs)
        assert torch.equal(tiny.generate(model, inputs, prefill_chunk_size=12), whole)
    with (
        tokprune.attach(model, "divprune:calibrate=restore", keep_ratio=0.3),
        pytest.raises(TokPruneError, match="prefill_chunk_size"),
    ):
        tiny.generate(model, inputs, prefill_chunk_size=12)


@pytest.mark.parametrize("calibrate", ["bias", "bias_all"])
@torch.no_grad()
def test_a_second_turn_equals_the_conversation_whole(calibrate):
    model, inputs = model_and_batch("clip", layout=((0,),))
    more = torch.tensor([[11, 12, 13]])
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with tokprune.attach(model, "divprune", calibrate=calibrate, keep_ratio=0.3):
        want = model(**whole).logits[0, -1]
        cache = model(**inputs, use_cache=True)
        cache = getattr(cache, "past_key_values", None) or cache.cache
        got = model(input_ids=more, attention_mask=whole["attention_mask"], **tiny.cached(cache)).logits[0, -1]
    assert (got - want).abs().max() < 1e-5


@torch.no_grad()
def test_text_in_the_cache_before_the_first_picture():
    model, inputs = model_and_batch("clip", layout=((0,),))
    start = int((inputs["input_ids"][0] == tiny.IMAGE).nonzero()[0])
    text = {name: inputs[name][:, :start] for name in ("input_ids", "attention_mask")}
    rest = {**inputs, "input_ids": inputs["input_ids"][:, start:]}

    def in_two_parts():
        cache = model(**text, use_cache=True)
        cache = getattr(cache, "past_key_values", None) or cache.cache
        return model(**rest, **tiny.cached(cache)).logits[0, -1]

    with tokprune.attach(model, "divprune:calibrate=restore", keep_ratio=0.3):
        assert (in_two_parts() - model(**inputs).logits[0, -1]).abs().max() < 1e-5
    with (
        tokprune.attach(model, "divprune:calibrate=bias_all", keep_ratio=0.3),
        pytest.raises(UnsupportedCacheError, match="calibrate=bias"),
    ):
        in_two_parts()


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("kind", tiny.served(REFUSED))
@torch.no_grad()
def test_families_whose_layers_do_not_share_a_mask_are_refused(kind):
    model, inputs = tiny.model(kind), tiny.batch(kind=kind)
    with pytest.raises(UnsupportedModelError, match="calibrate=merge"):
        tokprune.attach(model, "divprune:calibrate=bias", keep_ratio=0.3)
    with tokprune.attach(model, "divprune:calibrate=merge", keep_ratio=0.3) as attachment:
        model(**inputs)
        assert attachment.report.n_prompt_kept < attachment.report.n_prompt


def test_attention_that_takes_no_numbers_is_refused():
    model = tiny.fresh_model()
    oracle.language_model(model).config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="sdpa"):
        tokprune.attach(model, "divprune:calibrate=bias", keep_ratio=0.3)
    oracle.language_model(model).config._attn_implementation = "sdpa"
    with tokprune.attach(model, "divprune:calibrate=bias", keep_ratio=0.3):
        oracle.language_model(model).config._attn_implementation = "flash_attention_2"
        with pytest.raises(UnsupportedModelError, match="sdpa"):
            model(**tiny.batch())


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("fastv:calibrate=bias", "leave it out"),
        ("divprune:calibrate=bias+fastv", "calibrate=merge"),
        ("sink_filter:calibrate=bias+vtc_cls", "leave it out"),
        ("divprune:calibrate=twice", "calibrate=true"),
        ("divprune:calibrate=bias:calibrate=bias", "once"),
        ("tome:calibrate=restore", "calibrate=bias"),
        ("prumerge:calibrate=merge", "calibrate=bias"),
        ("dycoke:calibrate=restore", "calibrate=bias"),
        ("pixelprune:calibrate=restore", "calibrate=bias"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_by_name(spec, says):
    with pytest.raises(OptionError, match=says):
        tokprune.get_method(spec)


@torch.no_grad()
def test_positions_and_caches_that_contradict_it_are_refused():
    model, inputs = tiny.model(), tiny.batch()
    with pytest.raises(OptionError, match="contiguous"):
        tokprune.attach(model, "divprune:calibrate=bias", keep_ratio=0.3, positions="contiguous")
    with tokprune.attach(model, "divprune:calibrate=bias", keep_ratio=0.3), pytest.raises(UnsupportedCacheError):
        tiny.generate(model, inputs, cache_implementation="static")
    with tokprune.attach(model, "divprune", keep_ratio=0.3):
        out = model(**inputs, use_cache=True)
    cache = getattr(out, "past_key_values", None) or out.cache
    more = {
        "input_ids": torch.tensor([[5]] * 3),
        "attention_mask": F.pad(inputs["attention_mask"], (0, 1), value=1),
    }
    with (
        tokprune.attach(model, "divprune:calibrate=bias", keep_ratio=0.3),
        pytest.raises(UnsupportedCacheError, match="new cache"),
    ):
        model(**more, **tiny.cached(cache))


@torch.no_grad()
def test_a_prompt_without_placeholders_is_refused():
    model, inputs = tiny.model(), tiny.batch(((0,),))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with tokprune.attach(model, "divprune:calibrate=bias", keep_ratio=0.3):
        out = model.model.get_image_features(inputs["pixel_values"])
        rows = torch.cat(list(getattr(out, "pooler_output", out)))
        embeds[inputs["input_ids"] == tiny.IMAGE] = rows
        with pytest.raises(UnsupportedModelError, match="pixel_values"):
            model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])


# ------------------------------------------------------------------------------------------- as other options


@torch.no_grad()
def test_it_is_an_option_as_others_are(tmp_path):
    model, inputs = tiny.model(), tiny.batch()
    specs = ("vtc_cls:calibrate=restore:start_layer=1", "damro_filter+vtc_cls:start_layer=1:calibrate=bias")
    for i, spec in enumerate(specs):
        with tokprune.attach(model, spec, keep_ratio=0.3) as attachment:
            want = model(**inputs).logits
            attachment.save(tmp_path / str(i))
            assert spec in repr(attachment)
        with tokprune.load(model, tmp_path / str(i)) as attachment:
            assert torch.equal(model(**inputs).logits, want)
            with attachment.using(keep_ratio=0.5):
                model(**inputs)
    method = tokprune.get_method("vtc_cls:start_layer=1")
    with tokprune.attach(model, method, calibrate=True, keep_ratio=0.3):
        first = model(**inputs).logits
    with tokprune.attach(model, specs[0], keep_ratio=0.3):
        assert torch.equal(model(**inputs).logits, first)


def test_budgets_are_met_and_anchors_are_counted():
    method = tokprune.get_method("divprune:calibrate=restore")
    assert method.min_keep(None) == 1
    from tokprune.core.layout import grid_layout
    from tokprune.core.tokens import VisualTokens

    layout, x = grid_layout(5, 5), torch.randn(2, 25, 8, generator=torch.Generator().manual_seed(1))
    for n in (1, 2, 3, 12, 24):
        found = method.select(VisualTokens.of(x, layout), n)
        assert found.keep.sum(1).tolist() == [n, n]
        sizes = torch.ones(2, 25) if found.sizes is None else found.sizes
        assert sizes[found.keep].sum() == (2 if n == 1 else 50)
    with pytest.raises(BudgetError):
        tokprune.attach(tiny.model(), "visionzip:contextual=2:calibrate=bias", keep_tokens=0)


def test_the_ledger_counts_anchors():
    from tokprune.core.layout import grid_layout
    from tokprune.cost.selection import Widths

    layout, widths = grid_layout(10, 10), Widths(8, 8, 8, 8, False)
    plain = tokprune.get_method("random").cost(layout, 20, widths)
    bias = tokprune.get_method("random:calibrate=bias").cost(layout, 20, widths)
    restore = tokprune.get_method("random:calibrate=restore").cost(layout, 20, widths)
    assert bias == plain
    assert restore.macs - plain.macs == 90 * (90 + 10) * 8
    assert math.isfinite(restore.macs)
