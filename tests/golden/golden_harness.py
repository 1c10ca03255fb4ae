"""From a golden case to the registered method: builds visual tokens, asks the method, compares.

The harness decides nothing: it neither ranks nor counts. It turns stored arrays into the signals that the
method itself asks for, and takes the budget from the case or from the method's own `paper_count`.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import tokprune
from tokprune.core import attention
from tokprune.core.budget import Budget
from tokprune.core.layout import Layout, grid_layout
from tokprune.core.signals import Decoder, Kind, Signal, Tower
from tokprune.core.tokens import VisualTokens
from tokprune.methods.pyramiddrop import paper_positions

HERE = Path(__file__).parent
OTHER = os.environ.get("TOKPRUNE_GOLDEN_DIR")
FOLDERS = (Path(OTHER),) if OTHER else (HERE / "data", HERE / "data-2026")

# Golden cases whose method is still to be built. The list only shrinks.
NOT_BUILT: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Case:
    """One entry of index.json."""

    method: str
    label: str
    params: dict
    file: Path
    roles: dict[str, str]

    def load(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs and expected outputs."""
        with np.load(self.file) as data:
            arrays = {name: torch.from_numpy(np.array(data[name])) for name in self.roles}
        return tuple({n: a for n, a in arrays.items() if self.roles[n] == role} for role in ("input", "output"))


def cases(folder: Path) -> list[Case]:
    """All cases of a folder; empty where there is no index."""
    index = folder / "index.json"
    if not index.is_file():
        return []
    return [
        Case(
            method=c["method"],
            label=c["case"],
            params={**c["params"], "variant": c.get("variant")},
            file=folder / c["file"],
            roles={name: a["role"] for name, a in c["arrays"].items()},
        )
        for c in json.loads(index.read_text())["cases"]
    ]


def check_cls_rows(case: Case) -> None:
    """vtc_cls and fastervlm: a stored [CLS] row of every layer, or of the one layer used, for every tile."""
    inputs, expected = case.load()
    rows = inputs["cls_attn"].mean(-2)[..., 1:]  # mean over heads, without the [CLS] column
    if case.method == "vtc_cls":
        method = tokprune.get_method("vtc_cls", start_layer=case.params["start_layer"])
        tower = Tower(n_layers=len(rows), has_cls=True)
        by_layer = dict(enumerate(rows[:, None]))  # one image
    else:
        method = tokprune.get_method("fastervlm")
        tower = Tower(n_layers=case.params.get("layer", 22) + 2, has_cls=True)
        by_layer = {tower.n_layers - 2: rows}  # tiles are compressed alike, each to the same count
    (signal,) = method.needs(tower)
    collected = {signal: torch.stack([by_layer[layer] for layer in signal.layers], 1)}
    n_visual = rows.shape[-1]
    out = select(method, collected, n_visual, Budget(keep_tokens=case.params["num_keep"]).n_keep(n_visual))
    torch.testing.assert_close(out.scores, expected["score"].reshape(out.scores.shape), rtol=1e-4, atol=0)
    assert_kept(out.keep, expected["kept"].reshape(len(out.keep), -1))


def check_fopru(case: Case) -> None:
    """fopru: queries and keys of one vision layer."""
    inputs, expected = case.load()
    q, k = inputs["q"][None], inputs["k"][None]
    form, strategy, n_visual = case.params["score"], case.params["strategy"], case.params["N"]
    method = tokprune.get_method("fopru", form=form, strategy=strategy)
    pair = attention.received_and_given(q, k, q.shape[-1] ** -0.5, form, n_special=1)
    received, given = pair
    values = {Kind.RECEIVED: received, Kind.GIVEN: given}
    signals: dict[Signal, Tensor] = {s: values[s.kind][:, None] for s in method.needs(Tower(24, True))}
    n_keep = method.paper_count(n_visual, case.params["ratio"], math.isqrt(n_visual))
    assert n_keep == len(expected["kept"])
    out = select(method, signals, n_visual, n_keep)
    assert torch.equal(out.scores, received if expected["gate_received"] else given)
    torch.testing.assert_close(torch.cat([received.var(1), given.var(1)]), expected["variances"], rtol=1e-4, atol=0)
    assert_kept(out.keep, expected["kept"][None])


def mosaic(side: int, rows: int, columns: int, size_hw: tuple[int, int] | None = None) -> Layout:
    """A thumbnail and crops; with a size, the mosaic is cut to its aspect as LLaVA does, all counts truncated."""
    height, width = side * rows, side * columns
    top = left = 0
    if size_hw and size_hw[1] / size_hw[0] > width / height:
        top = (height - int(size_hw[0] * width / size_hw[1])) // 2
    elif size_hw:
        left = (width - int(size_hw[1] * height / size_hw[0])) // 2
    places = [(0, r, c) for r in range(side) for c in range(side)]
    for r in range(top, height - top):
        for c in range(left, width - left):
            places.append((1 + r // side * columns + c // side, r - top, c - left))
    return Layout(*(tuple(x) for x in zip(*places, strict=True)), crop_grid=(rows, columns))


def grid_places(layout: Layout, side: int, size_hw: tuple[int, int] | None = None) -> list[int]:
    """The patch, 0..side * side - 1, that every token of a `mosaic` shows in its crop."""
    rows, columns = layout.crop_grid
    height = 1 + max(r for r, crop in zip(layout.row, layout.crop, strict=True) if crop)
    width = 1 + max(c for c, crop in zip(layout.column, layout.crop, strict=True) if crop)
    top, left = (side * rows - height) // 2, (side * columns - width) // 2
    pairs = zip(layout.crop, layout.row, layout.column, strict=True)
    return [(r + top * (crop > 0)) % side * side + (c + left * (crop > 0)) % side for crop, r, c in pairs]


def kept_of(keep: Tensor, layout: Layout, crop: int, places: list[int]) -> Tensor:
    """What a crop keeps, as patches, ascending."""
    found = [places[i] for i in keep[0].nonzero()[:, 0].tolist() if layout.crop[i] == crop]
    return torch.tensor(found, dtype=torch.int64)


def check_globalcom2(case: Case) -> None:
    """[CLS] logits of a thumbnail and of the crops of one image, padded or not."""
    inputs, expected = case.load()
    p = case.params
    width, height = p["image_size_wh"]
    layout = mosaic(p["tile_side"], p["grid_rows"], p["grid_cols"], (height, width))
    places = grid_places(layout, p["tile_side"])
    method = tokprune.get_method("globalcom2", faithful=True, ratio=p["R"], temperature=p["temperature"])
    (signal,) = method.needs(Tower(24, True))
    scores = torch.stack([inputs["cls_logits"][crop, place] for crop, place in zip(layout.crop, places, strict=True)])
    features = torch.arange(len(places)).float()[None, :, None]
    out = method.select(VisualTokens.of(features, layout, {signal: scores[None, None]}), 1)
    tokens = VisualTokens.of(features, layout, {signal: scores[None, None]})
    close = dict(rtol=1e-4, atol=0)
    torch.testing.assert_close(method.retention(tokens, p["R"])[0], expected["retention"], **close)
    first = tokprune.get_method("globalcom2", renormalise=True).retention(tokens, p["R"])[0]
    torch.testing.assert_close(first, expected["retention_v1"], **close)
    for crop in range(len(expected["num_kept"])):
        assert layout.crop.count(crop + 1) == expected["num_valid"][crop]
        kept = kept_of(out.keep, layout, crop + 1, places)
        assert len(kept) == expected["num_kept"][crop]
        assert torch.equal(kept, expected["crop_kept_grid"][crop, : len(kept)])
    kept_places = out.features[0, out.keep[0], 0].long()  # the features tell which token went where
    n_thumbnail = len(expected["thumb_kept"])
    assert torch.equal(kept_places[:n_thumbnail], expected["thumb_kept"])
    sequence = expected["sequence"][expected["sequence"][:, 0] >= 0]  # without newlines
    assert [[layout.crop[i], places[i]] for i in kept_places.tolist()] == sequence.tolist()


def check_hired(case: Case) -> None:
    """[CLS] rows of two layers; budgets and masks before unpadding, and the packed order of square grids."""
    inputs, expected = case.load()
    p = case.params
    side = math.isqrt(p["N"])
    layout = mosaic(side, p["grid_rows"], p["grid_cols"])
    places = grid_places(layout, side)
    method = tokprune.get_method("hired", faithful=True, alpha=p["alpha"])
    (signal,) = method.needs(Tower(24, True))
    assert signal.layers == (p["budget_layer"], p["selection_layer"])
    early, late = inputs["thumb_cls_attn_layer0"].mean(0)[1:], inputs["cls_attn_layer22"].mean(1)[:, 1:]
    pairs = list(zip(layout.crop, places, strict=True))
    rows = [[early[place] for _, place in pairs], [late[crop, place] for crop, place in pairs]]
    tokens = VisualTokens.of(torch.zeros(1, len(places), 1), layout, {signal: torch.tensor(rows)[None]})
    out = method.select(tokens, p["total_budget"])
    budgets = [int(expected["thumb_budget"]), *expected["crop_budgets"].tolist()]
    for crop, budget in enumerate(budgets):
        kept = kept_of(out.keep, layout, crop, places)
        assert len(kept) == budget
        assert torch.equal(kept, expected["kept_mask"][crop].nonzero()[:, 0])
    # The code lays the tiles out on the transposed grid, and then cuts it to the true aspect.
    unpadded = mosaic(side, p["grid_cols"], p["grid_rows"], tuple(p["image_size_hw"]))
    shown = zip(unpadded.crop, grid_places(unpadded, side), strict=True)
    keep = dict(zip(pairs, out.keep[0].tolist(), strict=True))
    packed = [[crop, place] for crop, place in shown if keep[crop, place]]
    assert packed == expected["packed"].tolist()


def check_visionzip(case: Case) -> None:
    """[CLS] rows, keys (mean over heads) and states of one layer."""
    inputs, expected = case.load()
    p = case.params
    method = tokprune.get_method("visionzip", contextual=p["contextual"])
    n_keep = p["dominant"] + p["contextual"]
    hidden, metric, attention = inputs["hidden"], inputs["metric"], inputs["cls_attn"].mean(1)[:, 1:]
    values = {
        Kind.CLS_ROW: attention[:, None],
        Kind.KEYS: metric[:, None, 1:, None],
        Kind.CLS_STATE: hidden[:, :1],
    }
    signals = {s: values[s.kind] for s in method.needs(Tower(24, True))}
    tokens = VisualTokens.of(hidden[:, 1:], grid_layout(math.isqrt(p["N"]), math.isqrt(p["N"])), signals)
    dominant, rest = method.dominant(tokens, p["dominant_patches"])
    assert torch.equal(dominant, expected["dominant"])
    targets, groups = method.contextual_groups(tokens, rest, p["contextual"])
    assert torch.equal(targets, expected["contextual_targets"])
    assigned = torch.full_like(expected["contextual_assign"], -1)
    own = torch.arange(p["contextual"]).expand_as(targets)
    assigned = assigned.scatter(1, rest, (groups * torch.arange(p["contextual"])).sum(2).long()).scatter(
        1, targets, own
    )
    assert torch.equal(assigned, expected["contextual_assign"])
    out = method.select(tokens, n_keep)
    assert out.keep.sum(1).tolist() == [n_keep] * p["tiles"]
    got = out.features[out.keep].view(p["tiles"], n_keep, -1)
    torch.testing.assert_close(got, expected["merged"], rtol=1e-4, atol=1e-5)


def check_prumerge(case: Case) -> None:
    """Query of [CLS], keys and features; the tiles of a batch are the crops of one image."""
    inputs, expected = case.load()
    p = case.params
    n, tiles, variant = p["N"], p["tiles"], p["variant"]
    fixed = {"n_top": p["num_top"], "step": p["grid_step"]} if variant == "fixed_plus" else {}
    fixed |= {"adaptive": False} if variant == "fixed_ratio" else {}
    method = tokprune.get_method(case.method, **fixed)
    q, k = inputs["q_cls"][:, None, None], inputs["k"][:, None]
    attention_row = attention.cls_row(q, k, k.shape[-1] ** -0.5)
    values = {Kind.CLS_ROW: attention_row.reshape(1, 1, -1), Kind.KEYS: k[:, 0, 1:].reshape(1, 1, n * tiles, 1, -1)}
    signals = {s: values[s.kind] for s in method.needs(Tower(24, True))}
    side = math.isqrt(n)
    crops = tuple(crop for crop in range(tiles) for _ in range(n))
    square = grid_layout(side, side)
    layout = Layout(crops, square.row * tiles, square.column * tiles, (1, tiles - 1) if tiles > 1 else (0, 0))
    tokens = VisualTokens.of(inputs["features"].reshape(1, n * tiles, -1), layout, signals)
    out = method.select(tokens, p["num_top"] + 1)
    n_out = expected["merged"].shape[1]
    got = out.features[out.keep].view(tiles, -1, out.features.shape[-1])
    assert got.shape[1] == n_out
    tolerance = 2e-3 if variant == "fixed_plus" else 1e-4  # the code writes half precision there
    torch.testing.assert_close(got, expected["merged"], rtol=tolerance, atol=tolerance)
    for tile in range(tiles):
        chosen = method.chosen(attention_row[tile : tile + 1], p["num_top"], p["ratio"])
        assert torch.equal(chosen[0], expected["kept"][tile])


def check_divprune(case: Case) -> None:
    """Features alone."""
    inputs, expected = case.load()
    method = tokprune.get_method("divprune")
    side = math.isqrt(case.params["N"])
    tokens = VisualTokens.of(inputs["features"][None], grid_layout(side, side))
    assert torch.equal(method.order(tokens, case.params["num_keep"])[0], expected["selection_order"])
    assert_kept(method.select(tokens, case.params["num_keep"]).keep, expected["kept"][None])


def check_cdpruner(case: Case) -> None:
    """Features, and embeddings of patches and text in a space of their own; the tiles are the crops of one image."""
    inputs, expected = case.load()
    n, tiles, n_keep = case.params["N"], case.params["tiles"], case.params["num_keep"]
    method = tokprune.get_method("cdpruner", split="even")
    square = grid_layout(math.isqrt(n), math.isqrt(n))
    crops = tuple(crop for crop in range(tiles) for _ in range(n))
    layout = Layout(crops, square.row * tiles, square.column * tiles, (1, tiles - 1) if tiles > 1 else (0, 0))
    tokens = VisualTokens.of(inputs["features"].reshape(1, n * tiles, -1), layout)
    relevance = method.relevance(inputs["image_embeds"].reshape(1, n * tiles, -1), inputs["text_embeds"][None])
    torch.testing.assert_close(relevance, expected["relevance"].reshape(1, -1), rtol=1e-4, atol=1e-6)
    out = method.choose(tokens, relevance, n_keep * tiles)
    assert_kept(out.keep.view(tiles, n), expected["kept"])
    for tile in range(tiles):
        own = relevance[:, tile * n : (tile + 1) * n]
        order = method.order(inputs["features"][tile : tile + 1], own, n_keep)
        assert torch.equal(order, expected["greedy_order"][tile : tile + 1])


LLM = Decoder(n_layers=32)


def between(method, layer: int, values: dict, features: Tensor) -> VisualTokens:
    """Tokens before a decoder layer, with the signals that the method asks for there, from values by kind."""
    signals = {s: values[s.kind] for s in method.reads(layer)}
    return VisualTokens.of(features, grid_layout(1, features.shape[1]), signals)


def check_fastv(case: Case) -> None:
    """The last attention row of one layer, over the whole sequence; the window may be shifted."""
    inputs, expected = case.load()
    p, row = case.params, inputs["attn_last_row"].mean(0)
    start, n = p["image_token_start_index"], p["N"]
    method = tokprune.get_method("fastv", layer=p["K"])
    (signal,) = method.reads(p["K"])
    assert (method.layers(LLM), signal.layers) == ((p["K"],), (p["K"] - 1,))
    n_keep = method.paper_count(n, p["R"])
    assert n_keep == p["num_keep"]
    out = select(method, {signal: row[None, None, start : start + n]}, n, n_keep)
    assert_kept(out.keep, expected["kept"][None])
    left = torch.ones(p["seq_len"], dtype=torch.bool)
    left[start : start + n] = out.keep[0]
    assert torch.equal(left.nonzero()[:, 0], expected["position_ids"])  # columns keep the positions they came with


def check_pyramiddrop(case: Case) -> None:
    """Query of the last token and keys at every cut; every sample of a padded batch by itself."""
    inputs, expected = case.load()
    p = case.params
    layers = p["layer_list"]
    method = tokprune.get_method("pyramiddrop:schedule=pyramid/" + "/".join(map(str, layers)))
    assert method.layers(LLM) == tuple(layers)
    present = [torch.arange(sample["N"]) for sample in p["samples"]]  # of the original tokens
    for stage, (layer, ratio) in enumerate(zip(layers, p["ratios"][1:], strict=True)):
        (signal,) = method.reads(layer)
        assert signal.layers == (layer,)
        lengths = []
        for b, sample in enumerate(p["samples"]):
            start, n = sample["image_start"], len(present[b])
            length = start + n + sample["text_after"]
            q, k = inputs[f"s{stage}_q"][b, None, :, None], inputs[f"s{stage}_k"][b, None, :, :length]
            row = attention.rows(q, k, q.shape[-1] ** -0.5, torch.ones(1, 1, length, dtype=torch.bool)).mean(1)
            n_keep = method.paper_count(sample["N"], ratio)
            keep = select(method, {signal: row[:, :, start : start + n]}, n, n_keep).keep
            for name, values in (("kept", torch.arange(n)), ("kept_orig", present[b])):
                stored = expected[f"s{stage}_{name}"][b]
                assert torch.equal(values[keep[0]], stored[stored >= 0])
            present[b] = present[b][keep[0]]
            lengths.append(length - n + n_keep)
        assert torch.equal(paper_positions(torch.tensor(lengths)), expected[f"s{stage}_position_ids"])


def check_sparsevlm(case: Case) -> None:
    """Embeddings, and attention of the text after the image at three cuts; the layers between do nothing."""
    inputs, expected = case.load()
    p = case.params
    start, n = p["image_start"], p["N"]
    layers = [layer + 1 for layer in p["stage_layers"]]
    method = tokprune.get_method("sparsevlm", faithful=True)
    assert method.layers(LLM) == tuple(layers)
    visual, text = inputs["hidden"][None, start : start + n], inputs["hidden"][None, start + n :]
    assert torch.equal(method.raters(visual, text)[0].nonzero()[:, 0], expected["raters"])
    close, features, counts = dict(rtol=1e-4, atol=1e-6), visual, [n]
    for stage, (layer, wanted) in enumerate(zip(layers, p["table"], strict=True)):
        rows = inputs[f"s{stage}_attn"].mean(0)[None]
        values = {Kind.LM_TEXT_ROWS: rows, Kind.LM_EMBEDS: visual, Kind.LM_TEXT_EMBEDS: text}
        tokens = between(method, layer, values, features)
        stored = {name: expected[f"s{stage}_{name}"][None] for name in ("score", "kept", "recycled", "merged")}
        n_best = method.paper_count(tokens.n_visual, wanted)
        best, recycled = method.parts(tokens, n_best)
        torch.testing.assert_close(best.scores, stored["score"], rtol=1e-4, atol=0)
        assert_kept(best.keep, stored["kept"])
        assert torch.equal(recycled, stored["recycled"])
        _, merged = method.merged(tokens, recycled, method.n_clusters(tokens.n_visual - n_best))
        torch.testing.assert_close(merged, stored["merged"], **close)
        features = torch.cat([features[best.keep][None], merged], 1)
        counts.append(method.left(tokens.n_visual, wanted))
        # The whole selection keeps as many; it is the same where no other number of kept tokens has this total.
        out = method.select(tokens, counts[-1])
        assert out.keep.sum() == counts[-1] == features.shape[1]
        if method.n_best(tokens.n_visual, counts[-1]) == n_best:
            assert out.keep[best.keep].all()
            total = out.features[out.keep].sum(0)
            torch.testing.assert_close(total, features[0].sum(0), rtol=1e-4, atol=1e-4)
    assert counts == expected["num_visual"].tolist()
    whole = torch.cat([inputs["hidden"][None, :start], features, text], 1)[0]
    torch.testing.assert_close(whole, expected["final_hidden"], **close)
    table = dict(zip(layers, p["table"], strict=True))
    left = tokprune.get_method("sparsevlm", faithful=True, schedule=table).cuts(LLM, n, 1)
    assert left == {layer: b for layer, a, b in zip(layers, counts, counts[1:], strict=False) if b < a}


def check_dart(case: Case) -> None:
    """Keys and hidden states of the whole sequence; one variant comes with its own order of pivots."""
    inputs, expected = case.load()
    p = case.params
    start, n, faithful = p["image_start"], p["N"], p["variant"] == "lightcompress"
    method = tokprune.get_method(
        "dart",
        pivots=p["pivot_image_token"],
        text_pivots=p["pivot_text_token"],
        text="after" if faithful else "all",
        faithful=faithful,
    )
    places = torch.arange(p["seq_len"])
    text = places[start + n :] if faithful else torch.cat([places[:start], places[start + n :]])
    keys, hidden = inputs["keys"].transpose(0, 1)[None], inputs["hidden"][None]
    values = {
        Kind.LM_KEYS: keys[:, start : start + n],
        Kind.LM_TEXT_KEYS: keys[:, text],
        Kind.LM_TEXT_STATES: hidden[:, text],
    }
    tokens = between(method, 2, values, hidden[:, start : start + n])
    n_keep = method.paper_count(n, p["reduction_ratio"])
    assert n_keep == p["num_keep"]
    visual, (written, exists) = method.visual_pivots(tokens, n_keep), method.text_pivots_of(tokens)
    assert torch.equal(visual[0] + start, expected["pivot_image"])
    assert torch.equal(text[written[0]], expected["pivot_text"])
    assert exists.all()
    if faithful:
        order = expected["pivot_order"]
        out = method.around(tokens, visual, hidden[:, order], torch.ones_like(order)[None] > 0, n_keep)
    else:
        assert torch.equal(torch.cat([visual[0] + start, text[written[0]]]), expected["pivot_order"])
        out = method.select(tokens, n_keep)
    assert_kept(out.keep, expected["kept"][None] - start)


CHECKS = {
    "cdpruner": check_cdpruner,
    "dart": check_dart,
    "divprune": check_divprune,
    "fastv": check_fastv,
    "fastervlm": check_cls_rows,
    "fopru": check_fopru,
    "globalcom2": check_globalcom2,
    "hired": check_hired,
    "prumerge": check_prumerge,
    "prumerge_plus": check_prumerge,
    "pyramiddrop": check_pyramiddrop,
    "sparsevlm": check_sparsevlm,
    "visionzip": check_visionzip,
    "vtc_cls": check_cls_rows,
}


def select(method, signals: dict[Signal, Tensor], n_visual: int, n_keep: int) -> VisualTokens:
    """The registered object's own selection, on a square grid; features play no part."""
    n_images = len(next(iter(signals.values())))
    side = math.isqrt(n_visual)
    tokens = VisualTokens.of(torch.zeros(n_images, n_visual, 1), grid_layout(side, n_visual // side), signals)
    return method.select(tokens, n_keep)


def assert_kept(keep: Tensor, expected: Tensor) -> None:
    """The same sets, with the same count; expected is (G, K), ascending."""
    assert keep.sum(1).tolist() == [expected.shape[1]] * len(keep)
    assert torch.equal(keep.nonzero()[:, 1].view(len(keep), -1), expected)
