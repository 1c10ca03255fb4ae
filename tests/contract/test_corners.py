"""Corners that random attachments found: each was wrong, or refused without need, in calls nobody had drawn."""

from __future__ import annotations

import gc

import pytest
import tiny
import torch
from contract.test_cuts import ENCODES_ONCE
from processors import video_inputs
from specs import BEFORE_THE_TOWER, CUTTING, SPECS, build
from transformers import DynamicCache

import tokprune
from tokprune.prune.copies import salts_of


@pytest.mark.parametrize("with_cache", [False, True])
@torch.no_grad()
def test_equal_rows_of_the_user_are_no_beam_copies(with_cache):
    model, inputs = tiny.model(), tiny.batch(((0,),))
    twice = {k: torch.cat([v, v]) for k, v in inputs.items()}
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3) as attachment:
        model(**twice, **(tiny.cached(DynamicCache()) if with_cache else {}))
        assert len(attachment.kept) == 2
        tiny.generate(model, twice)
        assert len(attachment.kept) == 2
        tiny.generate(model, inputs, num_beams=3)
        assert len(attachment.kept) == 1


@tiny.pictures_in_chunks
@torch.no_grad()
def test_a_chunk_may_hold_padding_alone_of_some_row():
    rows = [[1] + [tiny.IMAGE] * 36 + [5] * 60, [1, *[tiny.IMAGE] * 36, 5]]
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.padded(rows) | {"pixel_values": tiny.pictures(2).double()}
    with tokprune.attach(model, "vtc_cls", keep_ratio=0.3):
        want = tiny.generate(model, inputs)
        assert torch.equal(tiny.generate(model, inputs, prefill_chunk_size=24), want)


def test_salts_are_dealt_to_pictures_and_then_to_videos():
    assert salts_of((7, 8), 1, 0) == (7,)
    assert salts_of((7, 8), 1, 1) == (8,)
    assert salts_of((7, 8, 9), 2, 0) == (7, 8)
    assert salts_of((7, 8), 4, 0) == (7, 7, 8, 8)  # beams
    assert salts_of((7,), 3, 2) == (7, 7, 7)
    with pytest.raises(tokprune.TokPruneError, match=r"attachment\.salts"):
        salts_of((7, 8), 3, 0)


@tiny.later_pictures
@pytest.mark.parametrize("spec", ["fastv", "cdpruner", "uniform"])
@torch.no_grad()
def test_chunks_that_cannot_be_served_are_refused_by_their_cause(spec):
    """InternVL's images are told apart by the whole prompt."""
    model = tiny.model("internvl")
    inputs = tiny.row(tiny.batch(((3,),), kind="internvl"), 0, ((3,),), kind="internvl")
    with tokprune.attach(model, spec, keep_ratio=0.3):
        with pytest.raises(tokprune.TokPruneError, match="prefill_chunk_size"):
            tiny.generate(model, inputs, prefill_chunk_size=24)
        tiny.generate(model, inputs)


@pytest.mark.parametrize("spec", ["uniform", "cdpruner", "fastv"])
@torch.no_grad()
def test_pictures_that_were_encoded_and_never_used_are_no_part_of_the_next_call(spec):
    model, video = tiny.model("llava_onevision"), video_inputs()
    with tokprune.attach(model, spec, keep_ratio=0.3) as attachment:
        want, kept = model(**video).logits, str(attachment.kept)
        model.model.get_image_features(**tiny.pixels("llava_onevision", [[0]]))
        assert torch.equal(model(**video).logits, want)
        assert str(attachment.kept) == kept


@torch.no_grad()
def test_text_of_a_later_turn_is_not_masked_by_the_padding_of_the_first():
    model = tiny.model(dtype=torch.float64)
    first = tiny.padded([[1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [1, 5, 6]])
    second = torch.tensor([[8] + [tiny.IMAGE] * 36 + [9, 10]] * 2)
    mask = torch.cat([first["attention_mask"], torch.ones_like(second)], 1)
    kept = []
    with tokprune.attach(model, "cdpruner", keep_ratio=0.3) as attachment:
        for rows, start in (([0, 1], 0), ([1], 9)):
            own, n = mask[rows][:, start:], mask.shape[1] - 39 - start
            out = model(input_ids=first["input_ids"][rows][:, start:], attention_mask=own[:, :n], use_cache=True)
            pictures = tiny.pictures(1).double().repeat(len(rows), 1, 1, 1)
            cache = tiny.cached(out[tiny.CACHE])
            model(input_ids=second[rows], attention_mask=own, pixel_values=pictures, **cache)
            kept.append(attachment.kept[-1].tolist())
    assert kept[0] == kept[1]


def floats_alive():
    """Floating-point numbers in tensors that are no parameters."""
    gc.collect()
    found = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.is_floating_point()]
    return sum(t.untyped_storage().nbytes() for t in {t.untyped_storage().data_ptr(): t for t in found}.values())


@pytest.mark.parametrize(
    ("kind", "spec"),
    [("clip", s) for s in (*SPECS, *CUTTING) if ":" not in s and s not in BEFORE_THE_TOWER] + [("internvl", "fopru")],
)
@torch.no_grad()
def test_no_features_are_held_after_a_generation(kind, spec):
    """Of five pictures no more stays than of one, but for what stays of a report."""
    model, alive = tiny.fresh_model(kind), []
    budget = {"keep_ratio": 0.3} if build(spec).takes_budget else {}
    with tokprune.attach(model, spec, **budget):
        for layout in (((0,),), ((0,), (1,), (2,), (0,), (1,))):
            inputs = tiny.batch(layout, kind=kind)
            before = floats_alive()
            tiny.generate(model, inputs)
            alive.append(floats_alive() - before)
    features = 36 * model.config.text_config.hidden_size * 4
    assert max(alive) < features


@pytest.mark.skipif(not ENCODES_ONCE, reason="every step is a call of its own, which reads the answer so far as text")
@torch.no_grad()
def test_a_prompt_that_comes_again_without_a_cache_finds_its_features():
    model, inputs = tiny.model(), tiny.batch()
    with tokprune.attach(model, "cdpruner", keep_ratio=0.3) as attachment:
        cached, kept = tiny.generate(model, inputs), str(attachment.kept)
        assert torch.equal(tiny.generate(model, inputs, use_cache=False), cached)
        assert str(attachment.kept) == kept
