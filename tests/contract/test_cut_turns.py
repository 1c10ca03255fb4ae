"""Several turns on a cache that was cut, in padded batches too, and caches that do not fit."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import tiny
import torch

import tokprune
from tokprune.core.signals import Kind
from tokprune.methods.fastv import FastV

IMAGE = tiny.IMAGE
SEEN = []
TURNS = [
    "fastv",
    "pyramiddrop",
    "sparsevlm:recycle=false",
    "fastv:schedule=pyramid/1/3",
    "visual_exit:threshold=0.9:patience=1",
]


def said(ids, past):
    return {"input_ids": ids, "attention_mask": torch.ones(len(ids), past + ids.shape[1]).long()}


@torch.no_grad()
def test_second_turn_scores_share_the_softmax_with_what_is_cached():
    """FastV at layer 2 reads layer 1, which nothing was cut from: the bare eager model knows."""
    model = tiny.fresh_model(attn="eager")
    first = tiny.row(tiny.batch(), 1)
    n = first["input_ids"].shape[1]
    image, picture = torch.tensor([[8] + [IMAGE] * 36 + [9, 10]]), tiny.pictures(1, seed=5)
    ids = torch.cat([first["input_ids"], image], 1)
    whole = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.cat([first["pixel_values"], picture]),
    }
    at = model(**whole, output_attentions=True).attentions[1][0, :, -1].mean(0)[n + 1 : n + 37]
    alone = model(input_ids=image, pixel_values=picture, output_attentions=True).attentions[1][0, :, -1].mean(0)[1:37]
    want = at.topk(11).indices.sort().values
    assert not torch.equal(want, alone.topk(11).indices.sort().values)  # the past matters
    with tokprune.attach(model, "fastv:layer=2", keep_ratio=0.3) as attachment:
        cache = model(**first, use_cache=True).past_key_values
        model(**said(image, n), pixel_values=picture, **tiny.cached(cache))
        assert torch.equal(attachment.kept[0][2], want)


@pytest.mark.parametrize(
    "spec",
    [
        "fastv",
        "pyramiddrop",
        "sparsevlm:recycle=false",
        "fastv:schedule=pyramid/1/3",
        "visual_exit:threshold=0.9:patience=1",
    ],
)
@torch.no_grad()
def test_turns_of_a_padded_batch_equal_the_rows_alone(spec):
    model, dtype = tiny.model(dtype=torch.float64), torch.float64
    inputs = tiny.batch(dtype=dtype)
    pictures = tiny.pictures(1, seed=5).to(dtype)
    second, third = torch.tensor([[8] + [IMAGE] * 36 + [9, 10]] * 3), torch.tensor([[5, 6]] * 3)

    def talk(first, rows):
        mask, outs, kept = first["attention_mask"], [], []
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = model(**first, position_ids=positions, use_cache=True).past_key_values
        for ids, more in ((second, {"pixel_values": pictures.repeat(len(rows), 1, 1, 1)}), (third, {})):
            ids = ids[rows]
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
            outs.append(
                model(input_ids=ids, attention_mask=mask, position_ids=positions, **tiny.cached(cache), **more).logits[
                    :, -1
                ]
            )
            kept += [i.kept_by_layer for i in attachment.report.encoded] if more else []
        return outs, kept

    with tokprune.attach(model, spec, **({} if "exit" in spec else {"keep_ratio": 0.3})) as attachment:
        together, kept = talk(inputs, [0, 1, 2])
        for r in range(3):
            alone, own = talk(tiny.row(inputs, r), [r])
            for a, b in zip(together, alone, strict=True):
                assert (a[r] - b[0]).abs().max() < 1e-9
            assert kept[r].keys() == own[0].keys()
            assert all(torch.equal(kept[r][k], own[0][k]) for k in own[0])


@torch.no_grad()
def test_equal_second_turns_of_different_conversations_stay_apart():
    """float32: their pictures are encoded alike to the bit."""
    model = tiny.model()
    first, second = (
        torch.tensor([[1, 5, 6, 7, 8], [1, 25, 36, 47, 58]]),
        torch.tensor([[8] + [IMAGE] * 36 + [9, 10]] * 2),
    )
    picture = tiny.pictures(1, seed=5)

    def last(rows):
        cache = model(input_ids=first[rows], use_cache=True).past_key_values
        return model(
            **said(second[rows], 5), pixel_values=picture.repeat(len(rows), 1, 1, 1), **tiny.cached(cache)
        ).logits[:, -1]

    with tokprune.attach(model, "fastv:layer=3", keep_ratio=0.3):
        both = last([0, 1])
        for r in range(2):
            assert (both[r] - last([r])[0]).abs().max() < 1e-4


@torch.no_grad()
def test_equal_rows_with_other_masks_stay_apart():
    model, inputs = tiny.model(), tiny.batch(((0,),))
    twice = {k: torch.cat([v, v]) for k, v in inputs.items()}
    twice["attention_mask"][1, :2] = 0
    with tokprune.attach(model, "fastv:layer=3", keep_ratio=0.3):
        both = model(**twice).logits[1, -1]
        alone = model(**{k: v[1:] for k, v in twice.items()}).logits[0, -1]
    assert (both - alone).abs().max() < 1e-4


@torch.no_grad()
def test_equal_rows_are_reported_each():
    model, inputs = tiny.model(), tiny.batch(((0,),))
    with tokprune.attach(model, "fastv", keep_ratio=0.3) as attachment:
        model(**{k: torch.cat([v, v]) for k, v in inputs.items()})
        assert attachment.report.to_dict()["n_kept"] == [11, 11]


@torch.no_grad()
def test_cut_cache_of_another_batch_is_refused():
    model, inputs = tiny.model(), tiny.batch()
    with tokprune.attach(model, "fastv", keep_ratio=0.3):
        cache = model(**inputs, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([0, 1]))
        with pytest.raises(tokprune.TokPruneError, match="another batch"):
            model(input_ids=torch.tensor([[5], [6]]), **tiny.cached(cache))


@torch.no_grad()
def test_cut_cache_cropped_into_the_picture_is_refused():
    """Padding behind the text does not count as text."""
    model = tiny.model()
    rows = [tiny.row(tiny.batch(), r) for r in (0, 1)]
    width = max(r["input_ids"].shape[1] for r in rows)
    right = {
        k: torch.cat([torch.nn.functional.pad(r[k], (0, width - r[k].shape[1])) for r in rows])
        for k in ("input_ids", "attention_mask")
    }
    right["pixel_values"] = torch.cat([r["pixel_values"] for r in rows])
    for inputs, n_less in ((rows[0], 7), (rows[0], 30), (right, 2)):
        with tokprune.attach(model, "fastv", keep_ratio=0.3):
            cache = model(**inputs, use_cache=True).past_key_values
            cache.crop(-n_less)
            b, n = len(inputs["input_ids"]), inputs["input_ids"].shape[1]
            mask = torch.cat([inputs["attention_mask"][:, : n - n_less], torch.ones(b, 1).long()], 1)
            with pytest.raises(tokprune.TokPruneError, match="start a new cache"):
                model(input_ids=torch.full((b, 1), 5), attention_mask=mask, **tiny.cached(cache))


@torch.no_grad()
def test_candidates_that_were_refused_leave_every_layer():
    """Releases before 5.18 crop all layers to one length, which is above a cut layer's."""
    model = tiny.model(dtype=torch.float64)
    inputs = tiny.row(tiny.batch(dtype=torch.float64), 0)
    n = inputs["input_ids"].shape[1]

    def go(cache, ids, past):
        return model(
            input_ids=ids, attention_mask=torch.ones(1, past + ids.shape[1]).long(), **tiny.cached(cache)
        ).logits

    with tokprune.attach(model, "pyramiddrop", keep_ratio=0.3):
        cache = model(**inputs, use_cache=True).past_key_values
        plain = copy.deepcopy(cache)
        go(cache, torch.tensor([[5, 6, 7, 8]]), n)
        cache.layers[0].crop(-2)  # as `crop(n + 2)` did: the others are shorter than that
        go(plain, torch.tensor([[5, 6]]), n)
        want, got = (go(c, torch.tensor([[9, 10]]), n + 2) for c in (plain, cache))
    assert (want - got).abs().max() < 1e-9


@dataclass(frozen=True)
class Spy(FastV):
    def score(self, tokens):
        SEEN.append(tokens.signal(Kind.LM_ROW))
        return super().score(tokens)


@torch.no_grad()
def test_attention_of_a_second_turn_is_the_bare_models():
    """Layer 1, from which nothing was cut: keys of the first turn share the softmax, and its padding does not."""
    model = tiny.fresh_model(attn="eager")
    inputs = tiny.batch()
    second, picture = torch.tensor([[8] + [IMAGE] * 36 + [9, 10]] * 3), tiny.pictures(1, seed=5).repeat(3, 1, 1, 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(second)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    n = inputs["input_ids"].shape[1]
    with tokprune.attach(model, Spy(layer=2), keep_ratio=0.3):
        SEEN.clear()
        cache = model(**inputs, position_ids=positions[:, :n], use_cache=True).past_key_values
        SEEN.clear()
        model(
            input_ids=second,
            pixel_values=picture,
            attention_mask=mask,
            position_ids=positions[:, n:],
            **tiny.cached(cache),
        )
        got = SEEN[0][:, 0]
    for r in range(3):
        single = tiny.row(inputs, r)
        ids = torch.cat([single["input_ids"], second[:1]], 1)
        pixels = torch.cat([*([single["pixel_values"]] if "pixel_values" in single else []), picture[:1]])
        maps = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, output_attentions=True
        ).attentions[1]
        want = maps[0, :, -1].mean(0)[-38:-2]
        assert (got[r] - want).abs().max() < 1e-5
