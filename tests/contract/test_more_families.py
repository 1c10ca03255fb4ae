"""Laws of Idefics 3, SmolVLM, Mistral 3 and Pixtral, whose images may be several runs of placeholders.

Rows of a batch hold a picture, two pictures, and text alone.
"""

from __future__ import annotations

import oracle
import pytest
import tiny
import torch
import torch.nn.functional as F
from counter import counted
from processors import cropped_inputs, cropped_processor, picture
from specs import CUTTING, PRUNING, build, scaled
from tokprune.integrations.transformers import family_of
from tokprune.integrations.transformers.encode import Encoded, by_image
from tokprune.integrations.transformers.hooks import Hooks
from tokprune.integrations.transformers.passes import Passes
from tokprune.integrations.transformers.tower_taps import TowerTap
from transformers import AutoModelForImageTextToText

import tokprune
from tokprune.core.errors import MissingSignalError, NothingPrunedError, TokPruneError, UnsupportedModelError
from tokprune.core.signals import Kind, Signal
from tokprune.core.tokens import Stage

pytestmark = pytest.mark.skipif(tiny.RELEASE.release < (5, 18), reason="attach refuses these families there")
kinds = pytest.mark.parametrize("kind", tiny.MORE)
cropped = pytest.mark.parametrize("kind", tiny.CROPPED)
pixtral = pytest.mark.parametrize("kind", tiny.PIXTRAL)
BEFORE = ("uniform", "fopru", "divprune", "cdpruner")
DTYPE = torch.float64
IMAGES = [image for row in tiny.MIXED for image in row]


def model_of(kind):
    return tiny.model(kind, "sdpa", DTYPE)


def batch_of(kind):
    """The batch, and its rows alone without padding."""
    inputs = tiny.batch(dtype=DTYPE, kind=kind)
    return inputs, [tiny.row(inputs, r, kind=kind) for r in range(3)]


def positions_of(inputs):
    """What generate numbers columns by: from the first one that is not padding."""
    return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def kept_columns(kind, inputs, kept, images=IMAGES):
    """(B, S) bool: what stays, from what was kept of every image."""
    keep = inputs["attention_mask"].bool().clone()
    sizes = [tiny.n_rows(kind, image) for image in images]
    flags = [torch.zeros(n, dtype=torch.bool).index_fill(0, k, True) for n, k in zip(sizes, kept, strict=True)]
    keep[inputs["input_ids"] == tiny.IMAGE] = torch.cat(flags)
    return keep


@torch.no_grad()
def masked(model, inputs, keep, positions):
    """Logits of the bare model that does not see the dropped columns."""
    rest = {k: v for k, v in inputs.items() if k != "attention_mask"}
    return model(**rest, attention_mask=keep.long(), position_ids=positions, use_cache=False).logits


@torch.no_grad()
def masked_greedy(model, inputs, keep, positions, n_new=6):
    """Greedy tokens that recompute everything at every step."""
    inputs, tokens = dict(inputs), []
    for _ in range(n_new):
        logits = masked(model, inputs, keep, positions)[:, -1]
        logits[:, tiny.SUPPRESSED] = -torch.inf
        tokens.append(logits.argmax(-1, keepdim=True))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[-1]], 1)
        keep, positions = F.pad(keep, (0, 1), value=True), torch.cat([positions, positions[:, -1:] + 1], 1)
    return torch.cat(tokens, 1)


# ---- before the language model


@kinds
@torch.no_grad()
def test_keep_all_is_bit_identical(kind):
    model, (inputs, _) = model_of(kind), batch_of(kind)
    logits, tokens = model(**inputs).logits, tiny.generate(model, inputs)
    for method in (*BEFORE, "tome", "visionzip", "fastv"):
        with tokprune.attach(model, method, keep_ratio=1.0):
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(tiny.generate(model, inputs), tokens)


@kinds
@pytest.mark.parametrize("method", BEFORE)
@torch.no_grad()
def test_pruned_equals_the_bare_model_with_dropped_columns_masked(kind, method):
    model, (inputs, _) = model_of(kind), batch_of(kind)
    positions = positions_of(inputs)
    bare = model(**inputs, position_ids=positions, use_cache=False).logits
    with tokprune.attach(model, method, keep_ratio=0.3, positions="original") as attachment:
        pruned, kept = model(**inputs, position_ids=positions).logits, attachment.kept
    keep = kept_columns(kind, inputs, kept)
    assert (pruned - masked(model, inputs, keep, positions))[keep].abs().max() < 1e-9
    assert (pruned - bare)[:2][keep[:2]].abs().max() > 1e-2
    # One token of the first picture swapped for another: the answer is another one.
    first, other = int(kept[0][0]), next(i for i in range(9) if i not in kept[0].tolist())
    twin = keep.clone()
    places = (inputs["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0]
    twin[0, places[first]], twin[0, places[other]] = False, True
    assert (pruned[0, -1] - masked(model, inputs, twin, positions)[0, -1]).abs().max() > 1e-3


@kinds
@pytest.mark.parametrize("positions", ["contiguous", "original"])
@torch.no_grad()
def test_pruned_rows_equal_a_short_sequence_made_by_hand(kind, positions):
    """The embeddings without the dropped columns, through the bare decoder."""
    model, (_, singles) = model_of(kind), batch_of(kind)
    for single, images in zip(singles[:2], tiny.MIXED[:2], strict=True):
        embeds = oracle.full_embeds(model, single)
        with tokprune.attach(model, "fopru", keep_ratio=0.3, positions=positions) as attachment:
            tokens = tiny.generate(model, single, max_new_tokens=6)
            kept = attachment.kept
            pruned = model(**single).logits[0]
        (columns,) = kept_columns(kind, single, kept, images)
        want = oracle.short_logits(model, embeds, columns, positions)[0]
        assert (pruned[columns] - want).abs().max() < 1e-9
        assert tokens[0].tolist() == oracle.greedy(model, embeds, columns, positions, 6)


@kinds
@pytest.mark.parametrize("positions", ["contiguous", "original"])
@torch.no_grad()
def test_generation_equals_recomputing_and_rows_alone(kind, positions):
    model, (inputs, singles) = model_of(kind), batch_of(kind)
    with tokprune.attach(model, "fopru", keep_ratio=0.3, positions=positions) as attachment:
        tokens = tiny.generate(model, inputs, max_new_tokens=6)
        kept, report = attachment.kept, attachment.report
        uncached = tiny.generate(model, inputs, max_new_tokens=6, use_cache=False)
        alone = [tiny.generate(model, single, max_new_tokens=6) for single in singles]
    keep = kept_columns(kind, inputs, kept)
    assert report.n_prompt_kept == int(keep.sum(1).max())
    assert torch.equal(tokens, uncached)
    assert torch.equal(tokens, torch.cat(alone))
    if positions == "original":
        assert torch.equal(tokens, masked_greedy(model, inputs, keep, positions_of(inputs)))


@kinds
@pytest.mark.parametrize("method", ["uniform", "fastv"])
@pytest.mark.parametrize("options", [dict(num_beams=3), dict(do_sample=True, top_k=5)], ids=["beams", "sampling"])
@torch.no_grad()
def test_beams_and_sampling_of_a_batch_equal_rows_alone(kind, options, method):
    model, (inputs, singles) = model_of(kind), batch_of(kind)
    with tokprune.attach(model, method, keep_ratio=0.3) as attachment:
        torch.manual_seed(0)
        together = tiny.generate(model, inputs, max_new_tokens=4, **options)
        assert len(attachment.report.images) == 3
        if "num_beams" in options:
            alone = torch.cat([tiny.generate(model, single, max_new_tokens=4, **options) for single in singles])
            assert torch.equal(together, alone)
        torch.manual_seed(0)
        assert torch.equal(together, tiny.generate(model, inputs, max_new_tokens=4, **options))


@kinds
@torch.no_grad()
def test_a_second_turn_equals_the_long_sequence_masked(kind):
    """Through generate with all ids, and by a forward with the new ids alone."""
    model, (inputs, _) = model_of(kind), batch_of(kind)
    more = torch.randint(3, 80, (3, 4), generator=torch.Generator().manual_seed(5))
    n = inputs["input_ids"].shape[1]
    options = dict(max_new_tokens=3, do_sample=False, suppress_tokens=tiny.SUPPRESSED, return_dict_in_generate=True)
    with tokprune.attach(model, "uniform", keep_ratio=0.3, positions="original") as attachment:
        first = model.generate(**inputs, **options)
        kept, cache = attachment.kept, first[tiny.CACHE]
        ids = torch.cat([first.sequences, more], 1)
        mask = F.pad(inputs["attention_mask"], (0, ids.shape[1] - n), value=1)
        again = {"input_ids": ids, "attention_mask": mask}
        tokens = tiny.generate(model, again, max_new_tokens=4, **tiny.cached(cache))
        cache = model.generate(**inputs, **options)[tiny.CACHE]
        new = {"input_ids": ids[:, n + 2 :], "attention_mask": mask, "position_ids": positions_of(again)[:, n + 2 :]}
        logits = model(**new, **tiny.cached(cache)).logits[:, -1]
    keep = F.pad(kept_columns(kind, inputs, kept), (0, ids.shape[1] - n), value=True)
    whole = {**inputs, "input_ids": ids, "attention_mask": mask}
    assert torch.equal(tokens, masked_greedy(model, whole, keep, positions_of(again), 4))
    assert (logits - masked(model, whole, keep, positions_of(again))[:, -1]).abs().max() < 1e-9


@kinds
@pytest.mark.parametrize("method", ["fopru", "fastv:layer=2"])
@torch.no_grad()
def test_a_picture_of_a_later_turn_is_pruned_as_in_the_long_sequence(kind, method):
    model, first = model_of(kind), tiny.batch(((0,),), DTYPE, kind=kind)
    more = torch.tensor([[21, 22, *tiny.shown(kind, 2), 23, 24]])
    options = dict(max_new_tokens=3, do_sample=False, suppress_tokens=tiny.SUPPRESSED, return_dict_in_generate=True)
    with tokprune.attach(model, method, keep_ratio=0.4, positions="original") as attachment:
        turn, kept = model.generate(**first, **options), attachment.kept
        ids = torch.cat([turn.sequences, more], 1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **tiny.pixels(kind, [[2]], DTYPE)}
        tokens, kept = (
            tiny.generate(model, again, max_new_tokens=4, **tiny.cached(turn[tiny.CACHE])),
            kept + attachment.kept,
        )
    whole = {**again, **tiny.pixels(kind, [[0, 2]], DTYPE)}
    layer = 0 if method == "fopru" else 2
    (keep,) = kept_columns(kind, whole, [k[2] if layer else k for k in kept], [0, 2])
    assert not keep.all()
    embeds = oracle.full_embeds(model, whole)
    assert tokens[0].tolist() == oracle.masked_greedy(model, embeds, {layer: ~keep}, 4)


# ---- between decoder layers


@kinds
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "dart"])
@torch.no_grad()
def test_a_cut_between_layers_equals_masking_behind_it(kind, method):
    """Cached, uncached and alone agree; the report counts what the layers saw."""
    model, (inputs, singles) = model_of(kind), batch_of(kind)
    with tokprune.attach(model, f"{method}:schedule=layers/2x5/3x2") as attachment:
        tokens, report = tiny.generate(model, inputs, max_new_tokens=5), attachment.report
        kept = attachment.kept
        uncached = tiny.generate(model, inputs, max_new_tokens=5, use_cache=False)
        alone = [tiny.generate(model, single, max_new_tokens=5) for single in singles]
    assert torch.equal(tokens, uncached)
    assert torch.equal(tokens, torch.cat(alone))
    assert [{layer: len(rows) for layer, rows in entry.items()} for entry in kept] == [{2: 5, 3: 2}] * 3
    assert report.layers[1] == inputs["input_ids"].shape[1] > report.layers[2] > report.layers[3]


@kinds
@torch.no_grad()
def test_what_was_cut_is_what_masked_layers_do_not_see(kind):
    model, (_, singles) = model_of(kind), batch_of(kind)
    single, layer = singles[1], 2
    with tokprune.attach(model, f"fastv:layer={layer}", keep_ratio=0.4) as attachment:
        pruned, tokens = model(**single).logits, tiny.generate(model, single, max_new_tokens=5)
        kept = [entry[layer] for entry in attachment.kept]
    embeds, (keep,) = oracle.full_embeds(model, single), kept_columns(kind, single, kept, tiny.MIXED[1])
    want = oracle.masked_logits(model, embeds, {layer: ~keep})
    assert (pruned - want)[0, keep].abs().max() < 1e-9
    assert tokens[0].tolist() == oracle.masked_greedy(model, embeds, {layer: ~keep}, 5)
    twin = keep.clone()
    (dropped,), (first,) = (~keep).nonzero()[0], ((single["input_ids"][0] == tiny.IMAGE) & keep).nonzero()[0]
    twin[dropped], twin[first] = True, False
    other = oracle.masked_logits(model, embeds, {layer: ~twin})
    assert (pruned - other)[0, -1].abs().max() > 1e-3


# ---- every method


@kinds
@pytest.mark.parametrize("spec", [*PRUNING, *CUTTING])
@torch.no_grad()
def test_every_method_that_the_family_can_run_runs(kind, spec):
    """Pruned, and every row is what it is alone; methods without what they need are refused by name."""
    model, inputs = tiny.model(kind), tiny.batch(kind=kind)
    family, method = family_of(model), build(scaled(spec))
    options = {"keep_ratio": 0.5} if method.takes_budget else {}
    if method.stage is Stage.PRE_LLM and not family.supplies_all(method.needs(family.tower)):
        with pytest.raises(MissingSignalError, match="no .CLS. token"):
            tokprune.attach(model, scaled(spec), **options)
        return
    with tokprune.attach(model, scaled(spec), **options) as attachment:
        tokens, report = tiny.generate(model, inputs, max_new_tokens=3), attachment.report
        alone = [tiny.generate(model, tiny.row(inputs, r, kind=kind), max_new_tokens=3) for r in range(3)]
    assert len(report.images) == 3
    assert min(report.layers) < inputs["input_ids"].shape[1] or not method.takes_budget
    if not spec.startswith("random"):  # another picture of the call, other tokens
        assert torch.equal(tokens, torch.cat(alone))


@kinds
@torch.no_grad()
def test_detaching_gives_everything_back(kind):
    model, inputs = tiny.fresh_model(kind), tiny.batch(kind=kind)
    logits = model(**inputs).logits
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with tokprune.attach(model, "fopru+fastv", keep_ratio=[0.5, 0.5]):
        model(**inputs)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks
    assert torch.equal(model(**inputs).logits, logits)


# ---- the vision tower


def tower_of(model):
    return getattr(model.model, "vision_model", None) or model.model.vision_tower


@kinds
@torch.no_grad()
def test_received_attention_is_the_towers_own(kind):
    model = tiny.fresh_model(kind, "eager")
    family, layer = family_of(model), 2
    signal = Signal(Kind.RECEIVED, (layer,))
    tap, hooks = TowerTap(family, frozenset({signal}), Passes()), Hooks(model)
    tap.install(hooks)
    given = tiny.pixels(kind, [[0, 1]])
    tower, seen = tower_of(model), {}
    hook = tower.register_forward_pre_hook(lambda module, args, kwargs: seen.update(a=args, k=kwargs), with_kwargs=True)
    _, found = tap.collect(lambda: model.model.get_image_features(**given))
    hook.remove()
    hooks.close()
    maps = tower(*seen["a"], **{**seen["k"], "output_attentions": True}).attentions[layer]
    want = maps.mean((1, 2))
    if kind not in tiny.CROPPED:  # a mean over the queries of the same picture
        want = maps.mean(1).sum(1) / (maps[0, 0] > 0).sum(0)
    torch.testing.assert_close(found[signal][:, :, 0], want, rtol=1e-4, atol=1e-7)
    assert want.max() > 1.05 * want.min()


@kinds
def test_a_token_shows_the_patches_that_its_score_is_of(kind):
    """With the tower's attention switched off, the gradient of a row is at its own patches alone."""
    model = tiny.fresh_model(kind)
    family = family_of(model)
    for layer in range(family.tower.n_layers):
        module = family.attention_module(layer)
        out = getattr(module, "out_proj", None) or module.o_proj
        torch.nn.init.zeros_(out.weight)
        if out.bias is not None:
            torch.nn.init.zeros_(out.bias)
    given = tiny.pixels(kind, [[0, 1, 4]])
    pixels = given["pixel_values"].requires_grad_()
    rows = torch.cat(family.encode("get_image_features", **given))
    pictures = pixels.flatten(0, -4)
    numbers = torch.arange(pictures[:, 0].numel() // tiny.PATCH**2)
    side = [n // tiny.PATCH for n in pictures.shape[-2:]]
    numbers = numbers.view(len(pictures), *side)  # of every patch, also those of padding
    marks = numbers.flatten(1) if kind in tiny.CROPPED else real_patches(numbers, given)
    packed = torch.cat(family.pack("get_image_features", given, marks.double()[..., None]))[:, 0]
    assert len(packed) == len(rows)
    for t, feature in enumerate(rows):
        (gradient,) = torch.autograd.grad(feature.square().sum(), pixels, retain_graph=True)
        blocks = gradient.flatten(0, -4).abs().sum(1).unflatten(2, (side[1], -1)).unflatten(1, (side[0], -1))
        touched = numbers[blocks.sum((2, 4)) > 0]
        assert len(touched) == family.block_of(model.config) ** 2
        assert packed[t] == touched.double().mean()


def real_patches(numbers, given):
    """(1, patches): of one picture after the other, without padding."""
    sizes = [(h // tiny.PATCH, w // tiny.PATCH) for h, w in given["image_sizes"].tolist()]
    return torch.cat([n[:h, :w].flatten() for n, (h, w) in zip(numbers, sizes, strict=True)])[None]


# ---- the ledger

PARTS = {
    **{kind: ("vision_model", "connector", "text_model") for kind in tiny.CROPPED},
    **{kind: ("vision_tower", "multi_modal_projector", "language_model") for kind in tiny.PIXTRAL},
}


@kinds
@torch.no_grad()
def test_the_ledger_equals_the_counter(kind):
    model, image = tiny.fresh_model(kind), 1
    single = tiny.batch(((image,),), kind=kind)
    seen = counted(lambda: model(**single, logits_to_keep=1, use_cache=False), PARTS[kind])
    with tokprune.attach(model, "uniform", keep_ratio=0.5) as attachment:
        model(**single)
        (shown,) = attachment.report.images
    shape = family_of(model).shape
    ledger = shape.encode(shown.layout.n_crops, shown.n_patches) + shape.read(single["input_ids"].shape[1])
    for part, name in zip((ledger.vision, ledger.projector, ledger.decoder), PARTS[kind], strict=True):
        assert abs(part.flops - seen[name]) <= 0.01 * seen[name], name


# ---- pictures in crops


@cropped
@torch.no_grad()
def test_a_picture_has_one_budget_over_its_crops(kind):
    model, (inputs, _) = model_of(kind), batch_of(kind)
    with tokprune.attach(model, "uniform", keep_tokens=7) as attachment:
        model(**inputs)
    images = attachment.report.images
    assert [(i.n_visual, i.n_kept, i.layout.crop_grid) for i in images] == [
        (9, 7, (0, 0)),
        (45, 7, (2, 2)),
        (27, 7, (1, 2)),
    ]
    layout = images[1].layout
    assert layout.crop == tuple(c for c in (1, 2, 3, 4, 0) for _ in range(9))
    assert (layout.height, layout.width, layout.n_crops) == (6, 6, 5)
    assert (layout.row[9], layout.column[9]) == (0, 3)
    assert (layout.row[18], layout.column[18]) == (3, 0)


@cropped
@torch.no_grad()
def test_crops_may_be_larger_than_the_configuration_says(kind):
    model, side = tiny.model(kind), 32
    inputs = tiny.batch(((2,),), kind=kind)
    n_before, n = tiny.N_VISUAL // tiny.MERGED, (side // tiny.PATCH) ** 2 // tiny.MERGED
    ids = inputs["input_ids"][0].tolist()
    longer = [i for place, i in enumerate(ids) for _ in range(1 + (n - n_before) * (i == tiny.IMAGE != ids[place - 1]))]
    pixels = torch.randn(1, 3, 3, side, side, generator=torch.Generator().manual_seed(4))
    single = {**tiny.padded([longer]), "pixel_values": pixels}
    seen = counted(lambda: model(**single, use_cache=False), PARTS[kind])
    with tokprune.attach(model, "fopru", keep_ratio=0.5) as attachment:
        model(**single)
    (image,) = attachment.report.images
    assert (image.n_visual, image.layout.height, image.layout.width) == (3 * n, 4, 8)
    ledger = family_of(model).shape.encode(3, image.n_patches)
    assert abs(ledger.vision.flops - seen["vision_model"]) < 0.01 * seen["vision_model"]


@cropped
@torch.no_grad()
def test_tags_may_be_of_several_tokens_and_newlines_one(kind):
    """As a tokenizer may cut them; the same pictures are found from ids, and from embeddings merged by hand."""
    model = model_of(kind)
    inputs = tiny.batch(((1, 3),), DTYPE, kind=kind)
    cut = {tiny.GLOBAL: [5, 6], **{tag: [5, 7, tag] for tags in tiny.TAGS for tag in tags}}
    ids = [part for i in inputs["input_ids"][0].tolist() for part in cut.get(i, [i])]
    joined = [i for i, after in zip(ids, [*ids[1:], None], strict=True) if (i, after) != (tiny.NEWLINE, tiny.NEWLINE)]
    assert len(joined) == len(ids) - 2
    single = {**inputs, "input_ids": torch.tensor([joined]), "attention_mask": torch.ones(1, len(joined)).long()}
    embeds = oracle.full_embeds(model, single)
    with tokprune.attach(model, "fopru", keep_ratio=0.3) as attachment:
        want = model(**single).logits
        assert [i.layout.crop_grid for i in attachment.report.images] == [(2, 2), (2, 1)]
        pixels = {k: v for k, v in single.items() if k.startswith("pixel")}
        model.model.get_image_features(**pixels)
        got = model(inputs_embeds=embeds, attention_mask=single["attention_mask"]).logits
        assert [i.layout.crop_grid for i in attachment.report.images] == [(2, 2), (2, 1)]
    assert (want - got).abs().max() < 1e-9


@cropped
@torch.no_grad()
def test_without_the_tokens_around_crops_every_run_is_an_image(kind):
    model, inputs = model_of(kind), tiny.batch(((1,),), DTYPE, kind=kind)
    ids = inputs["input_ids"].clone()
    ids[ids == tiny.FAKE] = torch.arange(10, 10 + int((ids == tiny.FAKE).sum()))
    with tokprune.attach(model, "uniform", keep_tokens=4) as attachment:
        model(**{**inputs, "input_ids": ids})
    assert [(i.n_visual, i.n_kept) for i in attachment.report.images] == [(9, 4)] * 5


@cropped
@torch.no_grad()
def test_what_cannot_be_told_apart_or_scored_is_refused(kind):
    model, inputs = model_of(kind), tiny.batch(((1,),), DTYPE, kind=kind)
    ids = inputs["input_ids"][0].tolist()
    text = [i for i in ids if i != tiny.IMAGE]
    together = torch.tensor([[*text[:3], *[tiny.IMAGE] * 45, *text[3:]]])
    with tokprune.attach(model, "uniform", keep_ratio=0.5), pytest.raises(TokPruneError, match="45 image placeholders"):
        model(**{**inputs, "input_ids": together})
    mask = inputs["pixel_attention_mask"].clone()
    mask[0, 2, -tiny.PATCH :] = 0
    part = {**inputs, "pixel_attention_mask": mask}
    for attn in ("sdpa", "eager"):
        model = tiny.model(kind, attn, DTYPE)
        with (
            tokprune.attach(model, "fopru", keep_ratio=0.5),
            pytest.raises(UnsupportedModelError, match="do_resize=True"),
        ):
            model(**part)
    with tokprune.attach(model, "uniform", keep_ratio=0.5):
        model(**part)
    with (
        tokprune.attach(model, "uniform", keep_ratio=0.5),
        pytest.raises(UnsupportedModelError, match="takes squares"),
    ):
        model.model.get_image_features(torch.randn(1, 1, 3, 16, 36, dtype=DTYPE))
    with tokprune.attach(model, "fopru", keep_ratio=0.5), pytest.raises(NothingPrunedError):
        model.model.get_image_features(inputs["pixel_values"])
        model(inputs_embeds=torch.randn(1, 8, 64, dtype=DTYPE))


SHAPES = {"square": (96, 96), "wide": (96, 24), "tall": (20, 60), "tiny": (3, 2)}  # width and height


@cropped
@torch.no_grad()
def test_real_processor_and_layout_agree(kind):
    """Prompts and crops from the genuine processor: a batch, and its rows alone."""
    square, wide, tall, small = (picture(size, seed) for seed, size in enumerate(SHAPES.values()))
    rows = [[square], [wide, tall], [], [small]]
    model, inputs = tiny.model(kind), cropped_inputs(kind, rows)
    with tokprune.attach(model, "fopru", keep_ratio=0.25) as attachment:
        together, images = tiny.generate(model, inputs), attachment.report.images
        alone = [tiny.generate(model, cropped_inputs(kind, [row])) for row in rows]
    assert torch.equal(together, torch.cat(alone))
    made = cropped_processor(kind).image_processor
    grids = [made.get_number_of_image_patches(p.height, p.width)[1:] for row in rows for p in row]
    assert [i.layout.crop_grid for i in images] == grids
    assert grids[0] == (4, 4)
    assert all(len(i.layout.crop) == 9 * i.layout.n_crops for i in images)
    assert all(i.n_kept == int(0.25 * i.n_visual + 0.5) for i in images)


def test_smolvlm_writes_prompts_as_idefics3_does():
    """Its own processor needs packages for videos, so the other one stands for both."""
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

    made = cropped_processor("idefics3")
    for rows, columns in ((0, 0), (2, 3)):
        own = get_image_prompt_string(rows, columns, 9, "<fake_token_around_image>", "<image>", "<global-img>")
        assert own == made.replace_image_token({"rows": [[rows]], "cols": [[columns]]}, 0)


# ---- pictures of any size


@pixtral
@torch.no_grad()
def test_a_picture_is_one_image_though_text_breaks_its_rows(kind):
    model, (inputs, _) = model_of(kind), batch_of(kind)
    with tokprune.attach(model, "uniform", keep_tokens=5) as attachment:
        model(**inputs)
    images, grids = attachment.report.images, [tiny.pixtral_grid(kind, image) for image in IMAGES]
    assert [(i.layout.height, i.layout.width) for i in images] == grids
    assert [(i.n_visual, i.n_kept) for i in images] == [(h * w, 5) for h, w in grids]
    n_kept = inputs["attention_mask"].sum(1) - torch.tensor([grids[0][0] * grids[0][1] - 5, 0, 0])
    assert attachment.report.n_prompt_kept >= int(n_kept[0])
    breaks = (inputs["input_ids"] == tiny.BREAK).sum(1).tolist()
    assert breaks == [grids[0][0] - 1, grids[1][0] + grids[2][0] - 2, 0]


@torch.no_grad()
def test_states_and_rows_of_the_tower_belong_together():
    """What the projector makes of the states that methods merge are the rows of the same patches."""
    model, given = tiny.model("llava_pixtral"), tiny.pixels("llava_pixtral", [[0, 1, 4]])
    family = family_of(model)
    assert family.tower.projects_rows
    assert not family_of(tiny.model("mistral3")).tower.projects_rows
    tap, hooks = TowerTap(family, frozenset(), Passes(), states=True), Hooks(model)
    tap.install(hooks)
    out, found = tap.collect(lambda: model.model.get_image_features(**given))
    hooks.close()
    encoded = Encoded("get_image_features", given, list(out.pooler_output), found)
    shown = by_image(family, encoded)
    assert [len(one.states) for one in shown] == [32, 60, 35]
    for one in shown:
        torch.testing.assert_close(model.model.multi_modal_projector(one.states), one.features)


@torch.no_grad()
def test_pictures_without_sizes_are_as_large_as_their_pixels():
    model, images = model_of("llava_pixtral"), [[0], [0]]
    inputs = tiny.batch(((0,), (0,)), DTYPE, kind="llava_pixtral")
    bare = {k: v for k, v in inputs.items() if k != "image_sizes"}
    with tokprune.attach(model, "fopru", keep_ratio=0.3) as attachment:
        want = model(**inputs).logits
        got = model(**bare).logits
        assert [i.n_visual for i in attachment.report.images] == [32] * len(images)
    assert torch.equal(got, want)


@torch.no_grad()
def test_features_of_several_layers():
    config = tiny.config("llava_pixtral")
    config.vision_feature_layer = [-2, -1]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    single = tiny.batch(((1,),), kind="llava_pixtral")
    seen = counted(lambda: model(**single, logits_to_keep=1, use_cache=False), PARTS["llava_pixtral"])
    with tokprune.attach(model, "visionzip", keep_ratio=0.5) as attachment:
        model(**single)
        (image,) = attachment.report.images
    ledger = family_of(model).shape.encode(1, image.n_patches)
    assert ledger.projector.flops == seen["multi_modal_projector"]
    assert family_of(model).read_layer == 3


def test_feature_selection_that_cuts_a_patch_off_is_refused():
    model = tiny.fresh_model("llava_pixtral")
    model.config.vision_feature_select_strategy = "default"
    with pytest.raises(UnsupportedModelError, match="vision_feature_select_strategy = 'full'"):
        tokprune.attach(model, "uniform", keep_ratio=0.5)


@pixtral
@torch.no_grad()
def test_real_image_processor_and_layout_agree(kind):
    """Pictures from the genuine image processor, prompts written as its processor does; a batch, and rows alone."""
    sizes = ((96, 96), (96, 24), (20, 60), (3, 20))  # the bare Mistral 3 cannot take a picture of one token
    model, pictures = tiny.model(kind), [picture(size, seed) for seed, size in enumerate(sizes)]
    inputs, singles = processed(kind, pictures), [processed(kind, [one]) for one in pictures]
    with tokprune.attach(model, "fopru", keep_ratio=0.25) as attachment:
        together, images = tiny.generate(model, inputs), attachment.report.images
        alone = [tiny.generate(model, single) for single in singles]
    assert torch.equal(together, torch.cat(alone))
    pixels = tiny.PATCH * family_of(model).block_of(model.config)
    sizes = [[i.layout.height * pixels, i.layout.width * pixels] for i in images]
    assert sizes == inputs["image_sizes"].tolist()
    assert sizes[0] == [48, 48]
    assert sizes[1][0] < sizes[1][1] == 48


def processed(kind, pictures):
    """A row a picture, left-padded."""
    config = tiny.config(kind)
    made = tiny.family(kind).image_processor(config)(pictures, return_tensors="pt")
    pixels, rows = tiny.PATCH * tiny.family(kind).block_of(config), []
    for height, width in made["image_sizes"].tolist():
        broken = [*[tiny.IMAGE] * (width // pixels), tiny.BREAK] * (height // pixels)
        rows.append([1, 5, *broken[:-1], tiny.END_OF_PICTURE, 6, 7, 8])
    return tiny.padded(rows) | {name: made[name] for name in ("pixel_values", "image_sizes")}
