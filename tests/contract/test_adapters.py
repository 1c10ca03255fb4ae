"""Laws of model adapters and of the sequence they make shorter, against oracles built by hand."""

from __future__ import annotations

import functools
from collections import defaultdict

import oracle
import pytest
import tiny
import torch
import transformers
from packaging.version import Version
from specs import BEFORE_THE_TOWER, BUDGETED, PRUNING, build, scaled

import tokprune

TOWERS, KINDS = tiny.TOWERS, tiny.KINDS
# What is attached by kind; "divprune" reads features alone, which every family has.
METHOD = defaultdict(
    lambda: "divprune",
    clip="vtc_cls",
    siglip="fopru",
    llava_next="globalcom2",
    llava_onevision="globalcom2",
    internvl="globalcom2",
)
AFTER_THE_TOWER = [s for s in PRUNING if s not in BEFORE_THE_TOWER]
POSITIONS = ("contiguous", "original")
# Half precision arithmetic of double: exact. Eager masks overflow in double, so eager runs in single.
NUMERICS = {"sdpa": (torch.float64, 1e-9), "eager": (torch.float32, 5e-5)}
# Beams with several pictures in a prompt scatter them into the wrong rows upstream before transformers 5.23.
MULTI_IMAGE_BEAMS_WORK = Version(transformers.__version__) >= Version("5.23")

towers = pytest.mark.parametrize("tower", TOWERS)
kinds = pytest.mark.parametrize("kind", KINDS)
numerics = pytest.mark.parametrize("attn", NUMERICS)
policies = pytest.mark.parametrize("positions", POSITIONS)


def model_and_batch(kind, attn="sdpa", layout=tiny.MIXED):
    dtype = NUMERICS[attn][0]
    return tiny.model(kind, attn, dtype), tiny.batch(layout, dtype, kind=kind)


def for_kind(spec, kind):
    """A method as a user has to type it where the tower has no [CLS] token, and for a tower of four layers."""
    spec = scaled(spec)
    if kind not in ("siglip", "llava_onevision"):
        return spec
    parts = spec.split("+")
    for i, part in enumerate(parts):
        option = tokprune.get_method(part).if_missing
        parts[i] = f"{part}:{option}" if option else part
    return "+".join(parts)


def by_row(kept, layout=tiny.MIXED):
    """Kept indices of each row's pictures."""
    kept = iter(kept)
    return [[next(kept) for _ in images] for images in layout]


@pytest.mark.parametrize(("kind", "spec"), [(k, s) for k in KINDS for s in BUDGETED if k in TOWERS or ":" not in s])
@torch.no_grad()
def test_keep_all_is_bit_identical(kind, spec):
    model, inputs = tiny.model(kind), tiny.batch(kind=kind)
    logits, tokens = bare(kind)
    for budget in ({"keep_ratio": 1.0}, {"keep_tokens": 10_000}):
        with tokprune.attach(model, for_kind(spec, kind), **budget) as attachment:
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(tiny.generate(model, inputs), tokens)
            assert attachment.report.n_prompt == attachment.report.n_prompt_kept == inputs["input_ids"].shape[1]
            assert attachment.report.clamped == (budget.get("keep_tokens") == 10_000)


@functools.cache
def bare(kind):
    """Logits and tokens of the bare model."""
    model, inputs = tiny.model(kind), tiny.batch(kind=kind)
    return model(**inputs).logits, tiny.generate(model, inputs)


@kinds
@numerics
@policies
@torch.no_grad()
def test_pruned_forward_equals_the_short_sequence(kind, attn, positions):
    model, inputs = model_and_batch(kind, attn)
    with tokprune.attach(model, METHOD[kind], keep_ratio=0.3, positions=positions) as attachment:
        logits, kept = model(**inputs).logits, by_row(attachment.kept)
    for r in range(3):
        single = tiny.row(inputs, r, kind=kind)
        columns = oracle.kept_columns(single, kept[r])
        padding = inputs["input_ids"].shape[1] - len(columns)
        want = oracle.short_logits(model, oracle.full_embeds(model, single), columns, positions, padding)
        got = logits[r, padding:][columns]
        assert (got - want[0]).abs().max() < NUMERICS[attn][1]


@kinds
@policies
@torch.no_grad()
def test_twin_with_one_token_swapped_differs(kind, positions):
    model, inputs = model_and_batch(kind)
    single = tiny.row(inputs, 1, kind=kind)
    with tokprune.attach(model, METHOD[kind], keep_ratio=0.3, positions=positions) as attachment:
        logits, kept = model(**single).logits, attachment.kept
    other = next(i for i in range(tiny.N_VISUAL) if i not in kept[0].tolist())
    kept[0][0] = other
    columns = oracle.kept_columns(single, kept)
    twin = oracle.short_logits(model, oracle.full_embeds(model, single), columns, positions)
    assert (logits[:, -1] - twin[:, -1]).abs().max() > 1e-2


@kinds
@torch.no_grad()
def test_twin_with_the_other_positions_differs(kind):
    model, inputs = model_and_batch(kind)
    single = tiny.row(inputs, 1, kind=kind)
    out = {}
    for positions in POSITIONS:
        with tokprune.attach(model, METHOD[kind], keep_ratio=0.3, positions=positions):
            out[positions] = model(**single).logits[:, -1]
    assert (out["contiguous"] - out["original"]).abs().max() > 1e-2


@kinds
@numerics
@policies
@torch.no_grad()
def test_cached_generation_equals_recomputing_the_short_sequence(kind, attn, positions):
    model, inputs = model_and_batch(kind, attn)
    with tokprune.attach(model, METHOD[kind], keep_ratio=0.3, positions=positions) as attachment:
        tokens, kept = tiny.generate(model, inputs), by_row(attachment.kept)
        uncached = tiny.generate(model, inputs, use_cache=False)
    assert torch.equal(tokens, uncached)
    for r in range(3):
        single = tiny.row(inputs, r, kind=kind)
        columns = oracle.kept_columns(single, kept[r])
        want = oracle.greedy(model, oracle.full_embeds(model, single), columns, positions)
        assert tokens[r].tolist() == want


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}
SINGLE_IMAGES = ((0,), (1,), ())
SINGLE_TILES = ((0,), (5,), ())


def images_that_beams_can_show(kind):
    """Before transformers 5.23 beams also scatter the tiles of one InternVL picture into the wrong rows."""
    return SINGLE_TILES if kind == "internvl" and not MULTI_IMAGE_BEAMS_WORK else SINGLE_IMAGES


@kinds
@policies
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_every_way_of_generating_equals_itself_without_cache(kind, positions, way):
    layout = ((0,),) if way == "prompt lookup" else images_that_beams_can_show(kind)
    model, inputs = model_and_batch(kind, layout=layout)
    with tokprune.attach(model, METHOD[kind], keep_ratio=0.3, positions=positions):
        torch.manual_seed(0)
        cached = tiny.generate(model, inputs, **WAYS[way])
        torch.manual_seed(0)
        plain = {} if way == "prompt lookup" else WAYS[way]
        uncached = tiny.generate(model, inputs, use_cache=False, **plain)
    assert torch.equal(cached, uncached)


@policies
@torch.no_grad()
def test_prompt_lookup_takes_candidates_back(positions):
    """Repeated text proposes candidates; a random model rejects most, so the cache is cut back again and again."""
    model = tiny.model(dtype=torch.float64)
    text = [5, 6, 7, 8, 9] * 4
    inputs = tiny.collate([[1, *text, *[tiny.IMAGE] * tiny.N_VISUAL, *text]], [0], torch.float64)
    widths = []
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3, positions=positions):
        spy = model.model.language_model.layers[0].register_forward_hook(
            lambda module, args, out: widths.append((out[0] if isinstance(out, tuple) else out).shape[-2])
        )
        found = tiny.generate(model, inputs, prompt_lookup_num_tokens=4, max_new_tokens=12)
        spy.remove()
        assert torch.equal(found, tiny.generate(model, inputs, max_new_tokens=12))
    assert max(widths[1:]) > 1  # candidates were proposed


@kinds
@policies
@pytest.mark.parametrize("way", ["greedy", "beams"])
@torch.no_grad()
def test_batch_equals_its_rows_one_by_one(kind, positions, way):
    layout = tiny.MIXED if way == "greedy" or MULTI_IMAGE_BEAMS_WORK else images_that_beams_can_show(kind)
    model, inputs = model_and_batch(kind, layout=layout)
    with tokprune.attach(model, METHOD[kind], keep_ratio=0.3, positions=positions):
        together = tiny.generate(model, inputs, **WAYS[way])
        alone = [tiny.generate(model, tiny.row(inputs, r, layout, kind), **WAYS[way]) for r in range(3)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(("kind", "spec"), [(k, s) for k in KINDS for s in AFTER_THE_TOWER if k != "siglip"])
@torch.no_grad()
def test_batch_equals_its_rows_for_every_method(kind, spec):
    model, inputs = model_and_batch(kind)
    budget = {"keep_ratio": 0.3} if build(spec).takes_budget else {}
    with tokprune.attach(model, for_kind(spec, kind), **budget) as attachment:
        together = tiny.generate(model, inputs, max_new_tokens=3)
        kept = by_row(attachment.kept)
        for r in range(3):
            alone = tiny.generate(model, tiny.row(inputs, r, kind=kind), max_new_tokens=3)
            assert torch.equal(together[r : r + 1], alone)
            assert all(torch.equal(a, b) for a, b in zip(kept[r], attachment.kept, strict=True))


class Widths:
    """What the decoder layers really saw, as a law's own witness."""

    def __init__(self, model):
        self.seen = [[] for _ in model.model.language_model.layers]
        self.hooks = [
            layer.register_forward_pre_hook(lambda module, args, i=i: self.seen[i].append(args[0].shape[1]))
            for i, layer in enumerate(model.model.language_model.layers)
        ]

    def remove(self):
        for hook in self.hooks:
            hook.remove()


@kinds
@pytest.mark.parametrize("keep", [{"keep_ratio": 0.3}, {"keep_tokens": 1}, {"keep_ratio": 1.0}])
@torch.no_grad()
def test_report_equals_the_lengths_the_layers_saw(kind, keep):
    model, inputs = model_and_batch(kind)
    with tokprune.attach(model, METHOD[kind], **keep) as attachment:
        witness = Widths(model)
        out = model(**inputs, use_cache=True)
        report = attachment.report
        witness.remove()
    assert report.layers == [seen[0] for seen in witness.seen]
    assert [out.past_key_values.get_seq_length(i) for i in range(5)] == report.layers
    n_visual = [i.n_visual for i in report.images]
    assert sum(len(i.layout.crop) for i in report.images) == (inputs["input_ids"] == tiny.IMAGE).sum()
    n_kept = [1 if "keep_tokens" in keep else round(keep["keep_ratio"] * n + 1e-9) for n in n_visual]
    assert report.to_dict()["n_kept"] == n_kept
    assert [len(k) for k in attachment.kept] == [
        n + i.n_special_kept for n, i in zip(n_kept, report.images, strict=True)
    ]
    text = (inputs["input_ids"] != tiny.IMAGE).logical_and(inputs["attention_mask"].bool()).sum(1).tolist()
    if n_kept != n_visual:
        lengths = [sum(map(len, images)) for images in by_row(attachment.kept)]
        assert report.prefills[0].rows == [t + n for t, n in zip(text, lengths, strict=True)]


@torch.no_grad()
def test_report_counts_beams_once():
    model, inputs = model_and_batch("clip", layout=SINGLE_IMAGES)
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3) as attachment:
        tiny.generate(model, inputs, num_beams=3)
        beams = attachment.kept
        tiny.generate(model, inputs)
        plain = attachment.kept
    assert len(beams) == len(plain) == 2
    assert all(torch.equal(a, b) for a, b in zip(beams, plain, strict=True))


@torch.no_grad()
def test_report_says_when_a_batch_saves_nothing():
    model = tiny.model()
    long_text = [1, *range(3, 63)]
    inputs = tiny.collate([[1, *[tiny.IMAGE] * 36, 5], long_text], [0])
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3) as attachment:
        model(**inputs)
        assert "nothing is saved" in str(attachment.report)
        assert attachment.report.n_prompt_kept == len(long_text)


# ---- prompts at the edge


@towers
@policies
@torch.no_grad()
def test_prompt_that_is_only_an_image(tower, positions):
    model = tiny.model(tower, dtype=torch.float64)
    inputs = tiny.collate([[tiny.IMAGE] * 36], [0], torch.float64)
    with tokprune.attach(model, METHOD[tower], keep_tokens=5, positions=positions) as attachment:
        logits, (kept,) = model(**inputs).logits, attachment.kept
    columns = oracle.kept_columns(inputs, [kept])
    want = oracle.short_logits(model, oracle.full_embeds(model, inputs), columns, positions)
    assert logits.shape[1] == 36
    assert (logits[0, columns] - want[0]).abs().max() < 1e-9
    assert torch.equal(logits[0, -1], logits[0, columns][-1])  # a dropped column repeats the last kept one


@torch.no_grad()
def test_prompt_that_is_only_an_image_cannot_be_blind():
    model = tiny.model()
    inputs = tiny.collate([[tiny.IMAGE] * 36], [0])
    with tokprune.attach(model, "blind"), pytest.raises(tokprune.TokPruneError, match="keep_tokens=1"):
        model(**inputs)


@policies
@torch.no_grad()
def test_leading_image_may_be_dropped_whole(positions):
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.batch(dtype=torch.float64, lead=False)
    with tokprune.attach(model, "blind", positions=positions):
        logits, tokens = model(**inputs).logits, tiny.generate(model, inputs)
    assert logits.isfinite().all()
    for r in range(3):
        single = tiny.row(inputs, r)
        columns = single["input_ids"][0] != tiny.IMAGE
        padding = inputs["input_ids"].shape[1] - len(columns)
        embeds = oracle.full_embeds(model, single)
        want = oracle.short_logits(model, embeds, columns, positions, padding)
        assert (logits[r, padding:][columns] - want[0]).abs().max() < 1e-9
        assert tokens[r].tolist() == oracle.greedy(model, embeds, columns, positions)


@kinds
@policies
def test_loss_equals_the_loss_of_the_short_sequence(kind, positions):
    model = tiny.fresh_model(kind)
    inputs = tiny.row(tiny.batch(kind=kind), 1, kind=kind)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.IMAGE, -100)
    with tokprune.attach(model, METHOD[kind], keep_ratio=0.3, positions=positions) as attachment:
        loss = model(**inputs, labels=labels).loss
        kept = attachment.kept
        loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)
    columns = oracle.kept_columns(inputs, kept)
    logits = oracle.short_logits(model, oracle.full_embeds(model, inputs), columns, positions)[0]
    want = torch.nn.functional.cross_entropy(logits[:-1], labels[0, columns][1:], ignore_index=-100)
    assert abs(loss.item() - want.item()) < 1e-5


@torch.no_grad()
def test_loss_of_right_padded_rows_equals_the_rows_alone():
    """Training batches are padded on the right."""
    model = tiny.model(dtype=torch.float64)
    left = tiny.batch(dtype=torch.float64)
    rows = [tiny.row(left, r) for r in range(3)]
    length = left["input_ids"].shape[1]
    right = {
        key: torch.cat([torch.nn.functional.pad(r[key], (0, length - r[key].shape[1])) for r in rows])
        for key in ("input_ids", "attention_mask")
    } | {"pixel_values": left["pixel_values"]}
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3):
        together = model(**right).logits
        for r, row in enumerate(rows):
            alone = model(**row).logits[0]
            assert (together[r, : len(alone)] - alone).abs().max() < 1e-9


# ---- several turns, embeddings, ready-made features


@policies
@torch.no_grad()
def test_second_turn_on_a_pruned_cache_equals_one_pass(positions):
    model = tiny.model(dtype=torch.float64)
    first = tiny.row(tiny.batch(dtype=torch.float64), 1)
    text = torch.tensor([[5, 6, 7]])
    image = torch.tensor([[8] + [tiny.IMAGE] * 36 + [9, 10]])
    picture = tiny.pictures(1, seed=5).double()
    ids = torch.cat([first["input_ids"], text, image], 1)
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3, positions=positions):
        cache = model(**first, use_cache=True).past_key_values
        n = first["input_ids"].shape[1]
        one = model(input_ids=text, **tiny.cached(cache), attention_mask=torch.ones(1, n + 3).long()).logits
        two = model(
            input_ids=image, pixel_values=picture, **tiny.cached(cache), attention_mask=torch.ones(1, n + 42).long()
        ).logits
        pixels = torch.cat([first["pixel_values"], picture])
        whole = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits
    assert (one - whole[:, n : n + 3]).abs().max() < 1e-9
    assert (two[:, -2:] - whole[:, -2:]).abs().max() < 1e-9


@torch.no_grad()
def test_decoding_by_hand_needs_neither_mask_nor_positions():
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.row(tiny.batch(dtype=torch.float64), 0)
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3):
        want = tiny.generate(model, inputs)[0].tolist()
        out = model(**inputs, use_cache=True)
        tokens = []
        for _ in range(8):
            logits = out.logits[0, -1].clone()
            logits[tiny.SUPPRESSED] = -torch.inf
            tokens.append(int(logits.argmax()))
            out = model(input_ids=torch.tensor([tokens[-1:]]), **tiny.cached(out.past_key_values), use_cache=True)
    assert tokens == want


@policies
@torch.no_grad()
def test_end_of_a_prompt_fed_again_is_taken_back(positions):
    """The last text of a prompt lies one to one in the cache, so passing it again can be put right."""
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.collate([[1, 5, *[tiny.IMAGE] * 36, *range(3, 40)]], [0], torch.float64)
    more = torch.cat([inputs["input_ids"], torch.tensor([[5, 6, 7]])], 1)
    with tokprune.attach(model, "vtc_cls", keep_tokens=20, positions=positions):
        cache = model(**inputs, use_cache=True).past_key_values
        n = cache.get_seq_length()
        assert n == inputs["input_ids"].shape[1] - 16
        again = model(input_ids=more[:, n:], **tiny.cached(cache), attention_mask=torch.ones_like(more)).logits
        whole = model(**{**inputs, "input_ids": more, "attention_mask": torch.ones_like(more)}).logits
    assert (again - whole[:, n:]).abs().max() < 1e-9


@torch.no_grad()
def test_mask_that_covers_too_much_is_refused():
    model = tiny.model()
    inputs = tiny.row(tiny.batch(), 0)
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3):
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(tokprune.TokPruneError, match="mask over all tokens"):
            mask = torch.ones(1, inputs["input_ids"].shape[1] + 20).long()
            model(input_ids=torch.tensor([[5]]), **tiny.cached(cache), attention_mask=mask)


@torch.no_grad()
def test_batch_of_the_cache_must_not_change():
    model = tiny.model()
    inputs = tiny.row(tiny.batch(), 0)
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3):
        cache = model(**inputs, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        with pytest.raises(tokprune.TokPruneError, match="new cache when the batch changes"):
            model(input_ids=torch.tensor([[5], [6]]), **tiny.cached(cache))


@torch.no_grad()
def test_inputs_embeds_equal_input_ids():
    model = tiny.model()
    inputs = tiny.row(tiny.batch(), 1)
    embeds = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    del embeds["input_ids"]
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3) as attachment:
        assert torch.equal(model(**embeds).logits, model(**inputs).logits)
        assert torch.equal(tiny.generate(model, embeds)[:, -8:], tiny.generate(model, inputs))
        assert attachment.report.n_prompt_kept < attachment.report.n_prompt


@torch.no_grad()
def test_image_hidden_states_carry_no_mark():
    model, inputs = tiny.model(), tiny.batch()
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3) as attachment:
        states = model(**inputs).image_hidden_states
        kept = attachment.kept
    states = states if isinstance(states, torch.Tensor) else torch.cat(list(states))
    states = states.reshape(3, 36, -1)
    bare = oracle.features_of(model, inputs).view(3, 36, -1)
    for i in range(3):
        dropped = torch.ones(36, dtype=torch.bool).index_fill(0, kept[i], False)
        assert torch.equal(states[i, kept[i]], bare[i, kept[i]])
        assert (states[i, dropped] == 0).all()


@torch.no_grad()
def test_cls_feature_of_strategy_full_is_kept_and_counted_apart():
    """A CLIP tower whose [CLS] feature is among the placeholders."""
    model = tiny.fresh_model("clip", dtype=torch.float64)
    model.config.vision_feature_select_strategy = "full"
    ids = torch.tensor([[1, 5, *[tiny.IMAGE] * 37, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": tiny.pictures(1).double()}
    with tokprune.attach(model, "vtc_cls", keep_tokens=5) as attachment:
        logits, (image,) = model(**inputs).logits, attachment.report.images
    assert (image.n_visual, image.n_special, image.n_kept, len(image.kept)) == (36, 1, 5, 6)
    assert image.kept[0] == 0
    columns = oracle.kept_columns(inputs, [image.kept])
    want = oracle.short_logits(model, oracle.full_embeds(model, inputs), columns, "contiguous")
    assert (logits[0, columns] - want[0]).abs().max() < 1e-9
