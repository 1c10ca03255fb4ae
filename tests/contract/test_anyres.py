"""Crops, newlines and videos: layouts against real processors and the models' own packing, policies, late selection."""

from __future__ import annotations

import oracle
import pytest
import tiny
import torch
from processors import PICTURES, inputs_of, picture, video_inputs
from specs import mosaic_layout, scaled, tokens_for
from tokprune.integrations.transformers.families import family_of

import tokprune
from tokprune.core.errors import BudgetError, OptionError, TokPruneError
from tokprune.core.layout import NEWLINE
from tokprune.core.signals import Kind
from tokprune.prune.request import Newlines
from tokprune.prune.select import with_newlines

ANYRES = ("llava_next", "llava_onevision", "internvl")
METHOD = {"llava_next": "vtc_cls", "llava_onevision": "fopru", "internvl": "vtc_cls"}
anyres = pytest.mark.parametrize("kind", ANYRES)


@anyres
@pytest.mark.parametrize("size", PICTURES.values(), ids=PICTURES)
@torch.no_grad()
def test_real_processor_and_layout_agree(kind, size):
    """The processor counts placeholders by its own arithmetic; the layout comes from the model's packing."""
    model, inputs = tiny.model(kind), inputs_of(kind, [[picture(size)]])
    with tokprune.attach(model, METHOD[kind], keep_ratio=0.3) as attachment:
        tokens = tiny.generate(model, inputs, max_new_tokens=2)
        (image,) = attachment.report.images
    assert tokens.shape == (1, 2)
    layout = image.layout
    assert len(layout.crop) == (inputs["input_ids"] == tiny.IMAGE).sum()
    assert image.n_kept == max(1, int(0.3 * layout.n_visual + 0.5))
    for region in layout.regions:  # every place of a grid is taken once
        assert sorted((layout.row[i], layout.column[i]) for i in region.index) == [
            (r, c) for r in range(region.height) for c in range(region.width)
        ]
    assert layout.n_crops == 1 + layout.crop_grid[0] * layout.crop_grid[1]
    assert set(layout.crops) <= set(range(layout.n_crops))  # a crop may be padding alone
    ends = [i for i, crop in enumerate(layout.crop) if crop == NEWLINE]
    if kind != "internvl":
        assert [layout.row[i] for i in ends] == list(range(layout.height))
        assert (layout.width / layout.height) == pytest.approx(size[0] / size[1], rel=0.35)


@anyres
@torch.no_grad()
def test_mixed_batch_from_a_real_processor_equals_single_rows(kind):
    rows = [[picture((48, 30))], [], [picture((20, 60), 1), picture((48, 48), 2)]]
    model, inputs = tiny.model(kind), inputs_of(kind, rows)
    with tokprune.attach(model, METHOD[kind], keep_ratio=0.25) as attachment:
        together, kept = tiny.generate(model, inputs), attachment.kept
        alone = []
        for row in rows:
            alone.append(tiny.generate(model, inputs_of(kind, [row])))
            for index in attachment.kept if row else []:
                assert torch.equal(index, kept.pop(0))
    assert torch.equal(together, torch.cat(alone))
    assert not kept


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("image", range(len(tiny.SIZES)))
@torch.no_grad()
def test_signals_land_on_the_patches_they_belong_to(kind, image):
    """A signal that numbers patches tells, after packing, the place that the layout names."""
    model, inputs = tiny.model(kind), tiny.pixels(kind, [[image]])
    adapter, side = family_of(model), tiny.SIDE // tiny.PATCH
    features = [torch.zeros(tiny.n_rows(kind, image), 1)]
    (layout,) = adapter.layouts("get_image_features", inputs, features)
    rows, columns = layout.crop_grid
    n_patches = side * side
    numbers = torch.arange((1 + rows * columns) * n_patches).float().view(-1, n_patches, 1)
    (packed,) = adapter.pack("get_image_features", inputs, numbers)
    top, left = (side * rows - layout.height) // 2, (side * columns - layout.width) // 2
    for i, number in enumerate(packed[:, 0].tolist()):
        crop, row, column = layout.crop[i], layout.row[i], layout.column[i]
        if crop == NEWLINE:
            assert number != number
            continue
        if crop:
            row, column = row + top, column + left
            assert crop == 1 + row // side * columns + column // side
        assert number == crop * n_patches + row % side * side + column % side


@torch.no_grad()
def test_onevision_interpolates_signals_with_features():
    """A mosaic above the model's limit is made smaller; crops and counts follow."""
    model, inputs = tiny.model("llava_onevision"), inputs_of("llava_onevision", [[picture((96, 96))]])
    with tokprune.attach(model, "globalcom2", keep_tokens=40) as attachment:
        model(**inputs)
        (image,) = attachment.report.images
    assert image.layout.crop_grid == (4, 4)
    assert image.layout.height < 24
    assert image.n_kept == 40
    sizes = image.layout.crop_sizes
    assert len(sizes) == 17
    assert max(sizes[1:]) <= 1.6 * min(sizes[1:])  # the crops of a grid share it evenly


@torch.no_grad()
def test_onevision_several_images_are_not_cut():
    model, inputs = (
        tiny.model("llava_onevision"),
        inputs_of("llava_onevision", [[picture((48, 48)), picture((20, 60))]]),
    )
    with tokprune.attach(model, "globalcom2", keep_ratio=0.25) as attachment:
        model(**inputs)
        report = attachment.report
    assert [(i.n_visual, i.n_special, i.layout.n_crops) for i in report.images] == [(36, 1, 1)] * 2
    assert [(i.n_kept, i.n_special_kept) for i in report.images] == [(9, 1)] * 2


# ---- videos

OF_VIDEOS = (
    "fopru globalcom2 uniform:split=even visionzip cdpruner tome evs vidcom2 fastvid framefusion dycoke:k=none "
    "random:split=query"
)


@pytest.mark.parametrize("method", OF_VIDEOS.split())
@torch.no_grad()
def test_video_is_one_image_of_frames(method):
    model, inputs = tiny.model("llava_onevision", dtype=torch.float64), video_inputs(dtype=torch.float64)
    bare = model(**inputs).logits
    with tokprune.attach(model, method, keep_ratio=1):
        assert torch.equal(model(**inputs).logits, bare)
    with tokprune.attach(model, method, keep_tokens=10) as attachment:
        logits, (image,) = model(**inputs).logits, attachment.report.images
        tokens = tiny.generate(model, inputs, max_new_tokens=3)
    read = {name: getattr(model.config, name) for name in ("vision_feature_layer", "vision_feature_select_strategy")}
    out = model.model.get_video_features(inputs["pixel_values_videos"], **read)
    rows = getattr(out, "pooler_output", out)[0]
    n_newlines = len(rows) - 27  # transformers 4 joins the newline later, unseen
    assert (image.n_visual, image.n_kept, image.n_special, image.n_special_kept) == (27, 10, n_newlines, n_newlines)
    assert image.layout.crop_grid == (3, 1)
    assert tokens.shape == (1, 3)
    if tokprune.get_method(method).keeps_features:
        if not n_newlines:
            rows = torch.cat([rows, model.model.image_newline[None]])
        embeds = model.get_input_embeddings()(inputs["input_ids"]).clone()
        embeds[inputs["input_ids"] == tiny.VIDEO] = rows
        columns = inputs["input_ids"][0] != tiny.VIDEO
        columns[3 + image.kept] = True
        columns[3 + 27] = True
        want = oracle.short_logits(model, embeds, columns, "contiguous")
        assert (logits[0, columns] - want[0]).abs().max() < 1e-9


# ---- newlines


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("policy", ["keep_rows_with_tokens", "keep", "drop"])
@torch.no_grad()
def test_newline_policies(kind, policy):
    model, inputs = tiny.model(kind, dtype=torch.float64), tiny.batch(((2,),), torch.float64, kind=kind)
    with tokprune.attach(model, "random", keep_tokens=9, newlines=policy) as attachment:
        logits, (image,) = model(**inputs).logits, attachment.report.images
    layout, kept = image.layout, image.kept.tolist()
    rows = {layout.row[i] for i in kept if layout.crop[i] > 0}
    ends = {layout.row[i] for i in kept if layout.crop[i] == NEWLINE}
    assert ends == {"keep_rows_with_tokens": rows, "keep": set(range(layout.height)), "drop": set()}[policy]
    assert image.n_kept == 9
    columns = oracle.kept_columns(inputs, [image.kept])
    want = oracle.short_logits(model, oracle.full_embeds(model, inputs), columns, "contiguous")
    assert (logits[0, columns] - want[0]).abs().max() < 1e-9


def test_newlines_of_empty_rows_go_for_every_image_apart():
    layout = mosaic_layout(2, (1, 2))
    crop, row, column = layout.crop, layout.row, layout.column
    whole = type(layout)((*crop, NEWLINE, NEWLINE), (*row, 0, 1), (*column, -1, -1), layout.crop_grid)
    keep = torch.zeros(3, 14, dtype=torch.bool)
    keep[0, 4] = keep[1, 9] = keep[2, 0] = True  # the first row, the second row, the thumbnail
    assert with_newlines(keep, whole, "keep_rows_with_tokens")[:, -2:].tolist() == [[1, 0], [0, 1], [0, 0]]
    assert with_newlines(keep | True, whole, "drop")[:, -2:].any().item() is False


def test_unknown_newline_policy_is_refused():
    with pytest.raises(OptionError, match="'keep_rows_with_tokens'"):
        tokprune.attach(tiny.model("llava_next"), "fopru", keep_ratio=0.3, newlines="some")
    assert set(Newlines.__args__) == {"keep_rows_with_tokens", "keep", "drop"}


@torch.no_grad()
def test_faithful_sets_the_papers_newlines():
    model, inputs = tiny.model("llava_next"), tiny.batch(((2,),), kind="llava_next")
    seen = {}
    for spec in ("globalcom2:faithful=true", "hired:faithful=true", "globalcom2"):
        with tokprune.attach(model, spec, keep_ratio=0.1) as attachment:
            model(**inputs)
            (image,) = attachment.report.images
            seen[spec] = image.n_special_kept / image.n_special
    assert seen["globalcom2:faithful=true"] == 1
    assert seen["hired:faithful=true"] == 0
    assert 0 < seen["globalcom2"] <= 1


@torch.no_grad()
def test_blind_keeps_no_newline():
    model, inputs = tiny.model("llava_next"), tiny.batch(((2,),), kind="llava_next")
    with tokprune.attach(model, "blind") as attachment:
        model(**inputs)
        assert attachment.report.n_prompt_kept == (inputs["input_ids"] != tiny.IMAGE).sum()


# ---- InternVL: what only the prompt and the pixels tell


def test_internvl_finds_grid_and_thumbnail():
    from tokprune.core.tiles import arranged

    images = [tiny.tiles(i) for i in range(5)]
    assert arranged(images) == [((0, 0), 0), ((1, 2), 2), ((2, 1), 2), ((2, 2), 4), ((1, 3), 3)]
    first = [torch.cat([image[-1:], image[:-1]]) for image in images[1:]]
    assert arranged(first) == [((1, 2), 0), ((2, 1), 0), ((2, 2), 0), ((1, 3), 0)]
    noise = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert arranged([noise]) == [((1, 3), -1)]  # no tile shows the whole
    assert arranged([torch.ones(3, 3, 32, 32)]) == [((1, 2), 2)]  # nothing tells: the usual


@torch.no_grad()
def test_internvl_budget_is_of_an_image_over_all_its_tiles():
    model, inputs = tiny.model("internvl"), tiny.batch(((3, 0), (1,)), kind="internvl")
    with tokprune.attach(model, "globalcom2", keep_ratio=0.25) as attachment:
        model(**inputs)
        images = attachment.report.images
    assert [(i.n_visual, i.n_kept, i.layout.n_crops) for i in images] == [(80, 20, 5), (16, 4, 1), (48, 12, 3)]
    assert all(sum(i.kept_by_crop().values()) == i.n_kept for i in images)


@pytest.mark.parametrize(("kind", "method"), [("internvl", "vtc_cls"), ("llava_next", "cdpruner")])
@torch.no_grad()
def test_late_selection_needs_the_whole_prompt(kind, method):
    model, inputs = tiny.model(kind), tiny.row(tiny.batch(kind=kind), 1, kind=kind)
    images = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    with tokprune.attach(model, method, keep_ratio=0.3):
        features = model.model.get_image_features(**images)
        rows = torch.cat(list(getattr(features, "pooler_output", features)))
        embeds = model.get_input_embeddings()(inputs["input_ids"]).clone()
        mask = inputs["input_ids"][0] == tiny.IMAGE
        embeds[0, mask] = rows.to(embeds.dtype)
        part = int(mask.nonzero()[-1])  # the last placeholder is missing
        with pytest.raises(TokPruneError, match="in one pass"):
            model(inputs_embeds=embeds[:, :part])


@torch.no_grad()
def test_inputs_embeds_equal_input_ids_where_selection_is_late():
    for kind, method in (("internvl", "vtc_cls"), ("llava_next", "cdpruner"), ("clip", "cdpruner")):
        model = tiny.model(kind)
        inputs = tiny.row(tiny.batch(kind=kind), 1, kind=kind)
        embeds = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
        del embeds["input_ids"]
        with tokprune.attach(model, method, keep_ratio=0.3) as attachment:
            assert torch.equal(model(**embeds).logits, model(**inputs).logits)
            assert attachment.report.n_prompt_kept < attachment.report.n_prompt


@torch.no_grad()
def test_cdpruner_reads_the_text():
    """Another question keeps other tokens; padding and the other rows' text play no part."""
    model = tiny.model("clip")
    kept = []
    for word in (5, 70):
        ids = torch.tensor([[1, *[tiny.IMAGE] * 36, word, word, word]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": tiny.pictures(1)}
        with tokprune.attach(model, "cdpruner", keep_tokens=8) as attachment:
            model(**inputs)
            kept.append(attachment.kept[0].tolist())
    assert kept[0] != kept[1]


@torch.no_grad()
def test_second_turn_with_another_image_selects_that_image_alone():
    for kind, method in (("internvl", "vtc_cls"), ("clip", "cdpruner")):
        model = tiny.model(kind, dtype=torch.float64)
        first = tiny.batch(((0,),), torch.float64, kind=kind)
        second = tiny.batch(((1,),), torch.float64, seed=9, lead=False, kind=kind)
        with tokprune.attach(model, method, keep_ratio=0.3) as attachment:
            cache = model(**first, use_cache=True).past_key_values
            mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
            model(**{**second, "attention_mask": mask}, **tiny.cached(cache))
            (image,) = attachment.report.images
        assert len(image.layout.crop) == tiny.n_rows(kind, 1)
        assert 0 < image.n_kept < image.n_visual


# ---- merges in the tower's space


@pytest.mark.parametrize("kind", ["clip", "llava_next"])
@torch.no_grad()
def test_visionzip_projects_merged_states_with_the_models_projector(kind):
    """The [CLS] state of every crop comes first; dominant tokens are as the bare model has them."""
    model, inputs = tiny.model(kind, dtype=torch.float64), tiny.batch(((2,),), torch.float64, kind=kind)
    images = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    pixels = images["pixel_values"].flatten(0, -4)
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    cls_rows = model.model.multi_modal_projector(hidden[:, :1])[:, 0]
    bare = oracle.features_of(model, inputs)
    with tokprune.attach(model, "visionzip", keep_ratio=0.5) as attachment:
        out = model.model.get_image_features(**images)
        layout, kept = attachment.report.images[0].layout, attachment.kept[0]
    rows = torch.cat(list(getattr(out, "pooler_output", out)))
    for crop in layout.crops:
        own = [i for i in kept.tolist() if layout.crop[i] == crop]
        assert (rows[own[0]] - cls_rows[crop]).abs().max() < 1e-5
        n_same = sum(bool(((bare - rows[i]).abs().amax(1) < 1e-5).any()) for i in own[1:])
        assert n_same >= 0.7 * len(own) - 1  # dominant ones; contextual ones are merged
        assert n_same < len(own) - 1


@torch.no_grad()
def test_prumerge_on_a_model_equals_the_formula():
    model, inputs = tiny.model("clip", dtype=torch.float64), tiny.batch(((0,),), torch.float64)
    hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    attention = tiny.model("clip", "eager", torch.float64).model.vision_tower
    layer = getattr(attention, "vision_model", attention).encoder.layers[3]
    x = layer.layer_norm1(hidden[3])
    q, k = layer.self_attn.q_proj(x)[0], layer.self_attn.k_proj(x)[0]
    a = (q[:1] @ k.T / 32**0.5).softmax(-1)[0, 1:]
    keys = torch.nn.functional.normalize(k[1:], dim=-1)
    states, top = hidden[-2][0, 1:], a.argsort(descending=True)[:9]
    want = []
    for i in top.tolist():
        near = (keys @ keys[i]).index_fill(0, torch.tensor([i]), -9).topk(32).indices
        want.append(states[i] + (a[near, None] * states[near]).sum(0))
    dropped = [i for i in range(36) if i not in top.tolist()]
    want.append((a[dropped, None] * states[dropped]).sum(0))
    want = model.model.multi_modal_projector(torch.stack(want))
    with tokprune.attach(model, "prumerge:adaptive=false", keep_tokens=10) as attachment:
        out = model.model.get_image_features(inputs["pixel_values"])
        got = getattr(out, "pooler_output", out)[0][attachment.kept[0]]
    assert (got - want).abs().max() < 1e-4


# ---- allocation


def test_globalcom2_gives_more_to_the_crop_where_the_thumbnail_looks():
    layout = mosaic_layout(6, (2, 2))
    tokens = tokens_for("globalcom2", layout=layout)
    (signal,) = tokens.signals
    tokens.signals[signal] = torch.zeros_like(tokens.signals[signal]) + 1e-3 * tokens.signals[signal]
    cell = [i for i in layout.regions[0].index if layout.row[i] < 3 and layout.column[i] >= 3]  # crop 2
    tokens.signals[signal][:, :, cell] += 5
    counts = {}
    for spec in ("globalcom2", "globalcom2:allocate=even"):
        keep = tokprune.get_method(spec).select(tokens, 40).keep
        counts[spec] = [int(keep[0, [i for i, c in enumerate(layout.crop) if c == crop]].sum()) for crop in range(5)]
    assert counts["globalcom2:allocate=even"] == [8, 8, 8, 8, 8]
    assert counts["globalcom2"][2] > max(counts["globalcom2"][i] for i in (1, 3, 4)) + 4
    assert sum(counts["globalcom2"]) == 40


@torch.no_grad()
def test_fallback_without_cls_prefers_what_is_unlike_the_mean():
    tokens = tokens_for("globalcom2", layout=mosaic_layout(6, (1, 2)))
    bare = tokens.of(tokens.features, tokens.layout)
    score = tokprune.get_method("globalcom2")._own(bare)
    crop = [i for i, c in enumerate(tokens.layout.crop) if c == 1]
    x = torch.nn.functional.normalize(tokens.features[0, crop], dim=-1)
    mean = torch.nn.functional.normalize(tokens.features[0, crop].mean(0), dim=-1)
    assert torch.allclose(score[0, crop], -(x @ mean), atol=1e-6)


# ---- filters


@torch.no_grad()
def test_filter_drops_the_strongest_of_every_crop_before_selection():
    layout = mosaic_layout(6, (1, 2))
    tokens = tokens_for("damro_filter:n_outliers=3+vtc_cls", layout=layout)
    single = next(values for s, values in tokens.signals.items() if s.heads == "single")[:, 0]
    gone = set()
    for crop in range(3):
        own = [i for i, c in enumerate(layout.crop) if c == crop]
        gone |= {own[j] for j in single[0, own].topk(3).indices.tolist()}
    from specs import build

    chain = build("damro_filter:n_outliers=3+vtc_cls")
    keep = chain.select(tokens, 99).keep[0].nonzero()[:, 0].tolist()
    assert set(keep) == set(range(108)) - gone
    keep = chain.select(tokens, 101).keep[0].nonzero()[:, 0].tolist()
    assert len(keep) == 101  # dropped tokens come back last
    assert set(range(108)) - gone < set(keep)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("damro_filter", "is a filter"),
        (["damro_filter"], "is a filter"),
        (["vtc_cls", "damro_filter"], r"use \['damro_filter', 'vtc_cls'\]"),
        (["vtc_cls", "fopru"], "exactly one method"),
        (["damro_filter", "divprune"], "does not rank single tokens"),
        (["damro_filter", "fopru:strategy=row"], "does not rank single tokens"),
        ([], "list of methods is empty"),
    ],
)
def test_lists_that_make_no_sense_are_refused(method, message):
    with pytest.raises(TokPruneError, match=message):
        tokprune.attach(tiny.model(), method, keep_ratio=0.5)


@pytest.mark.parametrize("spec", ["prumerge", "prumerge_plus", "tokencorr"])
@torch.no_grad()
def test_methods_that_decide_take_no_budget_and_prune(spec):
    model, inputs = tiny.model("llava_next"), tiny.batch(kind="llava_next")
    with pytest.raises(BudgetError, match="takes no budget"):
        tokprune.attach(model, scaled(spec), keep_ratio=0.5)
    with tokprune.attach(model, scaled(spec)) as attachment:
        model(**inputs)
        assert all(0 < i.n_kept <= i.n_visual for i in attachment.report.images)


def test_tokencorr_keeps_what_repeats_once_in_a_while():
    """Equal keys are repetitions; the share of other tokens decides how many are drawn."""
    tokens = tokens_for("tokencorr:sample=top")
    keys = next(s for s in tokens.signals if s.kind is Kind.KEYS)
    tokens.signals[keys][:, :, :24] = 1.0
    method = tokprune.get_method("tokencorr", sample="top")
    assert method.n_distinct(tokens).tolist() == pytest.approx([12] * 3, abs=1)
    assert 12 <= int(method.select(tokens, 0).keep[0].sum()) <= 16


# ---- what methods do over crops, by hand


@torch.no_grad()
def test_internvl_signal_of_a_token_is_the_mean_of_its_patches():
    model = tiny.model("internvl")
    adapter, side = family_of(model), tiny.TILE // tiny.PATCH
    patches = torch.randn(2, side * side, 3, generator=torch.Generator().manual_seed(0))
    packed = adapter.pack("get_image_features", {}, patches)
    for tile, tokens in zip(patches, packed, strict=True):
        grid = tile.view(side // 2, 2, side // 2, 2, 3).mean((1, 3)).flatten(0, 1)
        assert torch.allclose(tokens, grid, atol=1e-6)


@pytest.mark.parametrize(
    "spec", ["vtc_cls:split=even", "random:split=even", "divprune:split=even", "cdpruner:split=even"]
)
def test_even_split_gives_every_crop_the_same(spec):
    layout = mosaic_layout(4, (1, 3), width=11)  # the outer crops are narrower
    keep = tokprune.get_method(spec.split(":")[0], split="even").select(tokens_for(spec, layout=layout), 23).keep
    counts = [int(keep[0, [i for i, c in enumerate(layout.crop) if c == crop]].sum()) for crop in range(4)]
    assert sorted(counts) == [5, 6, 6, 6]
    joint = tokprune.get_method(spec.split(":")[0]).select(tokens_for(spec, layout=layout), 23).keep
    assert not torch.equal(joint, keep)


def test_hired_counts_winners_in_the_quarter_that_a_crop_shows():
    layout = mosaic_layout(6, (2, 2))
    tokens = tokens_for("hired", layout=layout)
    (signal,) = tokens.signals
    tokens.signals[signal][:, 0] = 0
    for place in range(36):  # the upper right quarter wins, then the lower left one
        row, column = divmod(place, 6)
        tokens.signals[signal][:, 0, place] = 2.0 * (row < 3 <= column) + 1.0 * (column < 3 <= row)
    assert tokprune.get_method("hired").crop_counts(tokens).tolist() == [[0, 9, 9, 0]] * 3
    assert tokprune.get_method("hired", faithful=True).crop_counts(tokens)[0].tolist() != [0, 9, 9, 0]
    keep = tokprune.get_method("hired").select(tokens, 40).keep
    counts = [int(keep[0, [i for i, c in enumerate(layout.crop) if c == crop]].sum()) for crop in range(5)]
    assert counts == [20, 0, 10, 10, 0]


def test_tome_merges_as_a_plain_loop_does():
    from tokprune.core.layout import grid_layout
    from tokprune.core.tokens import VisualTokens

    x = torch.randn(1, 9, 5, generator=torch.Generator().manual_seed(2))
    tokens = [(i, x[0, i], 1) for i in range(9)]  # place, mean, size
    for n_keep in (5, 3):  # half of nine at most, then the rest
        a, b = tokens[::2], tokens[1::2]
        near = [[float(torch.cosine_similarity(p[1], q[1], 0)) for q in b] for p in a]
        best = [max(range(len(b)), key=lambda j: row[j]) for row in near]
        order = sorted(range(len(a)), key=lambda i: -near[i][best[i]])[: len(tokens) - n_keep]
        for j in {best[i] for i in order}:
            group = [b[j], *(a[i] for i in order if best[i] == j)]
            size = sum(g[2] for g in group)
            b[j] = (b[j][0], sum(g[1] * g[2] for g in group) / size, size)
        tokens = sorted([*b, *(a[i] for i in range(len(a)) if i not in order)], key=lambda t: t[0])
        out = tokprune.get_method("tome").select(VisualTokens.of(x, grid_layout(3, 3)), n_keep)
        assert out.keep[0].nonzero()[:, 0].tolist() == [t[0] for t in tokens]
        assert torch.allclose(out.features[0, out.keep[0]], torch.stack([t[1] for t in tokens]), atol=1e-5)
