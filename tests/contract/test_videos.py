"""Laws of methods that look at the frames of a video, and of split=query, against oracles by hand."""

from __future__ import annotations

import pytest
import torch
from specs import build, mosaic_layout

import tokprune
from tokprune.core.errors import MissingSignalError
from tokprune.core.layout import Layout, frames_layout, grid_layout, tiles_layout
from tokprune.core.signals import Kind, Signal, Tower
from tokprune.core.tokens import VisualTokens
from tokprune.methods import quota

TEXT = Signal(Kind.TEXT_EMBEDS)
T, SIDE, WIDTH = 6, 3, 8
N = SIDE * SIDE


def clip(seed=0, n_videos=1, n_frames=T) -> torch.Tensor:
    """(videos, T, n, D): every frame is the one before with some noise, of its own strength at every place."""
    generator = torch.Generator().manual_seed(seed)
    frames = [torch.randn(n_videos, N, WIDTH, generator=generator)]
    for _ in range(n_frames - 1):
        strength = torch.rand(n_videos, N, 1, generator=generator)
        frames.append(frames[-1] + strength * torch.randn(n_videos, N, WIDTH, generator=generator))
    return torch.stack(frames, 1)


def video(features: torch.Tensor, signals=None) -> VisualTokens:
    return VisualTokens.of(features.flatten(1, 2), frames_layout(features.shape[1], SIDE, SIDE), signals)


def kept(spec: str, features: torch.Tensor, n_keep: int) -> torch.Tensor:
    """(videos, T, n) bool."""
    return build(spec).select(video(features), n_keep).keep.view(features.shape[:3])


# ---- what a video is


def test_frames_of_a_layout_are_those_of_videos_alone():
    assert frames_layout(3, 2, 4).frames == (3, 8)
    assert frames_layout(3, 2, 4, n_newlines=1).without_specials.frames == (3, 8)
    assert frames_layout(1, 2, 4).frames == (1, 8)
    # Tiles below each other look the same but for the fact.
    assert tiles_layout(2, (3, 1), -1).frames == (1, 12)
    assert grid_layout(2, 3).frames == (1, 6)
    assert mosaic_layout(2, (2, 2)).frames == (1, 20)
    assert frames_layout(3, 1, 2) != Layout((1, 1, 2, 2, 3, 3), (0, 0, 1, 1, 2, 2), (0, 1) * 3, (3, 1))
    assert frames_layout(3, 1, 2).part([2, 3]).frames == (1, 2)


# ---- EVS


def test_evs_keeps_the_first_frame_and_what_changed():
    features = clip()
    far = 1 - torch.cosine_similarity(features[0, 1:], features[0, :-1], dim=-1)
    keep = kept("evs", features, N + 10)
    assert keep[0, 0].all()
    assert set(keep[0, 1:].flatten().nonzero()[:, 0].tolist()) == set(far.flatten().topk(10).indices.tolist())


def test_evs_of_a_still_clip_keeps_its_first_frame_alone():
    still = torch.randn(1, 1, N, WIDTH).expand(1, T, N, WIDTH)
    assert kept("evs", still, N).sum(2).tolist() == [[N, 0, 0, 0, 0, 0]]


def test_evs_below_one_frame_lets_the_first_compete():
    """A new scene in frame 3 is worth more than what is usual in the first."""
    features = torch.ones(1, T, N, WIDTH) + 0.01 * clip(1)[:, :1]
    features[:, 3:] = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))
    assert kept("evs", features, N - 1).sum(2).tolist() == [[0, 0, 0, N - 1, 0, 0]]


@pytest.mark.parametrize(("pruned", "count"), [(0.9, 100), (0.95, 100), (0.75, 250), (0.3, 700), (0.0, 1000)])
def test_evs_counts_as_the_engines_do_in_exact_arithmetic(pruned, count):
    assert build("evs").paper_count(10, 100, pruned) == count


# ---- VidCom2


@pytest.mark.parametrize("n_keep", [1, T - 1, T, T + 1, 20, T * N - 1])
def test_vidcom2_meets_the_budget_and_gives_every_frame_a_token(n_keep):
    counts = kept("vidcom2", clip(n_videos=3), n_keep).sum(2)
    assert counts.sum(1).tolist() == [n_keep] * 3
    assert int(counts.max()) <= N
    assert bool((counts >= 1).all()) == (n_keep >= T)


def scenes(unusual: int) -> torch.Tensor:
    """A clip of one scene, with one frame of another."""
    features = 1 + 0.1 * clip(3)
    features[:, unusual] = -features[:, unusual]
    return features


def test_vidcom2_gives_the_unusual_frame_twice_the_share():
    """p is 1 for it and 0 for the others: shares of R (2 - 1/T) and R (1 - 1/T)."""
    counts = kept("vidcom2", scenes(4), 25).sum(2)[0].tolist()  # of 9: 7.64 and 3.47, which is 25 in all
    assert counts[4] == 8
    assert sorted(counts) == [3, 3, 3, 4, 4, 8]
    assert kept("vidcom2:faithful=true", scenes(4), 25).sum(2).tolist() == [[3, 3, 3, 3, 8, 3]]


def test_vidcom2_gives_the_surplus_of_a_full_frame_to_the_others():
    n_keep = 5 * N
    counts = kept("vidcom2", scenes(4), n_keep).sum(2)
    assert counts[0, 4] == N
    assert counts.sum() == n_keep
    assert kept("vidcom2:faithful=true", scenes(4), n_keep).sum() < n_keep


# ---- QuoTA


def test_quota_of_the_papers_example():
    p = torch.tensor([[0.99, 0.9, 0.5, 0.1, 0.01]])
    assert quota.budgets(p, (196,) * 5, 400).tolist() == [[191, 158, 49, 2, 0]]
    assert quota.budgets(100 * p, (196,) * 5, 400).tolist() == [[191, 158, 49, 2, 0]]


def test_quota_caps_a_frame_and_shares_the_rest_again():
    p = torch.tensor([[1.0, 0.5, 0.5, 0.0]])
    assert quota.budgets(p, (10,) * 4, 18).tolist() == [[10, 4, 4, 0]]
    assert quota.budgets(p, (10,) * 4, 32).tolist() == [[10, 10, 10, 2]]  # what is irrelevant takes what is left


def about(features: torch.Tensor, question: torch.Tensor) -> VisualTokens:
    text = torch.stack([question, torch.zeros_like(question)], 1)  # the second row is no text
    return video(features, {TEXT: text})


def test_relevance_is_the_cosine_of_means_from_least_to_highest():
    features, question = clip(n_videos=2), torch.randn(2, WIDTH)
    near = torch.cosine_similarity(features.mean(2), question[:, None], dim=-1)
    want = (near - near.amin(1, keepdim=True)) / (near.amax(1, keepdim=True) - near.amin(1, keepdim=True))
    torch.testing.assert_close(quota.relevance(about(features, question)), want)


def test_relevance_is_alike_without_a_question():
    features = clip(n_videos=2)
    assert quota.relevance(about(features, torch.zeros(2, WIDTH))).tolist() == [[1.0] * T] * 2


def test_relevance_of_crops_of_unequal_size():
    layout = mosaic_layout(3, (2, 2), height=5)
    features, question = torch.randn(1, layout.n_visual, WIDTH), torch.randn(1, 1, WIDTH)
    found = quota.relevance(VisualTokens.of(features, layout, {TEXT: question}))
    means = [features[0, [i for i, p in enumerate(layout.crop_places) if p == c]].mean(0) for c in range(5)]
    near = torch.cosine_similarity(torch.stack(means), question[0], dim=-1)
    torch.testing.assert_close(found[0], (near - near.min()) / (near.max() - near.min()))


@pytest.mark.parametrize("spec", ["random", "evs", "fopru:gate=received", "vtc_cls"])
def test_split_query_spends_what_quota_gives(spec):
    features, question = clip(n_videos=2), torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5))
    method, tower = build(f"{spec}:split=query"), Tower(4, True)
    assert TEXT in method.needs(tower)
    assert TEXT not in build(spec).needs(tower)
    text = {TEXT: question[:, None]}
    others = {s: torch.rand(2, len(s.layers), T * N) for s in method.needs(tower) if s != TEXT}
    tokens = video(features, text | others)
    out = method.select(tokens, 17)
    counts = out.keep.view(2, T, N).sum(2)
    assert torch.equal(counts, quota.budgets(quota.relevance(tokens), (N,) * T, 17))
    scores = method.score(tokens).view(2, T, N)
    for g in range(2):
        for t in range(T):
            best = scores[g, t].topk(int(counts[g, t])).indices.tolist()
            assert sorted(best) == out.keep.view(2, T, N)[g, t].nonzero()[:, 0].tolist()


def test_split_query_without_text_is_an_error():
    with pytest.raises(MissingSignalError, match="TEXT_EMBEDS"):
        build("random:split=query").select(video(clip()), 5)


def test_whole_rows_and_shares_of_crops_exclude_each_other():
    with pytest.raises(tokprune.TokPruneError, match="strategy=rank with split=query"):
        tokprune.get_method("fopru", strategy="row", split="query")


# ---- FastVID


ATTENTION = Signal(Kind.RECEIVED, (3,))


def watched(features: torch.Tensor, seed=8) -> VisualTokens:
    """A clip with the attention that tokens receive."""
    n = features.shape[1] * features.shape[2]
    attention = torch.rand(len(features), 1, n, generator=torch.Generator().manual_seed(seed))
    return video(features, {ATTENTION: attention})


def peaks_by_hand(x: torch.Tensor, candidates: list[int], n_peaks: int) -> list[int]:
    """Density peaks among some tokens (n, D) of a frame, ascending."""
    apart = {(i, j): float((x[i] - x[j]).square().sum()) / x.shape[1] for i in candidates for j in candidates}
    spread = {i: sum(sorted(apart[i, j] for j in candidates)[:4]) / min(4, len(candidates)) for i in candidates}
    density = {i: torch.tensor(-spread[i]).double().exp().item() for i in candidates}
    worth = {}
    for i in candidates:
        denser = [apart[i, j] ** 0.5 for j in candidates if density[j] > density[i]]
        worth[i] = density[i] * (min(denser) if denser else max(apart.values()) ** 0.5)
    return sorted(sorted(candidates, key=lambda i: -worth[i])[:n_peaks])


@pytest.mark.parametrize("n_keep", [12, 20, 31])
def test_fastvid_equals_loops_by_hand(n_keep):
    features, method = clip(7), build("fastvid:segments=2:every=2:tau=-1")
    tokens = watched(features)
    out = method.select(tokens, n_keep)
    x, attention = features[0].double(), tokens.signals[ATTENTION].view(T, N)
    means = x.mean(1)
    alike = [float(torch.cosine_similarity(means[t], means[t + 1], dim=0)) for t in range(T - 1)]
    cut = alike.index(min(alike)) + 1
    segments = [range(cut), range(cut, T)]
    n_centres = int(0.4 * n_keep)
    salient = {}
    for t in range(T):  # evenly, the remainder to the first ones
        n_own = (n_keep - n_centres) // T + (t < (n_keep - n_centres) % T)
        salient[t] = attention[t].topk(n_own).indices.tolist()
    centre_frames = [t for s in segments for t in s if (s[-1] - t) % 2 == 0]
    counts = out.keep.view(T, N).sum(1).tolist()
    centres = {t: counts[t] - len(salient[t]) for t in range(T)}
    assert {t for t in range(T) if centres[t]} <= set(centre_frames)
    assert sum(centres.values()) == n_centres
    for s in segments:  # a segment's centres are its part of all, but for less than one
        assert abs(sum(centres[t] for t in s) - n_centres * len(s) / T) < 1
    want = {(t, i): x[t, i] for t in range(T) for i in salient[t]}
    for s in segments:
        for t in (t for t in s if centres[t]):
            rest = [i for i in range(N) if i not in salient[t]]
            own = peaks_by_hand(x[t], rest, centres[t])
            joined = {i: [] for i in own}
            for u in s:
                for j in range(N):
                    if j in salient[u] or (u == t and j in own):
                        continue
                    near = [float(torch.cosine_similarity(x[u, j], x[t, i], dim=0)) for i in own]
                    joined[own[near.index(max(near))]].append(x[u, j])
            for i, others in joined.items():
                w = max(0.6, 1 / (len(others) + 1))
                want[t, i] = w * x[t, i] + (1 - w) * torch.stack(others).mean(0) if others else x[t, i]
    assert sorted(t * N + i for t, i in want) == out.keep[0].nonzero()[:, 0].tolist()
    merged = torch.stack([want[place] for place in sorted(want)])
    torch.testing.assert_close(out.features[out.keep].double(), merged, rtol=1e-4, atol=1e-5)


def test_fastvid_cuts_where_scenes_change():
    features = torch.cat([clip(1, n_frames=2), 5 + clip(2, n_frames=3), clip(3, n_frames=1) - 5], 1)
    method = build("fastvid:segments=1")
    similarity = torch.cosine_similarity(features.mean(2)[:, 1:], features.mean(2)[:, :-1], dim=-1)
    assert {1, 4} <= set((similarity < 0.9)[0].nonzero()[:, 0].tolist())
    assert torch.equal(method.cuts(similarity), similarity < 0.9)
    of = build("fastvid:segments=1:tau=-1").segmented(similarity)
    assert of.length.tolist() == [[T] * T]
    of = build("fastvid:segments=99").segmented(similarity)
    assert of.length.tolist() == [[1] * T]


def test_fastvid_of_nearly_static_frames_on_qwen_loses_what_is_too_much_for_a_frame():
    """12 frames of 49 tokens at 0.27 in two segments keep 62 tokens of 158."""
    still = torch.randn(1, 1, 49, WIDTH, generator=torch.Generator().manual_seed(4)).expand(1, 12, 49, WIDTH)
    features = still + 1e-3 * torch.randn(1, 12, 49, WIDTH, generator=torch.Generator().manual_seed(5))
    attention = torch.rand(1, 1, 12 * 49, generator=torch.Generator().manual_seed(6))
    method = build("fastvid:rule=qwen2_5_vl:segments=2:tau=0.84:ratio=0.27")
    similarity = torch.full((1, 11), 0.99).index_fill(1, torch.tensor([0]), 0.98)
    tokens = VisualTokens.of(features.flatten(1, 2), frames_layout(12, 7, 7), {ATTENTION: attention})
    salient, centres = method.chosen(tokens, similarity, 158)
    assert (salient | centres).sum() == 62
    assert build("fastvid:segments=2").select(tokens, 158).keep.sum() == 158


def test_density_peaks_of_large_frames_come_in_parts(monkeypatch):
    from tokprune.core import ops
    from tokprune.methods.fastvid import density_peaks

    frames, candidates = torch.randn(2, 3, 40, 5), torch.rand(2, 3, 40) > 0.2
    whole = density_peaks(frames, candidates)
    monkeypatch.setattr(ops, "LARGEST", 40 * 7)
    torch.testing.assert_close(density_peaks(frames, candidates), whole)


# ---- DyCoke


@pytest.mark.parametrize("n_frames", [1, 2, 3, 4, 5, 6, 7, 8, 12])
def test_dycoke_keeps_every_fourth_frame_whole(n_frames):
    counts = kept("dycoke:k=0.7", clip(n_frames=n_frames), 0).sum(2)[0].tolist()
    left = int((1 - 0.7) * N)
    assert counts == [N if t % 4 == 0 else left for t in range(n_frames)]


def test_dycoke_drops_what_is_like_the_frame_it_is_compared_with():
    features = clip(5, n_frames=4)
    keep = kept("dycoke:k=0.5", features, 0)[0]
    for t, other in ((1, 0), (2, 0), (3, 2)):
        near = torch.cosine_similarity(features[0, t], features[0, other], dim=-1)
        assert set(keep[t].nonzero()[:, 0].tolist()) == set((-near).topk(4).indices.tolist())


@pytest.mark.parametrize(
    ("n_frames", "whole", "gone"), [(6, {0, 4}, set()), (8, {0, 4, 6}, set()), (9, {0, 4}, {8}), (4, {0, 2}, set())]
)
def test_dycoke_of_the_authors_keeps_a_frame_more_and_drops_an_odd_one(n_frames, whole, gone):
    counts = kept("dycoke:faithful=true", clip(n_frames=n_frames), 0).sum(2)[0].tolist()
    assert {t for t, n in enumerate(counts) if n == N} == whole
    assert {t for t, n in enumerate(counts) if n == 0} == gone


@pytest.mark.parametrize("n_keep", [1, 5, 2 * N, 2 * N + 1, 3 * N, T * N - 1])
def test_dycoke_with_a_budget_fills_whole_frames_first(n_keep):
    counts = kept("dycoke:k=none", clip(n_videos=2), n_keep).sum(2)
    assert counts.sum(1).tolist() == [n_keep] * 2
    whole, others = counts[:, [0, 4]], counts[:, [1, 2, 3, 5]]
    assert int(whole.max() - whole.min()) <= 1
    assert int(others.max() - others.min()) <= 1
    assert int(others.max()) == 0 or int(whole.min()) == N


def test_dycoke_of_the_authors_takes_no_budget():
    with pytest.raises(tokprune.TokPruneError, match=r"k=0\.7"):
        tokprune.get_method("dycoke", k=None, faithful=True)
    assert not tokprune.get_method("dycoke").takes_budget


# ---- FrameFusion


def test_framefusion_merges_runs_into_their_first_token():
    """Place 0 stays the same in frames 1 to 3 and 4 to 5; place 1 always; the others change."""
    features = torch.randn(1, T, N, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    features[:, 2:4, 0] = features[:, 1:2, 0] * torch.tensor([2.0, 3.0])[:, None]
    features[:, 5, 0] = 3 * features[:, 4, 0]
    features[:, 1:, 1] = features[:, :1, 1] * torch.tensor([2.0, 3.0, 4.0, 5.0, 6.0])[:, None]
    out = build("framefusion:faithful=true:similarity=0.999").select(video(features), 1)
    keep, rows = out.keep.view(T, N), out.features.view(T, N, WIDTH)
    assert keep[:, 0].tolist() == [True, True, False, False, True, False]
    assert keep[:, 1].tolist() == [True] + [False] * 5
    assert keep[:, 2:].all()
    torch.testing.assert_close(rows[1, 0], 2 * features[0, 1, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rows[4, 0], 2 * features[0, 4, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rows[0, 1], 3.5 * features[0, 0, 1], rtol=1e-6, atol=1e-6)
    assert torch.equal(rows[:, 2:], features[0, :, 2:])


@pytest.mark.parametrize("n_keep", [1, N, N + 3, 30])
def test_framefusion_merges_first_and_then_drops_the_least_attended(n_keep):
    features = clip(6)
    tokens, method = watched(features), build("framefusion:similarity=0.9")
    near = torch.cosine_similarity(features[0, 1:], features[0, :-1], dim=-1)
    alike = [(float(near[t, i]), t + 1, i) for t in range(T - 1) for i in range(N) if near[t, i] >= 0.9]
    merged = {t * N + i for _, t, i in sorted(alike, reverse=True)[: T * N - n_keep]}
    rest = [i for i in range(T * N) if i not in merged]
    attention = tokens.signals[ATTENTION].flatten()
    want = sorted(sorted(rest, key=lambda i: -float(attention[i]))[:n_keep])
    out = method.select(tokens, n_keep)
    assert out.keep[0].nonzero()[:, 0].tolist() == want
    alone = build("framefusion:similarity=0.9:faithful=true").select(tokens, n_keep)
    assert alone.keep[0].nonzero()[:, 0].tolist() == rest


def test_framefusion_computes_the_sparsity_of_a_layer_from_the_cost_of_all():
    method = build("framefusion")
    assert method.paper_ratio(0.3, []) == pytest.approx(0.7)
    assert method.paper_ratio(0.5, [0.5], n_layers=4) == pytest.approx(0)  # 2 layers' worth: 0.5, and 3 of 0.5
    assert method.paper_ratio(0.3, [0.5], n_layers=4) == pytest.approx(1 - 0.7 / 1.5)
    assert method.paper_ratio(0.1, [0.0, 0.0, 0.0]) == 1  # it has cost more already


# ---- all of them


OF_FRAMES = ("dycoke", "dycoke:k=none", "evs", "fastvid", "framefusion", "vidcom2", "random:split=query")


@pytest.mark.parametrize("spec", OF_FRAMES)
def test_no_method_makes_a_tensor_that_grows_with_the_square_of_the_frames(spec, monkeypatch):
    """The largest tensor of twice the frames is twice as large at most."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for found in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(found, torch.Tensor) and found.numel() == found.untyped_storage().nbytes() // max(
                    found.element_size(), 1
                ):
                    self.n = max(self.n, found.numel())
            return out

    method, largest = build(spec), []
    for n_frames in (16, 32):
        features = torch.randn(1, n_frames, N, WIDTH)
        text = {TEXT: torch.randn(1, 3, WIDTH)}
        needed = {s: torch.rand(1, 1, n_frames * N) for s in method.needs(Tower(4, False)) if s != TEXT}
        with Largest() as seen:
            method.select(video(features, text | needed), n_frames * N // 4)
        largest.append(seen.n)
    assert largest[1] <= 2.1 * largest[0]
    assert largest[1] <= 3 * 32 * N * WIDTH
