"""LLaVA-PruMerge: keep the outliers of the [CLS] attention, each with its neighbours merged into it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ..core import ops
from ..core.layout import Layout
from ..core.lazy import F, torch
from ..core.signals import Kind, Signal, Tower
from ..core.tokens import Count, VisualTokens
from ..cost.flops import Ops
from ..cost.selection import Widths
from .base import Method, WithoutCLS, cls_signal, cls_values
from .crops import crop_by_crop, in_order

if TYPE_CHECKING:
    from torch import Tensor

N_NEIGHBOURS = 32


@dataclass(frozen=True)
class PruMerge(Method):
    """Keep the outliers of the [CLS] attention, add to each its neighbours, and pool the dropped ones in one token.

    a is the [CLS] attention of one head over the full width. The share of IQR outliers of a in the image is the
    ratio r; every crop keeps its int(N r) most attended tokens, x_i + sum of a_j x_j over the 32 nearest by the
    cosine of keys, in descending order of a, followed by the sum of a_j x_j over all dropped tokens.

    Source:   "LLaVA-PruMerge", arXiv:2403.15388; code: 42Shawn/LLaVA-PruMerge@097c041.
    Faithful: counts, order and merged tokens agree with the authors' code (golden cases prumerge).
    Differs:  the ratio is taken over one image, where the code takes it over a batch. Where the model folds several
              patches into a token, rows of the language model are merged.
    Needs:    CLS_ROW (one head) and KEYS of one layer. Text-agnostic. Cost: O(N^2 d).

    Args:
        adaptive: outliers decide how many tokens stay, without a budget; otherwise the budget, pooled ones included.
        layer: vision layer, absolute or negative from the end. None is the last one.
        without_cls: what to do where the tower has no [CLS] token: "error", or "received" for what tokens receive.
    """

    adaptive: bool = True
    layer: int | None = None
    without_cls: WithoutCLS = "error"

    counts_by_crop: ClassVar[bool] = False  # whether no two crops need keep as many with the same ratio
    keeps_features: ClassVar[bool] = False
    space: ClassVar = "tower"
    source: ClassVar[str] = "arXiv:2403.15388"
    if_missing: ClassVar[str] = "without_cls=received"
    if_budget: ClassVar[str] = "adaptive=false"

    @property
    def takes_budget(self) -> bool:
        return not self.adaptive

    @property
    def count(self) -> Count:
        return Count.CONTENT if self.adaptive else Count.EXACT

    def needs(self, tower: Tower) -> frozenset[Signal]:
        layers = ((tower.default_layer(-1) if self.layer is None else tower.layer(self.layer)),)
        return frozenset({cls_signal(tower, layers, self.without_cls, heads="single"), Signal(Kind.KEYS, layers)})

    def cost(self, layout: Layout, n_keep: int, widths: Widths) -> Ops:
        """Cosines to kept keys, and the pooled token; the sums over neighbours are no matrix products."""
        sizes = layout.crop_sizes
        kept = ops.shares(sizes, n_keep, even=not self.adaptive)
        pairs = [(n, k - 1) for n, k in zip(sizes, kept, strict=True) if k]
        return Ops(sum(k * n * widths.keys + n * widths.rows for n, k in pairs))

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        """Every crop by itself, with the image's ratio or an even share of the budget."""
        if not self.adaptive:
            return crop_by_crop(tokens, ops.shares(tokens.layout.crop_sizes, n_keep, even=True), self._fixed)
        ratio = ops.outliers(cls_values(tokens, "single")[:, 0]).double().mean(1)
        if len(tokens.features) > 1:  # as many tokens as the picture says: no two need have the same number
            parts = [self.select(_image(tokens, i), 0) for i in range(len(tokens.features))]
            return replace(
                tokens,
                features=torch.cat([p.features for p in parts]),
                keep=torch.cat([p.keep for p in parts]),
            )
        share = float(ratio)
        return crop_by_crop(
            tokens,
            tokens.layout.crop_sizes,
            lambda crop, n: self._merged(crop, int(n * share), share),
            apart=self.counts_by_crop,
        )

    def _fixed(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        return self._merged(tokens, n_keep - 1, n_keep / tokens.n_visual)

    def _merged(self, tokens: VisualTokens, n_top: int, ratio: float) -> VisualTokens:
        """Keep `n_top` tokens and the pooled one."""
        chosen = self.chosen(cls_values(tokens, "single")[:, 0], n_top, ratio)
        rows = merged(tokens, chosen)
        keep = torch.zeros_like(tokens.keep).scatter(1, chosen, True)
        if chosen.shape[1] == tokens.n_visual:  # nothing was dropped, so nothing is pooled
            return in_order(tokens, keep, rows[:, :-1])
        # The pooled token takes the place of the last dropped one.
        places = torch.arange(tokens.n_visual, device=keep.device)
        last = ops.keep_top(places.masked_fill(keep, -1).float(), 1)
        return in_order(tokens, keep.scatter(1, last, True), rows)

    def chosen(self, attention: Tensor, n_top: int, ratio: float) -> Tensor:
        """Indices of the kept tokens in the code's order, (G, K)."""
        return attention.argsort(dim=1, descending=True, stable=True)[:, :n_top]


def merged(tokens: VisualTokens, chosen: Tensor) -> Tensor:
    """(G, K + 1, D) float32: chosen tokens with their neighbours, then what was dropped, pooled."""
    n, attention = tokens.n_visual, cls_values(tokens, "single")[:, 0]
    x, keys = tokens.features.float(), tokens.signal(Kind.KEYS)[:, 0].flatten(2)
    unit = F.normalize(keys, dim=-1)
    parts = chosen.split(max(1, ops.LARGEST // (len(x) * n)), 1)
    near = torch.cat([_neighbours(unit, part, min(N_NEIGHBOURS, n - 1)) for part in parts], 1)
    around = _weighted_sums(x, near, attention)
    dropped = attention.scatter(1, chosen, 0.0)[:, None] @ x
    return torch.cat([ops.take(x, chosen) + around, dropped], 1)


def _neighbours(unit: Tensor, chosen: Tensor, n_most: int) -> Tensor:
    """(G, K, n_most): the rows of (G, N, D) that are nearest to those at (G, K)."""
    near = ops.take(unit, chosen) @ unit.transpose(1, 2)
    near = near.scatter(2, chosen[..., None], -torch.inf)  # no token is its own neighbour
    return near.topk(n_most, dim=2).indices


def _weighted_sums(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """(G, K, D): sums of rows of (G, N, D) at (G, K, m) by their weights (G, N); no (G, K, m, D) is made."""
    n_images, n_sums, n_rows = index.shape
    if not n_sums or not n_rows:
        return x.new_zeros(n_images, n_sums, x.shape[2])
    image = torch.arange(n_images, device=x.device)[:, None, None] * x.shape[1]
    at = (index + image).view(-1, n_rows)
    by = weights.flatten()[at].to(x.dtype)
    return F.embedding_bag(at, x.flatten(0, 1), per_sample_weights=by, mode="sum").view(n_images, n_sums, -1)


def _image(tokens: VisualTokens, i: int) -> VisualTokens:
    signals = {s: values[i : i + 1] for s, values in tokens.signals.items()}
    return replace(tokens, features=tokens.features[i : i + 1], keep=tokens.keep[i : i + 1], signals=signals)
