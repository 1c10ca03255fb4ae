"""Edges of crops, merges and late selection: what would be silently wrong."""

from __future__ import annotations

from dataclasses import dataclass

import oracle
import pytest
import tiny
import torch
from counter import counted
from processors import inputs_of, picture, processor, video_inputs
from specs import HEAD_DIM, HEADS, build, mosaic_layout, tokens_for
from tokprune.integrations.transformers.prompt import text_of

import tokprune
from tokprune.core import ops
from tokprune.core.errors import NothingPrunedError, OptionError
from tokprune.core.layout import grid_layout
from tokprune.core.signals import Kind
from tokprune.core.tokens import VisualTokens
from tokprune.cost.selection import Widths
from tokprune.methods.base import Method


def is_one_of(rows: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Which rows are, but for rounding, among the known ones."""
    return ((rows[:, None] - known[None]).abs().amax(2) < 1e-4).any(1)


@pytest.mark.parametrize("what", ["video", "interpolated"])
@torch.no_grad()
def test_merging_stays_with_rows_where_the_model_pools_behind_its_projector(what):
    """Dominant tokens of VisionZip are rows that the model itself makes."""
    model = tiny.model("llava_onevision")
    if what == "video":
        inputs, name = video_inputs(), "get_video_features"
        read = {n: getattr(model.config, n) for n in ("vision_feature_layer", "vision_feature_select_strategy")}
        arguments = {"pixel_values_videos": inputs["pixel_values_videos"], **read}
    else:
        inputs, name = inputs_of("llava_onevision", [[picture((96, 96))]]), "get_image_features"
        arguments = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    encode = getattr(model.model, name)
    first = next(iter(arguments.values()))
    rest = {k: v for k, v in arguments.items() if v is not first}
    bare = encode(first, **rest)
    bare = torch.cat(list(getattr(bare, "pooler_output", bare)))
    with tokprune.attach(model, "visionzip:contextual=0", keep_ratio=0.5) as attachment:
        out = getattr(model.model, name)(first, **rest)
        kept = attachment.kept[0]
    rows = torch.cat(list(getattr(out, "pooler_output", out)))[kept]
    assert is_one_of(rows, bare).all()


@pytest.mark.parametrize(("kind", "method"), [("internvl", "fopru"), ("clip", "cdpruner")])
@torch.no_grad()
def test_late_marks_are_for_the_same_pictures_alone(kind, method):
    """The same prompt without pictures, or with others, must not get the marks of the call before."""
    model, first = tiny.model(kind), tiny.batch(((0,),), kind=kind)
    with tokprune.attach(model, method, keep_ratio=0.3):
        model(**first)
        with pytest.raises(NothingPrunedError):
            model(input_ids=first["input_ids"], attention_mask=first["attention_mask"])
    other = tiny.pixels(kind, [[5]])  # the same number of rows
    with tokprune.attach(model, method, keep_ratio=0.3) as attachment:
        want = model(**{**first, **other}).logits
        model(**first)
        assert torch.equal(model(**{**first, **other}).logits, want)
        assert len(attachment.kept) == 1


@pytest.mark.parametrize("kind", ["internvl", "clip"])
@torch.no_grad()
def test_text_alone_after_an_encode_is_no_error(kind):
    model, first = tiny.model(kind), tiny.batch(((0,),), kind=kind)
    text = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3).long()}
    bare = model(**text).logits
    with tokprune.attach(model, "cdpruner", keep_ratio=0.3):
        model.model.get_image_features(**{k: v for k, v in first.items() if "ids" not in k and "mask" not in k})
        assert torch.equal(model(**text).logits, bare)


@dataclass(frozen=True)
class Asks(Method):
    """Keeps the first tokens, and says whether products are in half precision."""

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        x = torch.ones(2, 2)
        assert (x @ x).dtype == torch.float32
        index = torch.arange(n_keep).expand(len(tokens.features), -1)
        return tokens.keeping(index)


@torch.no_grad()
def test_selection_is_in_single_precision_under_autocast():
    model, inputs = tiny.model(), tiny.batch()
    with torch.autocast("cpu", torch.bfloat16), tokprune.attach(model, Asks(), keep_ratio=0.3) as attachment:
        model(**inputs)
        assert attachment.report.to_dict()["n_kept"] == [11] * 3
    for spec in ("prumerge", "prumerge_plus:adaptive=false", "divprune", "tome", "visionzip"):
        budget = {"keep_ratio": 0.3} if build(spec).takes_budget else {}
        with torch.autocast("cpu", torch.bfloat16), tokprune.attach(model, spec, **budget):
            assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("n_keep", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("height", "width"), [(24, 2), (2, 24), (50, 1), (72, 9)])
def test_pool_grid_fits_any_shape(height, width, n_keep):
    rows, columns = ops.pool_grid(height, width, n_keep)
    assert 1 <= rows * columns <= n_keep
    keep = (
        build("pool")
        .select(VisualTokens.of(torch.randn(2, height * width, 3), grid_layout(height, width)), n_keep)
        .keep
    )
    assert keep.sum(1).tolist() == [rows * columns] * 2


def test_text_is_as_long_as_the_text():
    """A prompt is mostly placeholders: no copy of them is made for any image."""
    embeds = torch.randn(2, 500, 8)
    mask = torch.zeros(2, 500, dtype=torch.bool)
    mask[:, 3:490] = True
    text = text_of(embeds, [mask], None, [0, 0, 1])
    assert text.shape == (3, 13, 8)
    assert torch.equal(text[2, :3], embeds[1, :3])


def test_tokencorr_keeps_at_least_one_token_of_a_crop():
    tokens = tokens_for("tokencorr", layout=mosaic_layout(6, (1, 2)))
    tokens.signals.update({s: torch.ones_like(v) for s, v in tokens.signals.items()})
    keep = tokprune.get_method("tokencorr", thumbnail=False).select(tokens, 0).keep
    assert keep.sum(1).tolist() == [3, 3, 3]


BAD_OPTIONS = {
    "globalcom2:temperature=0": "use 1e-06 to 1e",
    "globalcom2:alpha=7": "use 0 to 1",
    "globalcom2:ratio=0.3": "faithful=True",
    "hired:alpha=-1": "use 0 to 1",
    "visionzip:contextual=-1": "use 0 to",
    "tokencorr:similar=2": "use -1 to 1",
    "tokencorr:repeats=-0.1": "use 0 to 1",
    "prumerge_plus:step=0": "use 1 to",
    "prumerge_plus:adaptive=false:n_top=5": "leave adaptive=false out",
    "damro_filter:n_outliers=-3+vtc_cls": "use 0 to",
    "damro_filter+damro_filter+vtc_cls": "use each once",
    "fopru:strategy=row:split=even": "strategy=rank",
}


@pytest.mark.parametrize("spec", BAD_OPTIONS)
def test_options_out_of_range_are_refused_before_anything_runs(spec):
    with pytest.raises(OptionError, match=BAD_OPTIONS[spec]):
        tokprune.attach(tiny.model(), spec, keep_ratio=0.3)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("prumerge", {"keep_ratio": 0.3}, "type prumerge:adaptive=false"),
        ("vtc_cls", {"keep": 0.3}, "keep_ratio=0.25 or keep_tokens=64"),
        (["damro_filter", "vtc_cls"], {"keep_ratio": 0.3, "start_layer": 2}, "'vtc_cls:start_layer=2'"),
        ("damro_filter", {}, r"damro_filter\+vtc_cls"),
    ],
)
def test_near_misses_say_what_to_type(method, options, message):
    with pytest.raises(tokprune.TokPruneError, match=message):
        tokprune.attach(tiny.model(), method, **options)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hired:budget_layer=3:layer=1", "up to 1"),
        ("tokencorr:early=3:late=1", "up to 1"),
        ("hiprune:layer=3:late=1", "up to 1"),
    ],
)
def test_layers_in_the_wrong_order_are_refused(spec, message):
    budget = {"keep_ratio": 0.3} if build(spec).takes_budget else {}
    with pytest.raises(OptionError, match=message):
        tokprune.attach(tiny.model(), spec, **budget)


@pytest.mark.parametrize("kind", ["internvl", "llava_next"])
@torch.no_grad()
def test_keep_all_does_not_mind_parts_of_a_prompt(kind):
    """A prompt in two parts: with everything kept there is nothing to select, so nothing to refuse."""
    model, inputs = tiny.model(kind), tiny.batch(((0,),), kind=kind)
    embeds = oracle.full_embeds(model, inputs)
    half = inputs["input_ids"].shape[1] // 2
    bare = model.model.language_model(inputs_embeds=embeds[:, :half]).last_hidden_state
    with tokprune.attach(model, "cdpruner", keep_ratio=1.0):
        model.model.get_image_features(**{k: v for k, v in inputs.items() if "ids" not in k and "mask" not in k})
        assert torch.equal(model.model.language_model(inputs_embeds=embeds[:, :half]).last_hidden_state, bare)


@pytest.mark.parametrize("spec", ["prumerge", "prumerge_plus"])
def test_cost_of_methods_that_decide_follows_what_they_kept(spec):
    method, layout = build(spec), grid_layout(12, 12)
    tokens = tokens_for(spec, n_images=1, layout=layout)
    kept = []
    seen = counted(lambda: kept.append(method.select(tokens, 0).keep.sum().item()))
    widths = Widths(16, HEADS * HEAD_DIM, HEAD_DIM, 16, False)
    assert method.cost(layout, kept[0], widths).flops == pytest.approx(seen["all"], rel=0.01)


def test_report_counts_what_a_picture_decided():
    model, inputs = tiny.model(), tiny.batch(((0,),))
    names = ("model.vision_tower", "model.language_model", "lm_head")
    with tokprune.attach(model, "prumerge") as attachment, torch.no_grad():
        seen = counted(lambda: model(**inputs, logits_to_keep=1), names)
        ledger = attachment.report.ledger
    parts = sum(seen[name] for name in names)
    rest = ledger.projector.flops + ledger.selector.flops - (seen["model.vision_tower"] - ledger.vision.flops)
    assert seen["all"] - parts == pytest.approx(rest, rel=0.02)


@pytest.mark.parametrize("spec", ["visionzip", "prumerge:adaptive=false", "tome"])
def test_merged_tokens_carry_gradients_to_the_tower(spec):
    model, inputs = tiny.fresh_model(), tiny.batch(((0,),))
    with tokprune.attach(model, spec, keep_ratio=0.3):
        model(**inputs).logits[:, -1].sum().backward()
    gradients = [p.grad for p in model.model.vision_tower.parameters() if p.grad is not None]
    assert any(g.abs().sum() > 0 for g in gradients)


@torch.no_grad()
def test_explain_draws_one_tile_of_internvl_whole():
    from tokprune.eval.report.explained import explained
    from tokprune.eval.run.runner import Runner

    runner = Runner(tiny.model("internvl"), processor("internvl"))
    runner.prompt = lambda question, visual: "<s> <image> what is it ?"
    runner.processor.tokenizer.model_input_names = ["input_ids", "attention_mask"]  # as InternVL's own
    for size in ((20, 20), (64, 30)):
        sheet, (line,) = explained(runner, picture(size), "what?", [("uniform", {"keep_ratio": 0.5})])
        assert sheet.width > 700
        assert "visual tokens" in line


def test_chunks_get_smaller_with_more_crops(monkeypatch):
    from tokprune.core import attention

    q, k = torch.randn(2, 3, 2, 20, 4).unbind(0)
    want = attention.received(q, k, 0.5)
    monkeypatch.setattr(attention, "LARGEST", 3 * 2 * 20 * 2)
    torch.testing.assert_close(attention.received(q, k, 0.5), want)


def test_signal_kinds_say_where_tokens_are():
    of_tower = {k for k in Kind if not k.is_decoder}
    assert {k for k in of_tower if not k.is_per_token} == {Kind.CLS_STATE, Kind.TEXT_EMBEDS}
    assert not any(k.is_per_token for k in Kind if k.is_decoder)
