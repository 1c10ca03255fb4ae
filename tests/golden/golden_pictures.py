"""Golden cases of 2026, pictures: from a case to the registered method. It decides nothing, as `golden_harness`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from golden_harness import Case, assert_kept
from torch import Tensor

import tokprune
from tokprune.core import attention
from tokprune.core.layout import Layout, grid_layout
from tokprune.core.signals import Kind, Signal, Tower
from tokprune.core.tokens import VisualTokens

CLIP, QWEN = Tower(24, has_cls=True), Tower(32, has_cls=False, full_layers=(7, 15, 23, 31))


def check_pixelprune(case: Case) -> None:
    """Pixel values of the patches of every picture, four patches a cell."""
    inputs, expected = case.load()
    method = tokprune.get_method("pixelprune", tau=case.params["threshold"], anchored=case.params["anchored"])
    (signal,) = method.needs(Tower(24, False))
    grids = [(h // 2, w // 2) for _, h, w in inputs["grid_thw"].tolist()]
    cells = inputs["pixel_values"].unflatten(0, (-1, 4)).flatten(1).split([h * w for h, w in grids])
    for i, ((h, w), own) in enumerate(zip(grids, cells, strict=True)):
        tokens = VisualTokens.of(torch.zeros(1, h * w, 1), grid_layout(h, w), {signal: own[None, None]})
        assert_kept(method.select(tokens, 0).keep, expected[f"kept_{i}"][None])


def square(n: int) -> Layout:
    """One crop of n tokens, as square as their number allows."""
    side = math.isqrt(n)
    return grid_layout(side, side) if side * side == n else grid_layout(1, n)


def in_raster_order(by_patch: Tensor, window_index: Tensor) -> Tensor:
    """(4 N,) values of patches in window order, as the mean over the 2 x 2 patches of a token, (N,)."""
    return torch.zeros(len(window_index)).scatter(0, window_index, by_patch.view(-1, 4).mean(1))


def received_by_image(q: Tensor, k: Tensor, window_index: Tensor, starts: list[int]) -> Tensor:
    """(N,): what a token of a tower without [CLS] receives, summed over the queries of its image.

    Args:
        q, k: (H, 4 N, d), in window order.
        window_index: where the tokens lie, (N,).
        starts: first patches of the images, and their end.
    """
    parts = []
    for start, end in itertools.pairwise(starts):
        own = attention.received(q[None, :, start:end], k[None, :, start:end], q.shape[-1] ** -0.5)[0]
        parts.append(own * (end - start))
    return in_raster_order(torch.cat(parts), window_index)


def patch_starts(inputs: dict[str, Tensor]) -> list[int]:
    """First patches of the images of a request, and their end."""
    return inputs["cu_seqlens"].tolist() if "cu_seqlens" in inputs else [0, 4 * len(inputs["window_index"])]


def cls_row(signal: Signal, q: Tensor, k: Tensor) -> Tensor:
    """(B, N) from queries and keys of one layer, as the signal has it."""
    return attention.cls_row(q, k, q.shape[-1] ** -0.5, signal.form, 1, signal.special)


def check_scope(case: Case) -> None:
    """Features and a saliency, or queries and keys; all images of a request form one pool."""
    inputs, expected = case.load()
    p = case.params
    features = inputs["features"]
    features = features if features.ndim == 3 else features[None]
    combine = {"multi": "multiply", "add": "add"}[p.get("combined") or "multi"]
    has_saliency = "q" in inputs or "saliency" in inputs
    method = tokprune.get_method("scope", alpha=p.get("alpha", 1.0) if has_saliency else 0.0, combine=combine)
    tower = QWEN if "window_index" in inputs else CLIP
    signals = {}
    for signal in method.needs(tower):
        if "window_index" in inputs:  # that code sums over queries and over the patches of a token
            starts = patch_starts(inputs)
            saliency = 4 * received_by_image(inputs["q"], inputs["k"], inputs["window_index"], starts)[None]
        elif "q" in inputs:
            saliency = cls_row(signal, inputs["q"], inputs["k"]).reshape(1, -1)
        else:
            saliency = inputs["saliency"]
        if "saliency" in expected:
            torch.testing.assert_close(saliency[0], expected["saliency"], rtol=1e-4, atol=0)
        signals[signal] = saliency.reshape(len(features), 1, -1)
    tokens = VisualTokens.of(features, square(features.shape[1]), signals)
    n_keep = p["num_keep"]
    assert torch.equal(method.order(tokens, n_keep), expected["greedy_order"].reshape(len(features), -1))
    assert_kept(method.select(tokens, n_keep).keep, expected["kept"].reshape(len(features), -1))


def check_vispruner(case: Case) -> None:
    """[CLS] rows and states of the tower, every tile by itself; or queries, keys and rows of the language model."""
    inputs, expected = case.load()
    p = case.params
    official = p["variant"] == "official"
    share = p.get("important_ratio", p.get("important_ratio_of_kept", 0.5))
    without = {"without_cls": "received"} if "window_index" in inputs else {}
    variant = "authors" if official else "angelslim"
    method = tokprune.get_method("vispruner", important=share, variant=variant, **without)
    if official:
        attention_rows = inputs["cls_attn"].mean(1)
        values = {Kind.CLS_ROW: attention_rows[:, None], Kind.TOWER_STATES: inputs["features"][:, None]}
        tokens = VisualTokens.of(
            torch.zeros(*attention_rows.shape, 1),
            square(p["N"]),
            {signal: values[signal.kind] for signal in method.needs(CLIP)},
        )
        n_keep = p["visual_token_num"]
        assert method.n_important(n_keep) == p["important_token_num"]
        assert_kept(method.select(tokens, n_keep).keep, expected["kept"])
        alone = tokprune.get_method("vispruner", important=1.0)
        if p["important_token_num"]:
            assert_kept(alone.select(tokens, p["important_token_num"]).keep, expected["important"])
        return
    (signal,) = method.needs(QWEN if without else CLIP)
    if without:
        starts = patch_starts(inputs)
        saliency = received_by_image(inputs["q"], inputs["k"], inputs["window_index"], starts)
        sizes = [(end - start) // 4 for start, end in itertools.pairwise(starts)]
    else:
        saliency = cls_row(signal, inputs["q"], inputs["k"]).flatten()
        sizes = [len(saliency) // p["images"]] * p["images"]
    n_keeps, start = p["num_keep"], 0
    n_keeps = n_keeps if isinstance(n_keeps, list) else [n_keeps]
    kept = []
    for n_keep, size in zip(n_keeps, sizes, strict=True):
        own = slice(start, start + size)
        tokens = VisualTokens.of(inputs["features"][None, own], square(size), {signal: saliency[None, None, own]})
        kept.append(method.select(tokens, n_keep).keep[0])
        start += size
    assert_kept(torch.cat(kept)[None], expected["kept"][None])


def hiprune_scores(signal: Signal, case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """(B, 2, N): of the middle and of the late layer."""
    layers = []
    for layer in ("object", "deep"):
        if f"{layer}_score" in inputs:
            layers.append(inputs[f"{layer}_score"][None])
            continue
        q, k = inputs[f"q_{layer}"], inputs[f"k_{layer}"]
        if "window_index" in inputs:
            layers.append(received_by_image(q, k, inputs["window_index"], patch_starts(inputs))[None])
        elif signal.kind is Kind.CLS_ROW:
            layers.append(cls_row(signal, q, k))
        else:
            layers.append(attention.received(q, k, q.shape[-1] ** -0.5, signal.form, 1, signal.special))
    return torch.stack(layers, 1)


def check_hiprune(case: Case) -> None:
    """Queries and keys of two layers, or their scores; every tile by itself."""
    inputs, expected = case.load()
    p = case.params
    layer = p["object_layer_0based"] if "object_layer_0based" in p else p["object_layer_1based"] - 1
    variant = "angelslim" if p["variant"].startswith("angelslim") else "authors"
    method = tokprune.get_method("hiprune", alpha=p["alpha"], layer=layer, variant=variant, faithful=True)
    without = p["variant"].endswith("qwen2_5_vl")
    height, width = p.get("grid_hw") or (p["N"] // p["grid_width"], p["grid_width"])
    (signal,) = method.needs(Tower(32, has_cls=False) if without else CLIP)
    scores = hiprune_scores(signal, case, inputs)
    for place, name in enumerate(("object_score", "deep_score")):
        if name in expected and p["variant"] != "angelslim_qwen2_5_vl":
            stored = expected[name].view(len(scores), -1)
            torch.testing.assert_close(scores[:, place], stored, rtol=1e-4, atol=0)
    tokens = VisualTokens.of(torch.zeros(*scores[:, 0].shape, 1), grid_layout(height, width), {signal: scores})
    n_keep = p["num_keep"]
    assert method.n_anchors(n_keep) == p["num_anchors"]
    anchors = method.anchors(tokens, n_keep)
    near = anchors | method.around(anchors, tokens.layout)
    for own, name in ((anchors, "anchors"), (near, "anchors_and_buffer")):
        for one, stored in zip(own, expected[name].view(len(own), -1), strict=True):
            assert torch.equal(one.nonzero()[:, 0], stored[stored >= 0])
    assert_kept(method.select(tokens, n_keep).keep, expected["kept"].view(len(scores), -1))


def check_holov(case: Case) -> None:
    """Attention of every token; the code may append zeros in place of tokens."""
    inputs, expected = case.load()
    p = case.params
    method = tokprune.get_method("holov", stripes=p["num_patches"], power=float(p.get("power", 1)), faithful=True)
    (signal,) = method.needs(CLIP)
    n = len(inputs["attention"])
    signals = {signal: inputs["attention"][None, None]}
    tokens = VisualTokens.of(torch.arange(n)[None, :, None].float(), square(n), signals)
    out = method.select(tokens, p["num_keep"])
    assert torch.equal(method.quotas(tokens, p["num_keep"])[0], expected["allocated"])
    assert_kept(out.keep, expected["kept"][None])
    written = expected["positions"][expected["positions"] >= 0]
    assert torch.equal(out.features[0, out.keep[0], 0].long(), written)  # the features tell which token went where
    exact = tokprune.get_method("holov", stripes=p["num_patches"]).select(tokens, p["num_keep"])
    assert exact.keep.sum() == p["num_keep"]


def check_mmtok(case: Case) -> None:
    """Text, rows and states; patches of padding cannot be chosen."""
    inputs, expected = case.load()
    p = case.params
    method = tokprune.get_method(
        "mmtok",
        alpha=p["alpha"],
        text_temperature=p["tv_temperature"],
        vision_temperature=p["vv_temperature"],
    )
    values = {Kind.TEXT_EMBEDS: inputs["text"][None], Kind.TOWER_STATES: inputs["tower"][None, None]}
    signals = {s: values[s.kind] for s in method.needs(CLIP)}
    tokens = VisualTokens.of(inputs["features"][None], square(p["N"]), signals)
    if "excluded" in inputs:
        tokens.keep[:, inputs["excluded"]] = False
    assert torch.equal(method.order(tokens, p["num_keep"])[0], expected["order"])
    assert_kept(method.select(tokens, p["num_keep"]).keep, expected["kept"][None])


PICTURE_CHECKS: dict[str, Callable[[Case], None]] = {
    "hiprune": check_hiprune,
    "holov": check_holov,
    "mmtok": check_mmtok,
    "pixelprune": check_pixelprune,
    "scope": check_scope,
    "vispruner": check_vispruner,
}
