"""Golden cases of 2026, videos: from a case to the registered method. It decides nothing, as `golden_harness`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from golden_harness import Case, assert_kept

import tokprune
from tokprune.core.layout import frames_layout, grid_layout
from tokprune.core.signals import Tower
from tokprune.core.tokens import VisualTokens
from tokprune.methods import quota
from tokprune.methods.frames import frame_means, frame_similarity

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def video_of(features: torch.Tensor, grid: tuple[int, int] | None = None, signals=None) -> VisualTokens:
    """A video from tokens (T, n, D) in frames of a grid, of one row where nothing is said of it."""
    n_frames, n = features.shape[:2]
    return VisualTokens.of(features.flatten(0, 1)[None], frames_layout(n_frames, *(grid or (1, n))), signals)


def check_frames(keep: torch.Tensor, expected: dict[str, torch.Tensor], n_frames: int) -> None:
    """The same tokens, and as many of every frame."""
    assert_kept(keep, expected["kept"][None])
    if "frame_counts" in expected:
        assert torch.equal(keep.view(n_frames, -1).sum(1), expected["frame_counts"])


def check_evs(case: Case) -> None:
    """Features alone."""
    inputs, expected = case.load()
    n_frames, n = inputs["features"].shape[:2]
    method, tokens = tokprune.get_method("evs"), video_of(inputs["features"])
    n_keep = method.paper_count(n_frames, n, case.params["pruning_rate"])
    assert n_keep == case.params["num_keep"]
    scores = method.score(tokens).view(n_frames, n)
    torch.testing.assert_close(scores[1:], expected["dissimilarity"][1:], **CLOSE)
    check_frames(method.select(tokens, n_keep).keep, expected, n_frames)


def check_vidcom2(case: Case) -> None:
    """Features alone; one variant tells the order among newlines, too."""
    inputs, expected = case.load()
    p = case.params
    n_frames, n = p["frames"], p["tokens_per_frame"]
    method = tokprune.get_method("vidcom2", faithful=True, ratio=p["base_scale"])
    tokens = video_of(inputs["features"].view(n_frames, n, -1))
    to_video, _ = method.similarity(tokens)
    torch.testing.assert_close(-method.score(tokens).view(n_frames, n), expected["score"], **CLOSE)
    torch.testing.assert_close(
        method.retention(to_video, p["base_scale"])[0].clamp(max=1), expected["frame_ratio"], **CLOSE
    )
    assert torch.equal(method.channels(tokens)[0], expected["low_var_channels"])
    assert torch.equal(method.counts(to_video, 1)[0], expected["frame_budget"])
    out = method.select(tokens, 1)
    assert_kept(out.keep, expected["kept"][None])
    if "sequence" in expected:
        side = round(n**0.5)
        assert torch.equal(method.paper_sequence(out.keep[0], n_frames, side, side), expected["sequence"])


def check_quota(case: Case) -> None:
    """Relevance of frames; what they get is what every method with split=query spends."""
    inputs, expected = case.load()
    p = case.params
    assert p["exponent"] == quota.EXPONENT
    sizes = (p["tokens_per_frame"],) * p["frames"]
    assert torch.equal(quota.budgets(inputs["p"][None], sizes, p["budget"])[0], expected["frame_budget"])


def check_fastvid(case: Case) -> None:
    """Attention of every frame, tokens, and descriptors of frames where they are not the means of tokens."""
    inputs, expected = case.load()
    p = case.params
    n_frames, n, _ = inputs["tokens"].shape
    method = tokprune.get_method(
        "fastvid",
        rule=p["variant"],
        ratio=p["retention_ratio"],
        segments=p["DySeg_c"],
        tau=p["DySeg_tau"],
        contextual=p["STPrune_d"],
        every=p["DTM_p"],
        beta=p["DTM_beta"],
        **({"ignore": p["DySeg_ignore"]} if "DySeg_ignore" in p else {}),
    )
    (signal,) = method.needs(Tower(27, False))
    tokens = video_of(inputs["tokens"], p.get("grid_hw"), {signal: inputs["frame_attn"].view(1, 1, -1)})
    descriptors = inputs["frame_descriptor"][None] if "frame_descriptor" in inputs else frame_means(tokens)
    similarity = frame_similarity(descriptors)
    torch.testing.assert_close(similarity[0], expected["similarity"], **CLOSE)
    assert torch.equal(method.cuts(similarity)[0].nonzero()[:, 0], expected["cuts"])
    segments = method.segmented(similarity)
    assert torch.equal(segments.length[segments.place == 0], expected["segment_sizes"])
    salient, centres = method.chosen(tokens, similarity, 1)
    assert_kept(salient.flatten(1), expected["salient"][None])
    assert_kept(centres.flatten(1), expected["centres"][None])
    out = method.around(tokens, descriptors, 1)
    check_frames(out.keep, expected, n_frames)
    torch.testing.assert_close(out.features[out.keep], expected["merged"], rtol=1e-4, atol=2e-5)
    if "sequence" in expected:
        side = round(n**0.5)
        grid = out.keep.view(-1, side)
        rows = torch.cat([grid, grid.any(1, keepdim=True)], 1)  # a newline stays with a token of its row
        assert torch.equal(rows.flatten().nonzero()[:, 0], expected["sequence"])
    if "frame_descriptor" not in inputs:
        assert torch.equal(method.select(tokens, 1).keep, out.keep)


def check_dycoke(case: Case) -> None:
    """Features alone."""
    inputs, expected = case.load()
    n_frames, n = inputs["features"].shape[:2]
    method = tokprune.get_method("dycoke", k=case.params["k"], faithful=True)
    tokens = video_of(inputs["features"])
    assert sum(method.counts(n_frames, n, 0)) == case.params["total_kept"]
    out = method.select(tokens, 0)
    check_frames(out.keep, expected, n_frames)
    assert torch.equal(out.features[out.keep], tokens.features[0, expected["sequence"]])


def check_framefusion(case: Case) -> None:
    """Hidden states of a prompt, of which a layer merges visual tokens; or attention, by which another one prunes."""
    inputs, expected = case.load()
    p = case.params
    if p["variant"] == "prune":
        check_framefusion_prune(p, inputs, expected)
        return
    method = tokprune.get_method("framefusion", faithful=True, similarity=p["similarity_lower_bound"])
    is_visual = inputs["patch_type"] >= 0
    features = inputs["hidden"][is_visual].view(p["frames"], p["tokens_per_frame"], -1)
    tokens = video_of(features)
    n_merged = int(method.paper_ratio(p["cost"], p["sparsity_list_before"], p["num_layers"]) * tokens.n_visual)
    out = method.select(tokens, tokens.n_visual - n_merged)
    check_frames(out.keep, expected, p["frames"])
    assert (int(out.keep.sum()) > tokens.n_visual - n_merged) == (p["branch"] == "threshold")
    keep, whole = torch.ones_like(is_visual), inputs["hidden"].clone()
    keep[is_visual], whole[is_visual] = out.keep[0], out.features[0]
    assert torch.equal(keep.nonzero()[:, 0], expected["kept_sequence"])
    torch.testing.assert_close(whole[keep], expected["merged"], rtol=1e-4, atol=1e-5)


def check_framefusion_prune(p: dict, inputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """What visual tokens receive from all queries, in place of the tower's; of a picture nothing is merged."""
    method, n, start = tokprune.get_method("framefusion"), p["video_tokens"], p["video_start"]
    (signal,) = method.needs(Tower(24, False))
    attention = inputs["attention"].mean((1, 2))[:, None, start : start + n]
    n_keep = round(n * (1 - method.paper_ratio(p["cost"], p["sparsity_list"], p["num_layers"])))
    assert n_keep == p["num_keep"]
    tokens = VisualTokens.of(torch.zeros(1, n, 4), grid_layout(1, n), {signal: attention})
    assert_kept(method.select(tokens, n_keep).keep, expected["kept"][None])


VIDEO_CHECKS: dict[str, Callable[[Case], None]] = {
    "dycoke": check_dycoke,
    "evs": check_evs,
    "fastvid": check_fastvid,
    "framefusion": check_framefusion,
    "quota": check_quota,
    "vidcom2": check_vidcom2,
}
