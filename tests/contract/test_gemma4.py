"""Laws of Gemma 4: against the bare model whose dropped columns are masked; with and without per-layer inputs.

Rows of a batch hold a picture, two pictures, and text alone; or a video, and a video and a picture.
"""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F
from tokprune.integrations.transformers import family_of
from tokprune.integrations.transformers.hooks import Hooks
from tokprune.integrations.transformers.passes import Passes
from tokprune.integrations.transformers.tower_taps import TowerTap

import tokprune
from tokprune.core.errors import BudgetError, UnsupportedModelError
from tokprune.core.signals import Kind, Signal

pytestmark = pytest.mark.skipif(tiny.RELEASE.release < (5, 23), reason="attach refuses this family there")
kinds = pytest.mark.parametrize("kind", tiny.GEMMA4)
DTYPE = torch.float64
TYPES = "mm_token_type_ids"
BEFORE = ("uniform", "fopru", "divprune")
VIDEO_FRAMES = ((0, 3), (2, 2))  # kind of grid, frames


def model_of(kind):
    return tiny.model(kind, "sdpa", DTYPE)


def batch_of(kind, what="pictures"):
    if what == "pictures":
        inputs = tiny.batch(dtype=DTYPE, kind=kind)
        return inputs, [tiny.row(inputs, r, kind=kind) for r in range(3)]
    singles = [video_row(kind, 0, ()), video_row(kind, 1, (1,))]
    n = max(single["input_ids"].shape[1] for single in singles)
    found = {}
    for name in dict.fromkeys(name for single in singles for name in single):
        parts = [single[name] for single in singles if name in single]
        if name in ("input_ids", "attention_mask", TYPES):
            parts = [F.pad(p, (n - p.shape[1], 0)) for p in parts]
        found[name] = torch.cat(parts)
    return found, singles


def video_row(kind, video, images):
    """A video, a text between its frames, then pictures."""
    grid, n_frames = VIDEO_FRAMES[video]
    n = tiny.n_rows(kind, grid)
    ids = [1, 5 + video, 6]
    for frame in range(n_frames):
        ids += [10 + frame, tiny.START, *[tiny.VIDEO] * n, tiny.END]
    for image in images:
        ids += [7, tiny.START, *[tiny.IMAGE] * tiny.n_rows(kind, image), tiny.END]
    single = tiny.typed(kind, tiny.padded([[*ids, 8, 9, 20 + video, 21]]))
    values, places = tiny.padded_patches([grid] * n_frames, DTYPE)
    values = values * torch.linspace(0.5, 1, n_frames).view(-1, 1, 1)  # frames differ
    single |= {
        "pixel_values_videos": values,
        "video_position_ids": places,
        "num_frames_per_video": torch.tensor([n_frames]),
    }
    return single | (tiny.pixels(kind, [list(images)], DTYPE) if images else {})


def positions_of(inputs):
    return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def kept_columns(inputs, images):
    """(B, S) bool; `images` are the report's, pictures before videos."""
    keep, ids, start = inputs["attention_mask"].bool().clone(), inputs["input_ids"], 0
    flags = [torch.zeros(len(i.layout.crop)).bool().index_fill(0, i.kept, True) for i in images]
    for what in (tiny.IMAGE, tiny.VIDEO):
        left, own = int((ids == what).sum()), []
        while left:
            own.append(flags[start])
            left, start = left - len(flags[start]), start + 1
        if own:
            keep[ids == what] = torch.cat(own)
    assert start == len(flags)
    return keep


@torch.no_grad()
def masked(model, inputs, keep, positions):
    rest = {k: v for k, v in inputs.items() if k != "attention_mask"}
    return model(**rest, attention_mask=keep.long(), position_ids=positions, use_cache=False).logits


def masked_greedy(model, inputs, keep, n_new=5):
    inputs, tokens, positions = dict(inputs), [], positions_of(inputs)
    for _ in range(n_new):
        logits = masked(model, inputs, keep, positions)[:, -1]
        logits[:, tiny.SUPPRESSED] = -torch.inf
        tokens.append(logits.argmax(-1, keepdim=True))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[-1]], 1)
        inputs[TYPES] = F.pad(inputs[TYPES], (0, 1))
        keep, positions = F.pad(keep, (0, 1), value=True), torch.cat([positions, positions[:, -1:] + 1], 1)
    return torch.cat(tokens, 1)


@kinds
@torch.no_grad()
def test_keep_all_is_bit_identical(kind):
    model, (inputs, _) = model_of(kind), batch_of(kind)
    logits, tokens = model(**inputs).logits, tiny.generate(model, inputs)
    for method in (*BEFORE, "tome", "cdpruner"):
        with tokprune.attach(model, method, keep_ratio=1.0):
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(tiny.generate(model, inputs), tokens)


@kinds
@pytest.mark.parametrize("what", ["pictures", "videos"])
@pytest.mark.parametrize("method", BEFORE)
@torch.no_grad()
def test_pruned_equals_the_bare_model_with_dropped_columns_masked(kind, what, method):
    model, (inputs, _) = model_of(kind), batch_of(kind, what)
    positions = positions_of(inputs)
    bare = model(**inputs, position_ids=positions, use_cache=False).logits
    with tokprune.attach(model, method, keep_ratio=0.3, positions="original") as attachment:
        pruned, images = model(**inputs, position_ids=positions).logits, attachment.report.images
    keep = kept_columns(inputs, images)
    assert (pruned - masked(model, inputs, keep, positions))[keep].abs().max() < 1e-6
    assert (pruned - bare)[:2][keep[:2]].abs().max() > 1e-2
    # One token swapped for its neighbour: the answer is another one.
    twin = keep.clone()
    own = ((inputs["input_ids"][0] == tiny.IMAGE) | (inputs["input_ids"][0] == tiny.VIDEO)).nonzero()[:, 0]
    first = next(i for i, p in enumerate(own.tolist()) if keep[0, p] and i + 1 < len(own) and not keep[0, own[i + 1]])
    twin[0, own[first]], twin[0, own[first + 1]] = False, True
    assert (pruned[0, -1] - masked(model, inputs, twin, positions)[0, -1]).abs().max() > 1e-3


@kinds
@pytest.mark.parametrize("what", ["pictures", "videos"])
@pytest.mark.parametrize("positions", ["original", "contiguous"])
@torch.no_grad()
def test_generation_equals_recomputing_and_rows_alone(kind, what, positions):
    model, (inputs, singles) = model_of(kind), batch_of(kind, what)
    with tokprune.attach(model, "fopru", keep_ratio=0.3, positions=positions) as attachment:
        tokens = tiny.generate(model, inputs, max_new_tokens=5)
        report = attachment.report
        uncached = tiny.generate(model, inputs, max_new_tokens=5, use_cache=False)
        alone = torch.cat([tiny.generate(model, single, max_new_tokens=5) for single in singles])
    keep = kept_columns(inputs, report.images)
    assert report.n_prompt_kept == int(keep.sum(1).max())
    assert torch.equal(tokens, uncached)
    assert torch.equal(tokens, alone)
    if positions == "original":
        assert torch.equal(tokens, masked_greedy(model, inputs, keep))


@kinds
@pytest.mark.parametrize("options", [dict(num_beams=3), dict(do_sample=True, top_k=5)], ids=["beams", "sampling"])
@torch.no_grad()
def test_beams_and_sampling(kind, options):
    model, (inputs, singles) = model_of(kind), batch_of(kind)
    with tokprune.attach(model, "uniform", keep_ratio=0.3):
        torch.manual_seed(0)
        together = tiny.generate(model, inputs, max_new_tokens=4, **options)
        torch.manual_seed(0)
        assert torch.equal(together, tiny.generate(model, inputs, max_new_tokens=4, use_cache=False, **options))
        if "num_beams" in options:
            alone = [tiny.generate(model, single, max_new_tokens=4, **options) for single in singles]
            assert torch.equal(together, torch.cat(alone))


@kinds
@torch.no_grad()
def test_a_second_turn_equals_the_long_sequence_masked(kind):
    model, (_, singles) = model_of(kind), batch_of(kind)
    single, more = singles[1], torch.tensor([[5, 6, 7]])
    with tokprune.attach(model, "uniform", keep_ratio=0.3, positions="original") as attachment:
        out = model(**single, use_cache=True)
        keep = F.pad(kept_columns(single, attachment.report.images), (0, 3), value=True)
        ids = torch.cat([single["input_ids"], more], 1)
        again = tiny.typed(kind, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        tokens = tiny.generate(model, again, max_new_tokens=4, **tiny.cached(out[tiny.CACHE]))
    assert torch.equal(tokens, masked_greedy(model, single | again, keep, 4))


@kinds
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
@torch.no_grad()
def test_the_last_logits_alone_are_those_of_all(kind):
    """With shared keys the language model gives back the last columns only."""
    model, (inputs, _) = model_of(kind), batch_of(kind)
    with tokprune.attach(model, "uniform", keep_ratio=0.3):
        whole = model(**inputs).logits
        last = model(**inputs, logits_to_keep=1).logits
    assert last.shape[1] == 1
    assert (last - whole[:, -1:]).abs().max() < 1e-9


@kinds
def test_what_cannot_work_is_refused(kind):
    with pytest.raises(UnsupportedModelError, match="masks and caches.*divprune"):
        tokprune.attach(model_of(kind), "fastv", keep_ratio=0.5)
    with pytest.raises(BudgetError, match="FLOPs"):
        tokprune.attach(model_of(kind), "uniform", flops_ratio=0.5)


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


@pytest.mark.parametrize("what", ["image", "video"])
@torch.no_grad()
def test_received_attention_is_the_towers_own(what):
    """Of the patches that are there, in the processor's order; then the mean over those of a token."""
    model = tiny.fresh_model("gemma4", "eager")
    family, layer, name = family_of(model), 2, f"get_{what}_features"
    if what == "image":
        given = tiny.pixels("gemma4", [[0, 1]])
    else:
        given = {k: v for k, v in video_row("gemma4", 0, ()).items() if "video" in k}
        given["pixel_values_videos"] = given["pixel_values_videos"].float()
    signal, maps = Signal(Kind.RECEIVED, (layer,)), []
    tap, hooks = TowerTap(family, frozenset({signal}), Passes()), Hooks(model)
    tap.install(hooks)
    spy = family.attention_module(layer).register_forward_hook(lambda module, args, out: maps.append(out[1]))
    _, found = tap.collect(lambda: getattr(model.model, name)(**given))
    hooks.close()
    spy.remove()
    places = given[f"{what}_position_ids"]
    valid = (places >= 0).all(-1)
    parts = [m[:, v][:, :, v].mean((0, 1)) for m, v in zip(maps[0], valid, strict=True)]
    torch.testing.assert_close(found[signal][0, :, 0], torch.cat(parts), rtol=1e-4, atol=1e-7)
    packed = torch.cat(family.pack(name, given, found[signal]))[:, 0]
    tokens = []
    for part, own in zip(parts, places, strict=True):
        width, height = (own.amax(0) + 1).tolist()
        grid = part.view(height // 2, 2, width // 2, 2)
        tokens.append(grid.mean((1, 3)).flatten())
    torch.testing.assert_close(packed, torch.cat(tokens), rtol=1e-4, atol=1e-7)


def test_a_token_shows_the_patches_that_its_score_is_of():
    """With the tower's attention switched off, the gradient of a row is at its own patches alone."""
    model = tiny.fresh_model("gemma4")
    family = family_of(model)
    for layer in range(len(family.vision_layers)):
        torch.nn.init.zeros_(family.attention_module(layer).o_proj.linear.weight)
    given = tiny.pixels("gemma4", [[0, 1]])
    pixels = given["pixel_values"].requires_grad_()
    rows = torch.cat(family.encode("get_image_features", **given))
    valid = (given["image_position_ids"] >= 0).all(-1)
    marks = torch.arange(int(valid.sum()), dtype=torch.float32)
    packed = torch.cat(family.pack("get_image_features", given, marks[None, :, None]))[:, 0]
    for t, feature in enumerate(rows):
        (gradient,) = torch.autograd.grad(feature.square().sum(), pixels, retain_graph=True)
        touched = gradient.abs().sum(-1)[valid].gt(0)
        assert int(touched.sum()) == 4
        assert packed[t] == marks[touched].mean()


def test_the_order_of_patches_is_told_by_their_places():
    family = family_of(model_of("gemma4"))
    given = tiny.pixels("gemma4", [[0]])
    values = torch.randn(1, 24, 1)
    want = family.pack("get_image_features", given, values)[0]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    shuffled = {**given, "image_position_ids": given["image_position_ids"].clone()}
    shuffled["image_position_ids"][0, :24] = given["image_position_ids"][0, order]
    torch.testing.assert_close(family.pack("get_image_features", shuffled, values[:, order])[0], want)
