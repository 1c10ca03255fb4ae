"""Laws over model families: every method that a family can serve runs on it, and its own image processor fits it."""

from __future__ import annotations

import inspect

import pytest
import tiny
import torch
from PIL import Image
from specs import BEFORE_THE_TOWER, CUTTING, PRUNING, build, scaled
from tokprune.integrations.transformers import compat, family_of

import tokprune
from tokprune.core.errors import MissingSignalError, UnsupportedModelError

NEWER = ("gemma3", "paligemma", *tiny.GLM, "paddleocr_vl", "qwen3_5", *tiny.GEMMA4, *tiny.KIN)
UNREAD = ("got_ocr2",)  # nothing is read from the tower
READS_THE_TOWER = (
    "damro_filter",
    "fastervlm",
    "fastvid",
    "fopru",
    "framefusion",
    "hiprune",
    "hired",
    "holov",
    "mmtok",
    "prumerge",
    "prumerge_plus",
    "scope",
    "tokencorr",
    "visionzip",
    "vispruner",
    "vtc_cls",
)
READS_NOTHING = ("framefusion:faithful=true",)  # without its pruning step
TOLERANCE = {"qwen3_5": 1e-3}  # its linear attention is computed in float32, in chunks that padding moves
kinds = pytest.mark.parametrize("kind", tiny.served(NEWER))
all_kinds = pytest.mark.parametrize("kind", tiny.served([*NEWER, *tiny.MORE]))


def model_of(kind, dtype=torch.float64):
    model = tiny.model(kind, "sdpa", dtype)
    if kind.endswith("moe"):
        model.set_experts_implementation("eager")  # grouped products know no float64
    return model


def for_family(spec, family):
    """A method as a user has to type it where the tower has no [CLS] token, and for a model of a few layers."""
    parts = scaled(spec).split("+")
    if not family.tower.has_cls:
        options = [tokprune.get_method(part).if_missing for part in parts]
        parts = [f"{part}:{option}" if option else part for part, option in zip(parts, options, strict=True)]
    return "+".join(parts)


def budget_of(spec):
    n = build(spec).n_budgets
    one = 0.5 if "strategy=row" in spec else 0.3  # of whole rows no less can be kept of the smallest picture
    return {} if not n else {"keep_ratio": one if n == 1 else [0.6, 0.5]}


@all_kinds
@pytest.mark.parametrize("spec", PRUNING)
@torch.no_grad()
def test_every_method_before_the_language_model_runs(kind, spec):
    """A batch equals its rows, in what is kept and in the answer; or it is refused with what to use instead."""
    model, inputs = model_of(kind), tiny.batch(dtype=torch.float64, kind=kind)
    reads = any(part.split(":")[0] in READS_THE_TOWER for part in spec.split("+")) and spec not in READS_NOTHING
    if kind in UNREAD and reads:
        with pytest.raises(MissingSignalError, match=r"relative positions.*Methods that work here: .*divprune[\w, ]*$"):
            tokprune.attach(model, scaled(spec), **budget_of(spec))
        return
    if spec in BEFORE_THE_TOWER and not family_of(model).takes_cells:
        with pytest.raises(MissingSignalError, match=r"whole pictures.*Methods that work here: .*divprune[\w, ]*$"):
            tokprune.attach(model, spec)
        return
    with tokprune.attach(model, for_family(spec, family_of(model)), **budget_of(spec)) as attachment:
        together, kept = model(**inputs).logits[:, -1], attachment.kept
        rows = []
        for r in range(len(inputs["input_ids"])):
            alone = model(**tiny.row(inputs, r, kind=kind)).logits[:, -1]
            rows += attachment.kept if tiny.MIXED[r] else []
            assert (together[r] - alone[0]).abs().max() < TOLERANCE.get(kind, 1e-5), r
    assert [k.tolist() for k in kept] == [k.tolist() for k in rows]


@pytest.mark.parametrize("kind", UNREAD)
def test_support_promises_nothing_that_is_read_from_such_a_tower(kind):
    answers = {p.method: p.answer for p in tokprune.list_support() if p.model == kind}
    assert {name for name, answer in answers.items() if answer == "no"} == {*READS_THE_TOWER, "pixelprune"}
    assert set(answers.values()) == {"yes", "no"}


@all_kinds
@pytest.mark.parametrize("spec", CUTTING)
@torch.no_grad()
def test_every_method_between_layers_runs_or_is_refused(kind, spec):
    model, inputs = model_of(kind), tiny.batch(dtype=torch.float64, kind=kind)
    family, budget = family_of(model), budget_of(spec)
    if family.no_layer_cuts:
        with pytest.raises(UnsupportedModelError, match="cuts between decoder layers"):
            tokprune.attach(model, spec, **budget)
        return
    with tokprune.attach(model, spec, **budget) as attachment:
        together, kept = model(**inputs).logits[:, -1], attachment.kept
        rows = []
        for r in range(len(inputs["input_ids"])):
            alone = model(**tiny.row(inputs, r, kind=kind)).logits[:, -1]
            rows += attachment.kept if tiny.MIXED[r] else []
            assert (together[r] - alone[0]).abs().max() < 1e-5, r
    assert [{k: v.tolist() for k, v in e.items()} for e in kept] == [
        {k: v.tolist() for k, v in e.items()} for e in rows
    ]


@kinds
@torch.no_grad()
def test_the_familys_own_image_processor_fits_the_model(kind):
    """A picture that is wider than high, and a tall one; rows are as many as the layouts say."""
    model = tiny.model(kind)
    family = family_of(model)
    processor = family.image_processor(model.config)
    noise = torch.rand(96, 96, 3, generator=torch.Generator().manual_seed(2))
    whole = Image.fromarray((noise * 255).byte().numpy())
    made = processor([whole.crop((0, 0, 96, 60)), whole.crop((0, 0, 50, 96))], return_tensors="pt")
    takes = inspect.signature(model.model.get_image_features).parameters
    given = {k: v for k, v in made.items() if k in takes}
    rows = family.encode("get_image_features", **given)
    layouts = family.layouts("get_image_features", given, rows, [len(r) for r in rows])
    assert [len(layout.crop) for layout in layouts] == [len(r) for r in rows]
    with tokprune.attach(model, "divprune" if kind in UNREAD else "fopru", keep_ratio=0.5):
        marked = [r[:, 0].isnan() for r in family_of(model).encode("get_image_features", **given)]
    n_kept = [int((~m).sum()) for m in marked]
    assert n_kept == [len(layout.crop) - layout.n_visual + int(layout.n_visual / 2 + 0.5) for layout in layouts]


def test_families_that_need_a_newer_release_are_refused_in_one_line():
    """Those that this release of transformers has models of; the newest one refuses none."""
    for kind in {*NEWER, *tiny.MORE, *tiny.FIXED, *tiny.M_ROPE}:
        oldest = tiny.family(kind).oldest
        if compat.is_at_least(oldest):
            continue
        try:
            model = tiny.fresh_model(kind)
        except (ValueError, KeyError, AttributeError):
            continue  # this release does not know the model type, or has another configuration of it
        with pytest.raises(UnsupportedModelError, match=rf"needs transformers {oldest} or newer") as error:
            tokprune.attach(model, "divprune", keep_ratio=0.5)
        assert "\n" not in str(error.value)
