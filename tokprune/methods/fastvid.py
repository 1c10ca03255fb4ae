"""FastVID: cut a video into segments; keep what is attended to, and merge the rest around a few tokens of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from ..core import ops
from ..core.layout import Layout
from ..core.lazy import F, torch
from ..core.signals import Signal, Tower
from ..core.tokens import Count, VisualTokens
from ..cost.flops import Ops
from ..cost.selection import Widths
from .base import Method, cls_signal, cls_values
from .frames import by_frame, frame_means, frame_similarity, top_by_frame

if TYPE_CHECKING:
    from torch import Tensor

N_NEAREST = 4  # of the density, the token itself among them
FEW = 512  # centres of all images that are compared with every frame


class Segments(NamedTuple):
    """Segments of a video, as (G, T) int64: which one a frame is in, its place there, and how many frames it has."""

    number: Tensor
    place: Tensor
    length: Tensor

    @property
    def behind(self) -> Tensor:
        """Frames of the segment after this one."""
        return self.length - 1 - self.place

    def spread(self, total: Tensor) -> Tensor:
        """Each segment's total, evenly over its frames; the remainder goes to the first ones."""
        return total // self.length + (self.place < total % self.length)

    def spread_over_every(self, total: Tensor, every: int) -> Tensor:
        """The same over every so many-th frame, counted from the last one, which takes the remainder first."""
        n_groups = (self.length - 1) // every + 1
        share = total // n_groups + (self.behind // every < total % n_groups)
        return torch.where(self.behind % every == 0, share, 0)


@dataclass(frozen=True)
class FastVID(Method):
    """Keep the most attended tokens of every frame, and density peaks of every p-th frame with the rest merged in.

    The video is cut where neighbouring frames are least alike: in `segments` at least, and wherever their cosine is
    below `tau`. Of the budget, `contextual` goes to centres, in every `every`-th frame counted from the end of its
    segment; the rest goes to salient tokens, evenly over frames. A centre has many near tokens and no denser one near
    it. The centres of a frame take up all tokens of the segment that are not salient, each the nearest by cosine: a
    centre becomes w x + (1 - w) mean of its m tokens, w = max(beta, 1 / (m + 1)).

    Source:   "FastVID: Dynamic Density Pruning for Fast Video Large Language Models", arXiv:2503.11187; code:
              LunarShen/FastVID@a40a109.
    Faithful: segments, counts, kept sets and merged tokens agree with the authors' code, given its attention and its
              descriptors of frames (golden cases fastvid), with rule=llava_onevision, llava_video or qwen2_5_vl: the
              code has a rule for each, and all but llava_video keep fewer tokens than asked for.
    Differs:  rule=exact meets the budget: salient tokens and centres are shared as by llava_video, over the whole video
              by largest remainder. A video may be shorter than `segments`, where the code fails. Equal densities go to
              the lower index, where the code adds noise. A frame is described by the mean of its rows, as the code for
              Qwen has it; the others use a pooling head that the towers of transformers leave out. Attention of towers
              without [CLS] is what a token receives in its frame. Where features of deeper tower layers are added
              later, merged tokens get those of their own place. A picture is one frame.
    Needs:    CLS_ROW or RECEIVED of the last layer. Text-agnostic. Cost: O(n N D + K N D) for n tokens a
              frame and K centres of a segment. Every frame with centres takes up all tokens of its segment, so one
              segment costs the square of its frames, and several the sum of theirs.

    Args:
        rule: how the budget is spent: "exact", or as the authors' code for one of three models.
        segments: least number of segments, 1 and more.
        tau: cosine of neighbouring frames, -1 to 1, below which the video is cut; the code has 0.84 for Qwen.
        contextual: share of the budget that goes to centres, 0..1.
        every: distance of frames with centres.
        beta: least weight of a centre among what it takes up, 0..1.
        ignore: with rule=qwen2_5_vl, the cosine from which on a frame leaves its share to the next.
        layer: vision layer, absolute or negative from the end. None is the last one.
        ratio: with a rule of the authors, the ratio to keep as the paper takes it; None is the budget's.
    """

    rule: Literal["exact", "llava_onevision", "llava_video", "qwen2_5_vl"] = "exact"
    segments: int = 8
    tau: float = 0.9
    contextual: float = 0.4
    every: int = 4
    beta: float = 0.6
    ignore: float = 0.95
    layer: int | None = None
    ratio: float | None = None

    keeps_features: ClassVar[bool] = False
    limits: ClassVar = {
        "segments": (1, 10_000),
        "tau": (-1, 1),
        "contextual": (0, 1),
        "every": (1, 10_000),
        "beta": (0, 1),
        "ignore": (-1, 1),
        "ratio": (0, 1),
    }
    source: ClassVar[str] = "arXiv:2503.11187"
    cpu_rate: ClassVar[float] = 200e9  # frames of one segment are compared in fewer products

    @property
    def count(self) -> Count:
        """The rules of the authors round down, and lose what does not fit into a frame."""
        return Count.EXACT if self.rule == "exact" else Count.CONTENT

    def min_keep(self, layout: Layout) -> int:
        """The rules of the authors count tokens a frame."""
        return 1 if self.rule == "exact" else layout.frames[0]

    def needs(self, tower: Tower) -> frozenset[Signal]:
        layer = tower.default_layer(-1) if self.layer is None else tower.layer(self.layer)
        return frozenset({cls_signal(tower, (layer,), "received")})

    def cost(self, layout: Layout, n_keep: int, widths: Widths) -> Ops:
        """Distances inside frames, twice; products of centres with all tokens, and their sums."""
        n_frames, n = layout.frames
        n_centres = self.most_centres(n_frames, n, n_keep)
        return Ops((2 * n * n * n_frames + 2 * n_centres * n_frames * n) * widths.rows)

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        return self.around(tokens, frame_means(tokens), n_keep)

    def around(self, tokens: VisualTokens, descriptors: Tensor, n_keep: int) -> VisualTokens:
        """As `select`, with descriptors (G, T, D) of frames."""
        salient, centres = self.chosen(tokens, frame_similarity(descriptors), n_keep)
        n_frames, n = tokens.layout.frames
        merged = self.merged(tokens, salient, centres, descriptors, self.most_centres(n_frames, n, n_keep))
        return replace(tokens, keep=(salient | centres).flatten(1), features=merged)

    # ---- what is kept

    def cuts(self, similarity: Tensor) -> Tensor:
        """(G, T - 1) bool: whether a segment ends with a frame, from the cosine of it and the next."""
        n_cuts = min(self.segments - 1, similarity.shape[1])
        lowest = similarity.argsort(dim=1, stable=True).argsort(1) < n_cuts
        return lowest | (similarity < self.tau)

    def segmented(self, similarity: Tensor) -> Segments:
        """The segments, from cosines (G, T - 1)."""
        begins = F.pad(self.cuts(similarity), (1, 0), value=True)
        number = begins.cumsum(1) - 1
        length = torch.zeros_like(number).scatter_add(1, number, torch.ones_like(number)).gather(1, number)
        at = torch.arange(number.shape[1], device=number.device).expand_as(number)
        return Segments(number, at - torch.where(begins, at, 0).cummax(1).values, length)

    def chosen(self, tokens: VisualTokens, similarity: Tensor, n_keep: int) -> tuple[Tensor, Tensor]:
        """(G, T, n) bool each: salient tokens, and centres."""
        attention = cls_values(tokens)[:, 0].unflatten(1, tokens.layout.frames)
        n_salient, n_centres = self.counts(similarity, attention.shape[2], n_keep)
        salient = top_by_frame(attention, n_salient)
        peaks = density_peaks(by_frame(tokens), ~salient)
        return salient, top_by_frame(peaks, n_centres) & ~salient

    def counts(self, similarity: Tensor, n: int, n_keep: int) -> tuple[Tensor, Tensor]:
        """(G, T) each: salient tokens and centres of every frame, of `n` tokens."""
        of = self.segmented(similarity)
        if self.rule == "exact":
            return self._exact(of, n, n_keep)
        a_frame = self.tokens_a_frame(of.length.shape[1], n, n_keep)
        if self.rule == "llava_onevision":
            return self._of_onevision(of, n, a_frame)
        centres = (a_frame * of.length.double() * self.contextual).long()
        if self.rule == "llava_video":
            return of.spread(a_frame * of.length - centres), of.spread_over_every(centres, self.every)
        return self._of_qwen(of, n, a_frame * of.length, centres.clamp(min=1), similarity)

    def _exact(self, of: Segments, n: int, n_keep: int) -> tuple[Tensor, Tensor]:
        """Salient tokens evenly; a segment's share of the centres, by its length, in every so many-th frame."""
        n_frames, n_centres = of.length.shape[1], int(self.contextual * n_keep)
        salient = ops.shares((n,) * n_frames, n_keep - n_centres, even=True)
        n_groups = (of.length - 1) // self.every + 1
        weights = torch.where(of.behind % self.every == 0, of.length.double() / n_groups, 0.0)
        centres = ops.allocate(weights, [n - own for own in salient], n_centres)
        return ops.on_device(salient, centres.device).expand_as(centres), centres

    def _of_onevision(self, of: Segments, n: int, a_frame: int) -> tuple[Tensor, Tensor]:
        """Every frame alike; what a segment's centres do not share evenly is lost."""
        own = int(a_frame * self.contextual)
        n_groups = (of.length - 1) // self.every + 1
        centres = torch.where(of.behind % self.every == 0, own * of.length // n_groups, 0)
        return torch.full_like(centres, a_frame - own), centres.clamp(max=n - a_frame + own)

    def _of_qwen(
        self, of: Segments, n: int, total: Tensor, centres: Tensor, similarity: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A frame like the next one leaves its share to it; what is too much for a frame is lost."""
        leaves = F.pad(similarity >= self.ignore, (0, 1)) & (of.behind > 0)
        salient = _left_to_the_last(of.spread(total - centres), leaves)
        centres = _left_to_the_last(of.spread_over_every(centres, self.every), leaves).clamp(max=n // 2)
        return salient.minimum(n - centres), centres

    def tokens_a_frame(self, n_frames: int, n: int, n_keep: int) -> int:
        """As the authors count them: the ratio rounded down."""
        return n_keep // n_frames if self.ratio is None else int(n * self.ratio)

    def most_centres(self, n_frames: int, n: int, n_keep: int) -> int:
        """Centres of a video at most, known without its features."""
        if self.rule == "exact":
            return int(self.contextual * n_keep)
        return min(n_frames * n, n_frames * (1 + int(self.tokens_a_frame(n_frames, n, n_keep) * self.contextual)))

    # ---- what is merged

    def merged(self, tokens: VisualTokens, salient: Tensor, centres: Tensor, descriptors: Tensor, most: int) -> Tensor:
        """The features, (G, N, D), with centres that have taken up the rest of their segment."""
        if not most:
            return tokens.features
        number = self.segmented(frame_similarity(descriptors)).number
        at = centres.flatten(1).int().argsort(dim=1, descending=True, stable=True)[:, :most]  # padded with others
        there = centres.flatten(1).gather(1, at)
        n_frames, n = tokens.layout.frames
        frame = torch.where(there, at // n, n_frames)  # a centre belongs to a frame, padding to none
        own, rows = ops.take(tokens.features, at).float(), tokens.features.unflatten(1, (n_frames, n))
        unit, segment = F.normalize(own, dim=-1), number.gather(1, at // n)
        sums, sizes = torch.zeros_like(own), torch.zeros_like(own[..., 0])
        places = torch.arange(most, device=at.device)
        for images, t, some in _centres_of_frames(number, segment, there):
            x, of = rows[images, t].float(), frame[images, some]
            takes = (segment[images, some] == number[images, t : t + 1]) & there[images, some]
            takes = takes[:, None] & ~salient[images, t, :, None]
            if self.rule != "llava_onevision":
                takes = takes & ~(centres[images, t, :, None] & (of == t)[:, None])
            near = F.normalize(x, dim=-1) @ unit[images, some].transpose(1, 2)
            near = near.masked_fill(~takes, -torch.inf)  # (images, n, centres)
            best = _first_best_of_groups(near, of, n_frames + 1, places[: near.shape[2]]) & takes
            joins = best.float()
            sums[images, some] += joins.transpose(1, 2) @ x
            sizes[images, some] += joins.sum(1)
        weight = (1 / (sizes + 1)).clamp(min=self.beta)[..., None]
        merged = weight * own + (1 - weight) * sums / sizes.clamp(min=1)[..., None]
        return ops.put(tokens.features, at, torch.where((there & (sizes > 0))[..., None], merged, own))


def _centres_of_frames(number: Tensor, segment: Tensor, there: Tensor) -> Iterator[tuple[slice, int, slice]]:
    """Images, a frame of theirs, and the centres that may take it up: of a few, or on a device, any of the video.

    Of many on a CPU those of its segment, which follow each other: nothing is compared across segments.

    Args:
        number: (G, T), the segment of every frame.
        segment: (G, K), of every centre, ascending.
        there: (G, K), false for padding, which comes last.
    """
    n_images, n_frames = number.shape
    every = slice(0, n_images)
    if segment.numel() <= FEW or number.device.type != "cpu":
        yield from ((every, t, slice(0, segment.shape[1])) for t in range(n_frames))
        return
    for i in range(n_images):
        own = segment[i, : int(there[i].sum())]
        begins, ends = (torch.searchsorted(own, number[i], right=side).tolist() for side in (False, True))
        for t in range(n_frames):
            if begins[t] < ends[t]:
                yield slice(i, i + 1), t, slice(begins[t], ends[t])


def _left_to_the_last(counts: Tensor, leaves: Tensor) -> Tensor:
    """(G, T): counts of a run of frames that leave their share to the next are those of its last frame."""
    run = F.pad(~leaves, (1, 0))[:, :-1].cumsum(1)
    total = torch.zeros_like(counts).scatter_add(1, run, counts).gather(1, run)
    return torch.where(leaves, 0, total)


def _first_best_of_groups(values: Tensor, group: Tensor, n_groups: int, places: Tensor) -> Tensor:
    """(G, n, K) bool: in every row the highest value of each group (G, K); the first of equals."""
    shape = (*values.shape[:2], n_groups)
    index = group[:, None].expand_as(values)
    most = values.new_full(shape, -torch.inf).scatter_reduce(2, index, values, "amax")
    place = torch.where(values == most.gather(2, index), places, len(places))
    first = place.new_full(shape, len(places)).scatter_reduce(2, index, place, "amin")
    return places == first.gather(2, index)


def density_peaks(frames: Tensor, candidates: Tensor) -> Tensor:
    """How much a token is the middle of a cluster of its frame, (G, T, n) float32, -inf for no candidate.

    The logarithm of density x distance: density exp(-mean of the 4 least squared distances / D), the token itself among
    them; distance to the nearest denser candidate, of the densest one the largest of the frame.

    Args:
        frames: (G, T, n, D).
        candidates: (G, T, n) bool.
    """
    found = [_density_peaks(x.float(), own) for x, own in _some_frames(frames.flatten(0, 1), candidates.flatten(0, 1))]
    return torch.cat(found).view(candidates.shape)


def _some_frames(frames: Tensor, candidates: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    at_once = max(1, ops.LARGEST // max(1, frames[0].numel(), frames.shape[1] ** 2))
    return zip(frames.split(at_once), candidates.split(at_once), strict=True)


def _density_peaks(x: Tensor, candidates: Tensor) -> Tensor:
    """As above, of (F, n, D) and (F, n)."""
    n, order = x.shape[1], torch.arange(x.shape[1], device=x.device)
    at_once = max(1, ops.LARGEST // (len(x) * n))
    blocks = list(order.split(at_once))
    sparse, largest = [], []
    for rows in blocks:
        apart = _squared_distances(x, rows, candidates)
        near = apart.topk(min(N_NEAREST, n), dim=2, largest=False).values
        known = near.isfinite()
        sparse.append(near.masked_fill(~known, 0).sum(2) / known.sum(2).clamp(min=1))
        inside = apart.isfinite() & candidates[:, rows, None]
        largest.append(apart.masked_fill(~inside, 0).amax((1, 2)))
    spread, most = torch.cat(sparse, 1), torch.stack(largest).amax(0)  # (F, n), (F,)
    peaks = []
    for rows in blocks:
        apart = _squared_distances(x, rows, candidates)
        own, others = spread[:, rows, None], spread[:, None]
        is_denser = (others < own) | ((others == own) & (order < rows[:, None]))
        nearest = apart.masked_fill(~is_denser, torch.inf).amin(2)
        nearest = torch.where(nearest.isfinite(), nearest, most[:, None])
        peaks.append(nearest.clamp(min=1e-30).log() / 2 - spread[:, rows])
    return torch.cat(peaks, 1).masked_fill(~candidates, -torch.inf)


def _squared_distances(x: Tensor, rows: Tensor, candidates: Tensor) -> Tensor:
    """(F, rows, n): of some rows of (F, n, D) to all, by the width; inf to what is no candidate, 0 to themselves."""
    length = x.square().sum(-1)
    apart = length[:, rows, None] + length[:, None] - 2 * x[:, rows] @ x.transpose(1, 2)
    itself = rows[:, None] == torch.arange(x.shape[1], device=x.device)
    apart = (apart.clamp(min=0) / x.shape[2]).masked_fill(itself, 0)
    return apart.masked_fill(~candidates[:, None], torch.inf)
