"""Laws of families with M-RoPE: against the bare model whose dropped columns are masked and whose positions are kept.

Rows of a batch hold a picture, two pictures, a video and a picture, and text alone; GLM takes pictures or videos.
"""

from __future__ import annotations

import functools
import sys

import pytest
import tiny
import torch
import torch.nn.functional as F
from counter import counted
from m_rope import (
    BY_COLUMN,
    MIXED,
    PICTURES,
    ROWS,
    VIDEOS,
    batch,
    captured,
    columns_kept,
    masked,
    masked_greedy,
    model_of,
    pictures_of,
    row,
    short_greedy,
    typed,
)
from tokprune.integrations.transformers import family_of
from tokprune.integrations.transformers.hooks import Hooks
from tokprune.integrations.transformers.passes import Passes
from tokprune.integrations.transformers.tower_taps import TowerTap

import tokprune
from tokprune.core.errors import OptionError, UnsupportedCacheError, UnsupportedModelError
from tokprune.core.signals import Kind, Signal

pytestmark = pytest.mark.skipif(tiny.RELEASE.release < (5, 18), reason="attach refuses these families there")
APART = [(kind, rows) for kind in tiny.GLM for rows in (PICTURES, VIDEOS)]
CASES = [*MIXED.items(), *APART, ("paddleocr_vl", PICTURES)]
UNCUT = ("qwen3_5",)  # layers with linear attention
kinds = pytest.mark.parametrize("kind", tiny.M_ROPE)
with_videos = pytest.mark.parametrize("kind", [k for k in tiny.M_ROPE if k != "paddleocr_vl"])


def parametrized(cases):
    names = [f"{k}-{'videos' if r is VIDEOS else 'pictures'}" for k, r in cases]
    return pytest.mark.parametrize(("kind", "rows"), cases, ids=names)


cases = parametrized(CASES)
# A state of all that was read cannot be masked: there the short sequence is the oracle.
masked_cases = parametrized([(k, r) for k, r in CASES if k not in UNCUT])
BEFORE = ("uniform", "fopru", "divprune", "random")
MERGING = ("fastvid", "framefusion", "dycoke:faithful=true")
OF_FRAMES = ("dycoke:k=none", "evs", "vidcom2", "random:split=query")


@cases
@torch.no_grad()
def test_keep_all_is_bit_identical(kind, rows):
    model, (inputs, _) = model_of(kind), batch(kind, rows)
    logits, tokens = model(**inputs).logits, tiny.generate(model, inputs)
    for method in (*BEFORE, "tome", "cdpruner", *([] if kind in UNCUT else ["fastv"])):
        with tokprune.attach(model, method, keep_ratio=1.0):
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(tiny.generate(model, inputs), tokens)


@parametrized([(k, r) for k, r in CASES if not k.startswith("qwen3_vl")])  # whose features come in later, too
@torch.no_grad()
def test_pruned_equals_the_language_model_on_the_short_sequence(kind, rows):
    model, (inputs, singles) = model_of(kind), batch(kind, rows)
    with tokprune.attach(model, "fopru", keep_ratio=0.3) as attachment:
        pruned, kept = model(**inputs).logits, attachment.kept
        tokens = tiny.generate(model, inputs, max_new_tokens=6)
    keep = columns_kept(kind, inputs, kept, rows)
    for r, single in enumerate(singles):
        n, positions = single["input_ids"].shape[1], captured(model, single)
        if positions is None:  # text alone
            positions = torch.arange(n)[None, None].expand(3, 1, n)
        want, answer = short_greedy(model, single, keep[r, -n:], positions)
        assert (pruned[r, -n:][keep[r, -n:]] - want).abs().max() < (1e-3 if kind in UNCUT else 1e-9)
        assert tokens[r].tolist() == answer


@masked_cases
@pytest.mark.parametrize("method", BEFORE + OF_FRAMES)
@torch.no_grad()
def test_pruned_equals_the_bare_model_with_dropped_columns_masked(kind, rows, method):
    model, (inputs, _) = model_of(kind), batch(kind, rows)
    positions, bare = captured(model, inputs), model(**inputs, use_cache=False).logits
    with tokprune.attach(model, method, keep_ratio=0.3) as attachment:
        pruned, kept = model(**inputs).logits, attachment.kept
    keep = columns_kept(kind, inputs, kept, rows)
    assert (pruned - masked(model, inputs, keep, positions))[keep].abs().max() < 1e-9
    assert (pruned - bare)[:3][keep[:3]].abs().max() > 1e-2
    # One token of the first picture swapped for another: the answer is another one.
    first, other = int(kept[0][0]), next(i for i in range(6) if i not in kept[0].tolist())
    twin = keep.clone()
    places = (inputs["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0]  # of GLM's videos, too
    twin[0, places[first]], twin[0, places[other]] = False, True
    assert (pruned[0, -1] - masked(model, inputs, twin, positions)[0, -1]).abs().max() > 1e-3


@cases
@torch.no_grad()
def test_generation_equals_recomputing_and_rows_alone(kind, rows):
    model, (inputs, singles) = model_of(kind), batch(kind, rows)
    positions = captured(model, inputs)
    with tokprune.attach(model, "fopru", keep_ratio=0.3) as attachment:
        tokens = tiny.generate(model, inputs, max_new_tokens=6)
        kept, report = attachment.kept, attachment.report
        uncached = tiny.generate(model, inputs, max_new_tokens=6, use_cache=False)
        alone = [tiny.generate(model, single, max_new_tokens=6) for single in singles]
    keep = columns_kept(kind, inputs, kept, rows)
    assert report.n_prompt_kept == int(keep.sum(1).max())
    assert torch.equal(tokens, uncached)
    assert torch.equal(tokens, torch.cat(alone))
    if kind not in UNCUT:
        assert torch.equal(tokens, masked_greedy(model, inputs, keep, positions))


@cases
@pytest.mark.parametrize("method", MERGING)
@torch.no_grad()
def test_merged_frames_of_a_batch_equal_rows_alone_and_recomputing(kind, rows, method):
    model, (inputs, singles) = model_of(kind), batch(kind, rows)
    budget = {"keep_ratio": 0.3} if tokprune.get_method(method).takes_budget else {}
    with tokprune.attach(model, method, **budget) as attachment:
        tokens, kept = tiny.generate(model, inputs, max_new_tokens=4), attachment.kept
        uncached = tiny.generate(model, inputs, max_new_tokens=4, use_cache=False)
        alone = [tiny.generate(model, single, max_new_tokens=4) for single in singles]
        n_prompt = attachment.report.n_prompt_kept
    assert torch.equal(tokens, uncached)
    assert torch.equal(tokens, torch.cat(alone))
    assert n_prompt == int(columns_kept(kind, inputs, kept, rows)[-1:].sum(1).max())


@kinds
@pytest.mark.parametrize("options", [dict(num_beams=3), dict(do_sample=True, top_k=5)], ids=["beams", "sampling"])
@torch.no_grad()
def test_beams_and_sampling_of_a_batch_equal_rows_alone(kind, options):
    rows = pictures_of(kind)[:3]
    if kind in tiny.GLM and "num_beams" in options:
        rows = (rows[0], rows[2])  # beams of a prompt with several pictures are wrong in transformers itself
    model, (inputs, singles) = model_of(kind), batch(kind, rows)
    with tokprune.attach(model, "uniform", keep_ratio=0.3) as attachment:
        torch.manual_seed(0)
        together = tiny.generate(model, inputs, max_new_tokens=4, **options)
        assert len(attachment.report.images) == sum(map(len, rows))
        if "num_beams" in options:
            alone = torch.cat([tiny.generate(model, single, max_new_tokens=4, **options) for single in singles])
            assert torch.equal(together, alone)
        torch.manual_seed(0)
        assert torch.equal(together, tiny.generate(model, inputs, max_new_tokens=4, **options))


@cases
@torch.no_grad()
def test_a_second_turn_equals_the_long_sequence_masked(kind, rows):
    """Through generate with all ids, and one step by hand: positions are those of the long sequence."""
    rows = rows[:3]
    model, (inputs, _) = model_of(kind), batch(kind, rows)
    more = torch.randint(3, 80, (3, 4), generator=torch.Generator().manual_seed(5))
    n = inputs["input_ids"].shape[1]
    with tokprune.attach(model, "uniform", keep_ratio=0.3) as attachment:
        first = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, suppress_tokens=tiny.SUPPRESSED, return_dict_in_generate=True
        )
        kept, cache = attachment.kept, first[tiny.CACHE]
        ids = torch.cat([first.sequences, more], 1)
        mask = F.pad(inputs["attention_mask"], (0, ids.shape[1] - n), value=1)
        again = typed(kind, rows, {"input_ids": ids, "attention_mask": mask})
        tokens = tiny.generate(model, again, max_new_tokens=4, **tiny.cached(cache))
    keep = columns_kept(kind, inputs, kept, rows)
    positions = captured(model, inputs)
    longer = positions[..., -1:] + torch.arange(1, ids.shape[1] - n + 1)
    whole = typed(kind, rows, {**inputs, "input_ids": ids, "attention_mask": mask})
    keep = F.pad(keep, (0, ids.shape[1] - n), value=True)
    positions = torch.cat([positions, longer], -1)
    if kind not in UNCUT:
        assert torch.equal(tokens, masked_greedy(model, whole, keep, positions, 4))
        return
    for r, parts in enumerate(rows):  # without padding, the pictures of the row alone
        own = mask[r].bool()
        alone = {k: v[r : r + 1, own] for k, v in whole.items() if k in BY_COLUMN}
        shown = {k: v for k, v in row(kind, parts, r).items() if k not in BY_COLUMN}
        _, want = short_greedy(model, alone | shown, keep[r, own], positions[:, r : r + 1, own], 4)
        assert tokens[r].tolist() == want


@cases
@pytest.mark.parametrize("r", [0, 1, 2])
@torch.no_grad()
def test_a_second_turn_of_a_row_alone_equals_the_long_sequence(kind, rows, r):
    """Without padding generate passes no mask, and more or fewer tokens again than there are words at the end."""
    rows = rows[r : r + 1]
    model, single = model_of(kind), row(kind, rows[0], r)
    n, positions = single["input_ids"].shape[1], captured(model, single)
    with tokprune.attach(model, "uniform", keep_ratio=0.3) as attachment:
        options = dict(do_sample=False, suppress_tokens=tiny.SUPPRESSED, return_dict_in_generate=True)
        first = model.generate(**single, max_new_tokens=3, **options)
        kept, cache = attachment.kept, first[tiny.CACHE]
        ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7, 8]])], 1)
        again = typed(kind, rows, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        tokens = tiny.generate(model, again, max_new_tokens=4, **tiny.cached(cache))
    more = ids.shape[1] - n
    keep = F.pad(columns_kept(kind, single, kept, rows), (0, more), value=True)
    positions = torch.cat([positions, positions[..., -1:] + torch.arange(1, more + 1)], -1)
    whole = single | again
    if kind in UNCUT:
        want = torch.tensor([short_greedy(model, whole, keep[0], positions, 4)[1]])
    else:
        want = masked_greedy(model, whole, keep, positions, 4)
    assert torch.equal(tokens, want)


@kinds
@pytest.mark.skipif(tiny.RELEASE.major < 5, reason="the bare model of transformers 4 numbers such a step from 0")
@torch.no_grad()
def test_a_step_by_hand_gets_the_position_of_the_long_sequence(kind):
    model, single = model_of(kind), row(kind, ROWS[1])  # two pictures
    positions, seen = captured(model, single), {}
    with tokprune.attach(model, "uniform", keep_ratio=0.3):
        out = model(**single, use_cache=True)
        deltas = model.model.rope_deltas.clone()
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
        )
        model(input_ids=torch.tensor([[7]]), **tiny.cached(out[tiny.CACHE]))
        hook.remove()
        assert torch.equal(model.model.rope_deltas, deltas)
    assert seen["position_ids"][-1].flatten()[0] == positions[-1, 0, -1] + 1


@torch.no_grad()
def n_encodes(model, inputs, n_new):
    """Runs of the tower in a generation without cache; some releases encode at every step."""
    seen = []
    hook = model.model.visual.register_forward_hook(lambda *_: seen.append(1))
    tiny.generate(model, inputs, max_new_tokens=n_new, use_cache=False)
    hook.remove()
    return len(seen)


@masked_cases
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "dart"])
@torch.no_grad()
def test_a_cut_between_layers_equals_masking_behind_it(kind, rows, method):
    """Cached, uncached and alone agree; the report counts what the layers saw."""
    model, (inputs, singles) = model_of(kind), batch(kind, rows)
    first = family_of(model).decoder.first_cut
    spec = f"{method}:schedule=layers/{first}x2/{first + 1}x1"
    with tokprune.attach(model, spec) as attachment:
        tokens, report = tiny.generate(model, inputs, max_new_tokens=5), attachment.report
        kept = attachment.kept
        uncached = tiny.generate(model, inputs, max_new_tokens=5, use_cache=False)
        alone = [tiny.generate(model, single, max_new_tokens=5) for single in singles]
    if n_encodes(model, inputs, 2) == n_encodes(model, inputs, 1):
        assert torch.equal(tokens, uncached)  # otherwise every step is a call of its own, which scores by its own end
    assert torch.equal(tokens, torch.cat(alone))
    assert all({first, first + 1} <= set(entry) for entry in kept)
    assert report.layers[first - 1] == inputs["input_ids"].shape[1] > report.layers[first] > report.layers[-1]


@masked_cases
@torch.no_grad()
def test_what_was_cut_is_what_masked_layers_do_not_see(kind, rows):
    model, single = model_of(kind), row(kind, rows[1])
    layer = family_of(model).decoder.first_cut
    positions = captured(model, single)
    with tokprune.attach(model, f"fastv:layer={layer}", keep_ratio=0.4) as attachment:
        pruned = model(**single).logits
        kept = [entry[layer] for entry in attachment.kept]
    keep = columns_kept(kind, single, kept, rows[1:2])[0]
    n = len(keep)
    allowed = torch.ones(n, n, dtype=torch.bool).tril() & keep | torch.eye(n, dtype=torch.bool)
    hooks = [
        block.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "attention_mask": allowed[None, None]}), with_kwargs=True
        )
        for block in model.model.language_model.layers[layer:]
    ]
    try:
        want = model(**single, position_ids=positions, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    assert (pruned - want)[0, keep].abs().max() < 1e-9


@kinds
@torch.no_grad()
def test_detaching_gives_everything_back(kind):
    model, single = tiny.fresh_model(kind), row(kind, pictures_of(kind)[2], dtype=torch.float32)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    logits = model(**single).logits
    both = {"method": "fopru+fastv", "keep_ratio": [0.5, 0.5]}
    with tokprune.attach(model, **({"method": "fopru", "keep_ratio": 0.5} if kind in UNCUT else both)):
        model(**single)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == {
        name: names | ({"rope_deltas"} & set(vars(dict(model.named_modules())[name]))) for name, names in before.items()
    }
    assert torch.equal(model(**single).logits, logits)


@kinds
def test_contiguous_positions_are_refused(kind):
    with pytest.raises(OptionError, match="positions='original'"):
        tokprune.attach(model_of(kind), "uniform", keep_ratio=0.5, positions="contiguous")


@pytest.mark.parametrize("kind", ["qwen3_vl"])
def test_cuts_before_the_added_features_are_refused(kind):
    with pytest.raises(OptionError, match="use an index from 3"):
        tokprune.attach(model_of(kind), "fastv:layer=2", keep_ratio=0.5)


def test_scores_within_windows_are_refused():
    with pytest.raises(OptionError, match="use one of 1, 3"):
        tokprune.attach(model_of("qwen2_5_vl"), "fopru:layer=2", keep_ratio=0.5)


def test_an_undeclared_column_input_is_refused():
    model = tiny.fresh_model("qwen2_vl")
    single = row("qwen2_vl", ROWS[0], dtype=torch.float32)
    n = single["input_ids"].shape[1]
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "per_layer_inputs": torch.zeros(1, n, 2)}), with_kwargs=True
    )
    with tokprune.attach(model, "uniform", keep_ratio=0.5), pytest.raises(UnsupportedModelError, match="per_layer_inp"):
        model(**single)


# ---- the vision tower


@pytest.mark.parametrize(
    ("kind", "what"),
    [(k, w) for k in tiny.M_ROPE for w in ("image", "video") if (k, w) != ("paddleocr_vl", "video")],
)
@torch.no_grad()
def test_received_attention_is_the_towers_own(kind, what, monkeypatch):
    """Recorded inside of the tower's attention function; then the mean over the patches of a token, in its order."""
    model = tiny.fresh_model(kind)
    family, tower = family_of(model), model.model.visual
    layer = family.tower.full_layers[-1] if family.tower.full_layers else family.tower.n_layers - 1
    name = f"get_{what}_features"
    given = tiny.pixels(kind, [[0, 1]]) if what == "image" else tiny.video_inputs([0])
    seen = []
    module = sys.modules[type(tower).__module__]
    own = module.eager_attention_forward

    def spy(attention, query, key, value, *args, **kwargs):
        if attention is family.attention_module(layer):
            seen.append((query @ key.transpose(2, 3) * attention.scaling).softmax(-1).mean((1, 2))[0])
        return own(attention, query, key, value, *args, **kwargs)

    monkeypatch.setattr(module, "eager_attention_forward", spy)
    model.set_attn_implementation("eager")
    signal = Signal(Kind.RECEIVED, (layer,))
    tap, hooks = TowerTap(family, frozenset({signal}), Passes()), Hooks(model)
    tap.install(hooks)
    _, found = tap.collect(lambda: getattr(model.model, name)(**given))
    hooks.close()
    patches = torch.cat(seen)
    torch.testing.assert_close(found[signal][0, :, 0], patches, rtol=1e-4, atol=1e-7)
    packed = torch.cat(family.pack(name, given, found[signal]))[:, 0]
    grids = next(v for k, v in given.items() if k.endswith("grid_thw"))
    order = family.token_order(grids)
    if kind == "paddleocr_vl":
        patches = patches[torch.tensor(in_tokens(grids))]
    tokens = patches.view(-1, 4).mean(1)
    torch.testing.assert_close(packed, tokens if order is None else tokens[order], rtol=1e-4, atol=1e-7)


@kinds
@torch.no_grad()
def test_states_of_a_token_are_the_mean_of_its_patches(kind):
    """What the last block puts out, in the order that placeholders have, which is not that of windows."""
    model = tiny.fresh_model(kind)
    family, given, seen = family_of(model), tiny.pixels(kind, [[0, 1]]), []
    hook = family.vision_layers[-1].register_forward_hook(
        lambda block, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    signal = Signal(Kind.TOWER_STATES)
    tap, hooks = TowerTap(family, frozenset({signal}), Passes()), Hooks(model)
    tap.install(hooks)
    _, found = tap.collect(lambda: model.model.get_image_features(**given))
    hooks.close()
    hook.remove()
    patches, order = seen[0].reshape(-1, seen[0].shape[-1]), family.token_order(given["image_grid_thw"])
    if kind == "paddleocr_vl":
        patches = patches[torch.tensor(in_tokens(given["image_grid_thw"]))]
    tokens = patches.unflatten(0, (-1, 4)).mean(1)
    packed = torch.cat(family.pack("get_image_features", given, found[signal][:, :, 0]))
    torch.testing.assert_close(packed, tokens if order is None else tokens[order])


def in_tokens(grids):
    """Places of the patches of one token after the other, where they lie in raster order."""
    found, start = [], 0
    for _, h, w in grids.tolist():
        rasters = torch.arange(start, start + h * w).view(h // 2, 2, w // 2, 2)
        found += rasters.transpose(1, 2).flatten().tolist()
        start += h * w
    return found


@kinds
def test_a_token_shows_the_patches_that_its_score_is_of(kind):
    """With the tower's attention switched off, the gradient of a row is at its own patches alone."""
    model = tiny.fresh_model(kind)
    family = family_of(model)
    for layer in range(len(family.vision_layers)):
        attention = family.attention_module(layer)
        last = attention.out_proj if kind == "paddleocr_vl" else attention.proj
        torch.nn.init.zeros_(last.weight)
        if last.bias is not None:
            torch.nn.init.zeros_(last.bias)
    given = tiny.pixels(kind, [[0, 1]])
    pixels = given["pixel_values"].requires_grad_()
    rows = torch.cat(family.encode("get_image_features", **given))
    n = len(pixels)
    order = family.token_order(given["image_grid_thw"])
    for t, feature in enumerate(rows):
        (gradient,) = torch.autograd.grad(feature.square().sum(), pixels, retain_graph=True)
        touched = gradient.flatten(1).abs().sum(1).gt(0).nonzero()[:, 0].tolist()
        # Patches come in groups of a token, in the order of the placeholders, whatever the tower sorts them by.
        places = in_tokens(given["image_grid_thw"]) if kind == "paddleocr_vl" else range(n)
        assert touched == sorted(places[4 * t : 4 * t + 4]), (t, n)
    if order is not None:
        marks = torch.arange(n // 4, dtype=torch.float32)[:, None].expand(-1, 4).reshape(1, n, 1)
        in_tower = marks.view(n // 4, 4)[torch.argsort(order)].view(1, n, 1)
        packed = torch.cat(family.pack("get_image_features", given, in_tower))[:, 0]
        assert packed.tolist() == list(range(n // 4))


# ---- the ledger


@kinds
@torch.no_grad()
def test_the_ledger_equals_the_counter(kind):
    model = tiny.fresh_model(kind)
    if kind.endswith("moe"):
        model.set_experts_implementation("eager")
    single = row(kind, (("image", 1),), dtype=torch.float32)
    family = family_of(model)
    grid = tiny.GRIDS[1]
    parts = ("visual", "language_model", "model.projector")
    seen = counted(lambda: model(**single, logits_to_keep=1, use_cache=False), parts)
    shape = family.shape
    ledger = shape.encode(1, grid[1] * grid[2]) + shape.read(single["input_ids"].shape[1])
    tower = seen["visual"] + seen["model.projector"]  # PaddleOCR's is beside the tower
    assert abs(ledger.vision.flops + ledger.projector.flops - tower) < 0.01 * tower
    language = seen["language_model"]
    assert abs(ledger.decoder.flops - language) < 0.01 * language


@functools.cache
def videos_report(kind):
    """Of a picture and a video, or of the video alone."""
    model, single = model_of(kind), row(kind, (ROWS if kind in MIXED else VIDEOS)[2 if kind in MIXED else 0])
    with torch.no_grad(), tokprune.attach(model, "uniform", keep_ratio=0.25) as attachment:
        model(**single)
        return attachment.report


@with_videos
def test_a_videos_budget_is_over_all_its_frames(kind):
    report = videos_report(kind)
    *pictures, video = report.images
    assert ("1 image and 1 video, " if pictures else " 1 video, ") in str(report)
    assert report.rows == [0] * len(report.images)
    assert [image.n_visual for image in pictures] == ([4] if kind in MIXED else [])
    assert (video.n_visual, video.n_kept) == (16, 4)
    assert video.layout.n_crops == tiny.VIDEO_GRIDS[0][0]
    assert set(video.kept_by_crop()) == {1, 2}


@pytest.mark.parametrize("kind", UNCUT)
def test_cuts_are_refused_where_layers_keep_a_state(kind):
    with pytest.raises(UnsupportedModelError, match="linear attention.*divprune"):
        tokprune.attach(model_of(kind), "fastv", keep_ratio=0.5)
    answers = {p.method: p.answer for p in tokprune.list_support() if p.model == kind}
    assert (answers["fastv"], answers["divprune"]) == ("no", "yes")


@pytest.mark.parametrize("kind", UNCUT)
@torch.no_grad()
def test_tokens_cannot_be_taken_back_from_a_state(kind):
    """The end of a prompt, passed again by hand, with the mask of a conversation."""
    model, single = model_of(kind), row(kind, ROWS[0])
    with tokprune.attach(model, "uniform", keep_ratio=0.3):
        cache = model(**single, use_cache=True)[tiny.CACHE]
        again = {"input_ids": single["input_ids"][:, -2:], "attention_mask": single["attention_mask"]}
        with pytest.raises(UnsupportedCacheError, match="taken back"):
            model(**again, **tiny.cached(cache))


@pytest.mark.parametrize("kind", tiny.GLM)
@pytest.mark.parametrize("rows", [PICTURES, VIDEOS], ids=["pictures", "videos"])
@torch.no_grad()
def test_a_placeholder_that_two_encode_functions_share_is_one_column(kind, rows):
    """A chunk of a prompt that drops nothing is accepted, and a prompt without its marks is not."""
    model, single = model_of(kind), row(kind, rows[0])
    with tokprune.attach(model, "uniform", keep_ratio=0.3) as attachment:
        model(**single)
        facts = []
        own = attachment._observer.before_prefill
        attachment._observer.before_prefill = lambda read, starts_call: (facts.append(read), own(read, starts_call))
        model(**single)
    assert facts[0]["placeholders"] == (single["input_ids"] == tiny.IMAGE).sum()


@pytest.mark.parametrize("kind", tiny.GLM)
def test_a_picture_and_a_video_in_a_call_are_refused_by_the_bare_model(kind):
    """Where this passes some day, the rows above may be mixed."""
    model, parts = model_of(kind), (("image", 0), ("video", 0))
    single = row(kind, parts)
    with pytest.raises(ValueError, match="do not match"), torch.no_grad():
        model(**single)
    with pytest.raises(ValueError, match="do not match"), tokprune.attach(model, "uniform", keep_ratio=0.3):
        model(**single)
