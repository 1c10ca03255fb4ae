"""The ledger of cuts between decoder layers against torch's flop counter, and as a budget."""

from __future__ import annotations

import pytest
import tiny
import torch
from counter import counted
from tokprune.integrations.transformers import shape_from_config

import tokprune
from tokprune.cost.flops import Ops


@pytest.mark.parametrize("kind", ["clip", "llava_next", "internvl"])
@pytest.mark.parametrize(
    "spec", ["fastv", "pyramiddrop", "fastv:schedule=cosine", "vtc_cls+fastv", "vtc_cls+pyramiddrop"]
)
@torch.no_grad()
def test_ledger_equals_the_counter(kind, spec):
    model, inputs = tiny.model(kind), tiny.row(tiny.batch(kind=kind), 0, kind=kind)
    with tokprune.attach(model, spec, keep_ratio=0.3) as attachment:
        seen = counted(lambda: model(**inputs, logits_to_keep=1), ("rotary_emb",))
        ledger = attachment.report.ledger
    # transformers 4 makes the angles of the rotary embedding with a matrix product.
    assert seen["all"] - seen["rotary_emb"] == ledger.prefill.flops
    assert len({n.flops for n in ledger.layers}) > 1
    assert ledger.selector.flops > 0


@pytest.mark.parametrize("spec", ["dart", "sparsevlm", "sparsevlm:recycle=false"])
@torch.no_grad()
def test_ledger_of_methods_with_products_of_their_own(spec):
    """Their products are counted for 64 tokens of text and for all tokens of the picture: at most a little too much."""
    model, inputs = tiny.model(), tiny.row(tiny.batch(), 0)
    with tokprune.attach(model, spec, keep_ratio=0.3) as attachment:
        seen = counted(lambda: model(**inputs, logits_to_keep=1), ("rotary_emb",))
        ledger = attachment.report.ledger
    rest = seen["all"] - seen["rotary_emb"] - (ledger.prefill.flops - ledger.selector.flops)
    assert 0 < rest <= ledger.selector.flops
    assert ledger.selector.flops < 0.05 * ledger.prefill.flops


@torch.no_grad()
def test_batch_counts_at_the_padded_width_of_every_layer():
    model, inputs = tiny.model(), tiny.batch()
    with tokprune.attach(model, "pyramiddrop", keep_ratio=0.3) as attachment:
        seen = counted(lambda: model(**inputs, logits_to_keep=1))
        report = attachment.report
    rows, shape = len(inputs["input_ids"]), report.shape
    layers = sum((shape.text.layer(n, n) * rows for n in report.layers), Ops())
    assert report.ledger.decoder == layers
    # Scores of a row are computed on its padded width, of rows with pictures alone.
    assert abs(seen["all"] - report.ledger.prefill.flops) < 0.02 * seen["all"]


@pytest.mark.parametrize("scope", ["llm", "prefill"])
@pytest.mark.parametrize("spec", ["fastv", "pyramiddrop", "sparsevlm"])
@torch.no_grad()
def test_flops_ratio_keeps_the_most_that_it_pays_for(spec, scope):
    """Solved beside 64 tokens of text, by trying every count."""
    model = tiny.model()
    ids = torch.tensor([[*range(3, 35), *[tiny.IMAGE] * 36, *range(3, 35)]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": tiny.pictures(1)}

    def cost(n):
        with tokprune.attach(model, spec, keep_tokens=n) as attachment:
            model(**inputs)
            return getattr(attachment.report.ledger, scope).flops, attachment.report.ledger_unpruned

    with tokprune.attach(model, spec, flops_ratio=0.8, flops_scope=scope) as attachment:
        model(**inputs)
        (image,) = attachment.report.images
    n = image.n_kept
    whole = getattr(cost(36)[1], scope).flops
    assert 1 < n < 36
    assert cost(n)[0] <= 0.8 * whole * 1.001  # text behind the picture is not all of the text
    assert cost(n + 1)[0] > 0.8 * whole * 0.97


def test_flops_ratio_is_solved_beside_the_text_it_is_told():
    """By hand from the ledger: two layers see all of a picture."""
    model, most = tiny.model(), tiny.N_VISUAL
    shape, kept = shape_from_config(model.config), []
    for n_text in (4, 32, 64):
        with tokprune.attach(model, "fastv:layer=2", flops_ratio=0.8, flops_text=n_text) as attachment:
            model(**tiny.batch())
            (n_kept,) = {image.n_kept for image in attachment.report.images}
        whole = shape.read(most + n_text).llm.flops
        left = {n: shape.read([most + n_text] * 2 + [n + n_text] * 3).llm.flops for n in range(1, most + 1)}
        assert n_kept == max(n for n, cost in left.items() if cost <= 0.8 * whole)
        kept.append(n_kept)
    assert len(set(kept)) == 3


def test_flops_ratio_out_of_reach_names_the_least():
    model = tiny.model()
    with (
        tokprune.attach(model, "fastv:layer=-1", flops_ratio=0.2),
        pytest.raises(tokprune.TokPruneError, match="flops_ratio=0.9"),
    ):
        model(**tiny.row(tiny.batch(), 0))


def test_cuts_before_the_language_model_and_between_layers_share_a_root():
    model, inputs = tiny.model(), tiny.row(tiny.batch(), 0)
    with tokprune.attach(model, "vtc_cls+fastv", keep_ratio=0.25) as attachment, torch.no_grad():
        model(**inputs)
        (image,) = attachment.report.images
    assert (image.n_visual, image.n_given, image.n_kept) == (36, 18, 9)
    assert image.n_by_layer(5) == [18, 9, 9, 9, 9]
    assert attachment.report.n_mean(image) == (18 + 4 * 9) / 5
