"""Laws of LLaVA's kin, against sequences built by hand: ViP-LLaVA, Video-LLaVA, DeepSeek-VL, LLaVA-NeXT-Video, Ovis2,
GOT-OCR 2.

Rows of a batch show a picture, two pictures, and text alone; those with videos also a video and a picture.
"""

from __future__ import annotations

import oracle
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
from tokprune.core.layout import NO_PATCH
from tokprune.core.signals import Kind, Signal

DTYPE = torch.float64
VIDEOS = [kind for kind in tiny.KIN if "video" in kind]
N_FRAMES = 3
FRAME = {"video_llava": 1 + tiny.N_VISUAL, "llava_next_video": 9}  # rows of a frame
METHODS = ("vtc_cls", "fopru", "divprune", "visionzip")
UNREAD = ("got_ocr2",)  # nothing is read from the tower
READ = [kind for kind in tiny.KIN if kind not in UNREAD]
kinds = pytest.mark.parametrize("kind", tiny.served(tiny.KIN))
with_videos = pytest.mark.parametrize("kind", tiny.served(VIDEOS))
unread = pytest.mark.parametrize("kind", tiny.served(UNREAD))
policies = pytest.mark.parametrize("positions", ["contiguous", "original"])
AROUND = list(range(tiny.IMAGE - 5, tiny.IMAGE))  # Ovis2 shows these as visual words where pictures are encoded


def model_of(kind):
    return tiny.model(kind, "sdpa", DTYPE)


def method_of(kind, name):
    """With its option where the tower has no [CLS] token; another one where nothing is read from the tower."""
    if kind in UNREAD and name in ("vtc_cls", "fopru", "visionzip"):
        return "divprune"
    option = tokprune.get_method(name).if_missing
    has_cls = family_of(model_of(kind)).tower.has_cls
    return name if has_cls or not option else f"{name}:{option}"


def batch_of(kind, layout=tiny.MIXED):
    inputs = tiny.batch(layout, DTYPE, kind=kind)
    return inputs, [tiny.row(inputs, r, layout, kind) for r in range(3)]


def video_row(kind, seed=0, words=2):
    """A video and text around it."""
    generator = torch.Generator().manual_seed(20 + seed)
    text = torch.randint(3, 80, (4 + words,), generator=generator).tolist()
    ids = [1, *text[:words], *[tiny.VIDEO] * (N_FRAMES * FRAME[kind]), *text[words:]]
    frames = tiny.pictures(N_FRAMES, seed=60 + seed)[None].to(DTYPE)
    return {**tiny.padded([ids]), "pixel_values_videos": frames}


def generate(model, inputs, **options):
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    out = model.generate(**inputs, suppress_tokens=[*tiny.SUPPRESSED, *AROUND], **options)
    return out[:, inputs["input_ids"].shape[1] :]


def embeds_of(model, single):
    """The embeddings that the bare model makes of a row."""
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(**single, use_cache=False)
    hook.remove()
    return seen["inputs_embeds"]


def kept_columns(single, kept):
    """(L,) bool; images of a row come in the order of `kept`, pictures before videos."""
    ids = single["input_ids"][0]
    keep, start = (ids != tiny.IMAGE) & (ids != tiny.VIDEO), 0
    places = torch.cat([(ids == i).nonzero()[:, 0] for i in (tiny.IMAGE, tiny.VIDEO)])
    for index, n in kept:
        keep[places[start : start + n][index]] = True
        start += n
    assert start == len(places)
    return keep


def found_in(attachment):
    """Kept rows and rows of every image."""
    return [(image.kept, len(image.layout.crop)) for image in attachment.report.images]


def by_row(found):
    """Of the batch of `batch_of`."""
    return [found[:1], found[1:], []]


def greedy(model, embeds, keep, positions, n_new=6):
    """The oracle's answer."""
    tokens = []
    for _ in range(n_new):
        logits = oracle.short_logits(model, embeds, keep, positions)[0, -1]
        logits[[*tiny.SUPPRESSED, *AROUND]] = -torch.inf
        tokens.append(int(logits.argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([tokens[-1:]]))], 1)
        keep = F.pad(keep, (0, 1), value=True)
    return tokens


@kinds
@torch.no_grad()
def test_keep_all_is_bit_identical(kind):
    model, (inputs, _) = model_of(kind), batch_of(kind)
    logits, tokens = model(**inputs).logits, generate(model, inputs)
    for name in (*METHODS, "cdpruner", "tome", "fastv"):
        with tokprune.attach(model, method_of(kind, name), keep_ratio=1.0):
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(generate(model, inputs), tokens)


@kinds
@policies
@torch.no_grad()
def test_pruned_forward_equals_the_short_sequence(kind, positions):
    model, (inputs, singles) = model_of(kind), batch_of(kind)
    bare = model(**inputs).logits
    with tokprune.attach(model, method_of(kind, "fopru"), keep_ratio=0.3, positions=positions) as attachment:
        logits, found = model(**inputs).logits, by_row(found_in(attachment))
    for r, single in enumerate(singles):
        keep, embeds = kept_columns(single, found[r]), embeds_of(model, single)
        padding = logits.shape[1] - len(keep)
        want = oracle.short_logits(model, embeds, keep, positions, padding)[0]
        assert (logits[r, padding:][keep] - want).abs().max() < 1e-9
        if not found[r]:
            continue
        assert (logits[r, -1] - bare[r, -1]).abs().max() > 1e-2
        index, n = found[r][0]
        swapped = index.clone()
        visual = attachment.report.images[r].layout.visual
        swapped[index == next(i for i in index.tolist() if i in visual)] = next(
            i for i in visual if i not in index.tolist()
        )
        twin = kept_columns(single, [(swapped.sort().values, n), *found[r][1:]])
        other = oracle.short_logits(model, embeds, twin, positions, padding)[0]
        assert (logits[r, -1] - other[-1]).abs().max() > 1e-3


@kinds
@policies
@torch.no_grad()
def test_generation_equals_recomputing_and_rows_alone(kind, positions):
    model, (inputs, singles) = model_of(kind), batch_of(kind)
    with tokprune.attach(model, method_of(kind, "fopru"), keep_ratio=0.3, positions=positions) as attachment:
        tokens, found = generate(model, inputs), by_row(found_in(attachment))
        report = attachment.report
        assert torch.equal(tokens, generate(model, inputs, use_cache=False))
        assert torch.equal(tokens, torch.cat([generate(model, single) for single in singles]))
    keeps = [kept_columns(single, f) for single, f in zip(singles, found, strict=True)]
    assert report.n_prompt_kept == max(int(keep.sum()) for keep in keeps)
    for r, (single, keep) in enumerate(zip(singles, keeps, strict=True)):
        assert tokens[r].tolist() == greedy(model, embeds_of(model, single), keep, positions)


@kinds
@pytest.mark.parametrize("options", [dict(num_beams=3), dict(do_sample=True, top_k=5)], ids=["beams", "sampling"])
@torch.no_grad()
def test_beams_and_sampling_repeat_themselves(kind, options):
    # Before, beams without cache mix up the pictures of a prompt in transformers itself.
    layout = tiny.MIXED if tiny.RELEASE.release >= (5, 23) else ((0,), (1,), ())
    model, (inputs, singles) = model_of(kind), batch_of(kind, layout)
    with tokprune.attach(model, "uniform", keep_ratio=0.3) as attachment:
        torch.manual_seed(0)
        together = generate(model, inputs, max_new_tokens=4, **options)
        assert len(attachment.report.images) == sum(map(len, layout))
        torch.manual_seed(0)
        assert torch.equal(together, generate(model, inputs, max_new_tokens=4, use_cache=False, **options))
        if "num_beams" in options:
            alone = [generate(model, single, max_new_tokens=4, **options) for single in singles]
            assert torch.equal(together, torch.cat(alone))


@kinds
@pytest.mark.parametrize("passes_all", [True, False])
@torch.no_grad()
def test_a_second_turn_equals_the_short_sequence(kind, passes_all):
    """All ids through generate, or new ids by hand."""
    model, (_, singles) = model_of(kind), batch_of(kind)
    single, more = singles[1], torch.tensor([[5, 6, 7]])
    with tokprune.attach(model, "uniform", keep_ratio=0.3, positions="original") as attachment:
        out = model(**single, use_cache=True)
        keep = F.pad(kept_columns(single, found_in(attachment)), (0, 3), value=True)
        ids = torch.cat([single["input_ids"], more], 1)
        mask, cache = torch.ones_like(ids), tiny.cached(out[tiny.CACHE])
        if passes_all:
            got = generate(model, {"input_ids": ids, "attention_mask": mask}, **cache)[0].tolist()
        else:
            got = model(input_ids=more, attention_mask=mask, **cache).logits[0, -1]
    embeds = embeds_of(model, {**single, "input_ids": ids, "attention_mask": mask})
    if passes_all:
        assert got == greedy(model, embeds, keep, "original")
    else:
        assert (got - oracle.short_logits(model, embeds, keep, "original")[0, -1]).abs().max() < 1e-9


@kinds
@torch.no_grad()
def test_what_was_cut_is_what_masked_layers_do_not_see(kind):
    model, (inputs, singles) = model_of(kind), batch_of(kind)
    with tokprune.attach(model, "fastv:layer=2", keep_ratio=0.4) as attachment:
        tokens = generate(model, inputs)
        assert torch.equal(tokens, torch.cat([generate(model, single) for single in singles]))
        single = singles[1]
        pruned, kept = model(**single).logits, attachment.kept
        n_rows = [len(image.layout.crop) for image in attachment.report.images]
    found = [(entry[2], n) for entry, n in zip(kept, n_rows, strict=True)]
    keep = kept_columns(single, found)
    want = oracle.masked_logits(model, embeds_of(model, single), {2: ~keep})
    assert (pruned - want)[0, keep].abs().max() < 1e-9
    assert not keep.all()


# ---- videos

ON_VIDEOS = ("uniform", "fopru", "visionzip", "vtc_cls", "random:split=query")
ON_VIDEOS += ("dycoke:k=none", "evs", "fastvid", "framefusion", "vidcom2")


@with_videos
@pytest.mark.parametrize("method", ON_VIDEOS)
@torch.no_grad()
def test_videos_alone_and_in_a_batch_equal_the_short_sequence(kind, method):
    """A budget is over all frames; rows before the frames of Video-LLaVA, which show no patch, are counted apart."""
    model = model_of(kind)
    singles = [video_row(kind), video_row(kind, seed=1, words=4)]
    n = max(single["input_ids"].shape[1] for single in singles)
    inputs = {
        k: torch.cat([F.pad(s[k], (n - s[k].shape[1], 0)) for s in singles]) for k in ("input_ids", "attention_mask")
    }
    inputs["pixel_values_videos"] = torch.cat([s["pixel_values_videos"] for s in singles])
    with tokprune.attach(model, method, keep_ratio=0.25, positions="original") as attachment:
        tokens, report, found = generate(model, inputs), attachment.report, found_in(attachment)
        assert torch.equal(tokens, torch.cat([generate(model, single) for single in singles]))
        logits = model(**inputs).logits
    image = report.images[0]
    n_patches = N_FRAMES * (tiny.N_VISUAL if kind == "video_llava" else 9)
    assert (image.n_visual, image.n_kept) == (n_patches, int(n_patches / 4 + 0.5))
    assert image.layout.crop.count(NO_PATCH) == (N_FRAMES if kind == "video_llava" else 0)
    assert set(image.layout.crops) == {1, 2, 3}
    if not tokprune.get_method(method).keeps_features:  # merges: the rows are others
        return
    for r, single in enumerate(singles):
        keep, embeds = kept_columns(single, found[r : r + 1]), embeds_of(model, single)
        want = oracle.short_logits(model, embeds, keep, "original")[0]
        assert (model_logits(model, single, method) - want).abs().max() < 1e-9
        assert tokens[r].tolist() == greedy(model, embeds, keep, "original")
    assert logits.isfinite().all()


def model_logits(model, single, method):
    """Logits of the kept columns of a row, pruned."""
    with torch.no_grad(), tokprune.attach(model, method, keep_ratio=0.25, positions="original") as attachment:
        logits = model(**single).logits[0]
        return logits[kept_columns(single, found_in(attachment))]


@with_videos
@torch.no_grad()
def test_a_picture_and_a_video_in_a_row(kind):
    model, (_, singles) = model_of(kind), batch_of(kind)
    video, picture = video_row(kind), singles[0]
    ids = torch.cat([video["input_ids"], picture["input_ids"]], 1)
    both = {**video, **picture, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with tokprune.attach(model, "fopru", keep_ratio=0.3, positions="original") as attachment:
        logits, found = model(**both).logits[0], found_in(attachment)
        tokens = generate(model, both)
    keep, embeds = kept_columns(both, found), embeds_of(model, both)
    assert (logits[keep] - oracle.short_logits(model, embeds, keep, "original")[0]).abs().max() < 1e-9
    assert tokens[0].tolist() == greedy(model, embeds, keep, "original")


# ---- the tower


def eager_maps(tower, values, layer):
    return tower(values, output_attentions=True).attentions[layer]


def given_to(kind, what):
    if what == "video":
        return {"pixel_values_videos": tiny.pictures(2 * N_FRAMES).unflatten(0, (2, N_FRAMES))}
    return tiny.pixels(kind, [[0], [1]])


PAIRS = [(kind, what) for kind in READ for what in ("image", "video") if what == "image" or kind in VIDEOS]


@pytest.mark.parametrize(("kind", "what"), tiny.served(PAIRS))
@torch.no_grad()
def test_received_attention_is_the_towers_own(kind, what):
    """And nothing of the attention of the [CLS] row but what it gives."""
    model = tiny.fresh_model(kind, "eager")
    family, layer, given = family_of(model), 2, given_to(kind, what)
    signal = Signal(Kind.RECEIVED, (layer,))
    tap, hooks, maps = TowerTap(family, frozenset({signal}), Passes()), Hooks(model), []
    tap.install(hooks)
    attention = family.tower_twins(family.attention_module(layer))[-1 if what == "video" else 0]
    spy = attention.register_forward_hook(lambda module, args, out: maps.append(out[1]))
    name = f"get_{what}_features"
    _, found = tap.collect(lambda: getattr(model.model, name)(**given))
    hooks.close()
    spy.remove()
    first = int(family.tower.has_cls)
    received = torch.cat(maps)[..., first:].mean((1, 2)) if not first else torch.cat(maps)[:, :, 1:, 1:].mean((1, 2))
    assert found[signal].shape[:2] == received.shape
    torch.testing.assert_close(found[signal][:, :, 0], received, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("kind", "what"), tiny.served(p for p in PAIRS if p != ("llava_next_video", "image")))
def test_a_token_shows_the_patches_that_its_score_is_of(kind, what):
    """With the tower's attention switched off, the gradient of a row is at its own patches alone."""
    model = tiny.fresh_model(kind)
    family = family_of(model)
    for layer in range(len(family.vision_layers)):
        for attention in family.tower_twins(family.attention_module(layer)):
            for values in (attention.out_proj.weight, attention.out_proj.bias):
                if values is not None:
                    torch.nn.init.zeros_(values)
    given = given_to(kind, what)
    key = "pixel_values_videos" if what == "video" else "pixel_values"
    pixels = given[key].requires_grad_()
    name, side = f"get_{what}_features", tiny.SIDE // tiny.PATCH
    features = family.encode(name, **given)
    (layout, *_) = family.layouts(name, given, features)
    marks = torch.arange(side * side, dtype=torch.float32)
    n_crops = pixels.flatten(0, -4).shape[0]
    every = (marks + 1000 * torch.arange(n_crops)[:, None])[..., None]
    packed = torch.cat(family.pack(name, given, every))[:, 0]
    rows = torch.cat(features)
    for t in (*layout.visual[:3], layout.visual[-1]):
        (gradient,) = torch.autograd.grad(rows[t].square().sum(), pixels, retain_graph=True)
        crops = gradient.flatten(0, -4).abs().sum(1).unflatten(1, (side, -1)).unflatten(3, (side, -1)).sum((2, 4))
        touched = crops.flatten(1).gt(0)
        assert packed[t] == every[..., 0][touched].mean()


@unread
def test_tokens_of_got_ocr2_lie_around_every_fourth_patch(kind):
    """With the tower's attention switched off, two convolutions of stride 2 and one before them see 9 x 9 patches."""
    model, side = tiny.fresh_model(kind), 12
    family = family_of(model)
    for layer in model.model.vision_tower.layers:
        torch.nn.init.zeros_(layer.attn.proj.weight)
    pixels = tiny.pictures(1).requires_grad_()
    (rows,) = family.encode("get_image_features", pixel_values=pixels)
    (layout,) = family.layouts("get_image_features", {}, [rows])
    assert len(layout.visual) == len(rows) == 9
    for t in layout.visual:
        (gradient,) = torch.autograd.grad(rows[t].square().sum(), pixels, retain_graph=True)
        touched = gradient[0].abs().sum(0).unflatten(0, (side, -1)).unflatten(2, (side, -1)).sum((1, 3)).gt(0)
        near = [(torch.arange(side) - 4 * place).abs() <= 4 for place in (layout.row[t], layout.column[t])]
        assert torch.equal(touched, near[0][:, None] & near[1])


@unread
@torch.no_grad()
def test_crops_and_pages_in_one_run_of_placeholders_are_images_of_their_own(kind):
    """As the processor of GOT-OCR 2 writes them: no token between them."""
    model, n = model_of(kind), 3
    ids = torch.tensor([[1, 5, *[tiny.IMAGE] * (9 * n), 6, 7, 8]])
    single = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": tiny.pictures(n).to(DTYPE)}
    with tokprune.attach(model, "divprune", keep_ratio=0.5, positions="original") as attachment:
        logits, found = model(**single).logits[0], found_in(attachment)
        tokens = generate(model, single)
    assert [(len(index), n_rows) for index, n_rows in found] == [(5, 9)] * n
    keep, embeds = kept_columns(single, found), embeds_of(model, single)
    assert (logits[keep] - oracle.short_logits(model, embeds, keep, "original")[0]).abs().max() < 1e-9
    assert tokens[0].tolist() == greedy(model, embeds, keep, "original")


# ---- the ledger, and what is refused


PARTS = {
    "deepseek_vl": ("vision_model", "aligner"),
    "ovis2": ("vision_tower", "visual_embeddings_table"),
    "video_llava": ("image_tower", "multi_modal_projector"),
}


@kinds
@torch.no_grad()
def test_the_ledger_equals_the_counter(kind):
    model = tiny.fresh_model(kind)
    single = tiny.row(tiny.batch(((0,),), kind=kind), 0, ((0,),), kind)
    tower, projector = PARTS.get(kind, ("vision_tower", "multi_modal_projector"))
    seen = counted(
        lambda: model(**single, logits_to_keep=1, use_cache=False),
        (f"model.{tower}", f"model.{projector}", "language_model"),
    )
    family = family_of(model)
    n_crops = single["pixel_values"].shape[1] if kind == "llava_next_video" else 1
    ledger = family.shape.encode(n_crops) + family.shape.read(single["input_ids"].shape[1])
    before, language = seen[f"model.{tower}"] + seen[f"model.{projector}"], seen["language_model"]
    if kind == "ovis2":  # the product with the table is no module's own forward
        before = counted(lambda: model.model.get_image_features(pixel_values=single["pixel_values"]))["all"]
    assert abs(ledger.vision.flops + ledger.projector.flops - before) <= 0.01 * before
    assert abs(ledger.decoder.flops - language) <= 0.01 * language


@pytest.mark.parametrize("options", [{}, {"use_rel_pos": False}, {"window_size": 0}, {"window_size": 4}], ids=str)
@unread
@torch.no_grad()
def test_the_ledger_counts_windows_and_convolutions(kind, options):
    """32 x 32 patches in windows of 14 x 14, which are filled up to 42 x 42, or in windows that fit; thin layers."""
    config = tiny.config(kind)
    sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=4, mlp_dim=96, image_size=512)
    config.vision_config = type(config.vision_config)(**sizes, global_attn_indexes=[1], **options)
    model = type(tiny.model(kind))(config).eval()
    shape, parts, pictures = family_of(model).shape, model.model, torch.zeros(1, 3, 512, 512)
    assert shape.n_visual == 64
    assert shape.encode().vision.flops == counted(lambda: parts.vision_tower(pictures))["all"]
    states = parts.vision_tower(pictures).last_hidden_state
    assert shape.encode().projector.flops == counted(lambda: parts.multi_modal_projector(states))["all"]


@unread
def test_the_ledger_counts_no_method_that_attach_refuses(kind):
    shape = family_of(model_of(kind)).shape
    assert shape.picture(9, signals=[Signal(Kind.TEXT_EMBEDS)]) == shape.encode()
    with pytest.raises(UnsupportedModelError, match="relative positions.*use 'divprune'"):
        shape.picture(9, signals=[Signal(Kind.RECEIVED, (2,))])


@kinds
@torch.no_grad()
def test_detaching_gives_everything_back(kind):
    model, (inputs, _) = tiny.fresh_model(kind, dtype=DTYPE), batch_of(kind)
    logits = model(**inputs).logits  # transformers leaves things of its own behind
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    n_hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with tokprune.attach(model, f"{method_of(kind, 'fopru')}+fastv", keep_ratio=[0.5, 0.5]):
        model(**inputs)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == n_hooks
    assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("kind", tiny.served(["vipllava"]))
def test_a_tower_that_vip_llava_cannot_cut_is_refused(kind):
    """It cuts the first row off, whichever tower it has."""
    config = tiny.config(kind)
    config.vision_config = tiny.config("siglip").vision_config
    with pytest.raises(UnsupportedModelError, match="knows the towers clip_vision_model"):
        family_of(type(tiny.model(kind))(config))
