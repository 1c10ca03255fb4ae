"""HoloV: every stripe of the picture gets a quota by its mean attention."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ..core import ops
from ..core.lazy import torch
from ..core.signals import Kind, Signal, Tower
from ..core.tokens import Count, VisualTokens
from .base import Method, cls_values, late_layer
from .crops import rearranged

if TYPE_CHECKING:
    from torch import Tensor

SCALE = 1000 * 1.09  # of the scores of all but stripes of one token, in the authors' code


@dataclass(frozen=True)
class HoloV(Method):
    """The budget is split over stripes by their mean attention; within a stripe the most attended tokens stay.

    A stripe is a run of tokens in raster order, all as long but for one token. The paper also scores tokens
    by the variance of their similarities. In the code that term has no effect: it is scaled to the mean attention of
    its stripe, which makes all quotas 9 % larger before they are shares, and attention alone ranks within a stripe. So
    it is left out here.

    Source:   "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention",
              arXiv:2510.02912; code: obananas/HoloV@1d2e65e.
    Faithful: quotas, kept sets and order agree with the authors' code, with faithful=True (golden cases holov).
    Differs:  the exact budget by largest remainder; what a stripe cannot take goes to the others. The code gives what
              truncation leaves to the stripes with the most attention, and zeros in place of tokens beyond a stripe's
              size; it weighs a stripe of one token a thousandfold less, and orders tokens by stripe and attention.
              faithful=True does so, without the zeros.
    Needs:    CLS_ROW (or RECEIVED) of one layer. Text-agnostic. Cost: O(N).

    Args:
        stripes: how many, of all tokens of an image; as many as tokens at most.
        power: of a stripe's mean attention in its quota.
        layer: vision layer, absolute or negative from the end. None is the one before the last, and the last one where
            the tower has no [CLS].
        faithful: quotas and order as the authors' code has them.
    """

    stripes: int = 16
    power: float = 1.0
    layer: int | None = None
    faithful: bool = False

    limits: ClassVar = {"stripes": (1, 1e6), "power": (0, 100)}
    source: ClassVar[str] = "arXiv:2510.02912"

    @property
    def count(self) -> Count:
        """Quotas beyond a stripe's size are lost in the code."""
        return Count.CONTENT if self.faithful else Count.EXACT

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({Signal(Kind.CLS_ROW if tower.has_cls else Kind.RECEIVED, (late_layer(tower, self.layer),))})

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        attention, stripe = cls_values(tokens)[:, 0], self._stripe_of(tokens)
        quotas = self.quotas(tokens, n_keep)
        chosen = replace(tokens, keep=ops.keep_top_of_parts(attention, stripe, quotas), scores=attention)
        return rearranged(chosen, self._paper_order(chosen, quotas)) if self.faithful else chosen

    def quotas(self, tokens: VisualTokens, n_keep: int) -> Tensor:
        """(G, stripes) int64: how many tokens each may keep; with faithful, more than it has at times."""
        attention, stripe = cls_values(tokens)[:, 0].double(), self._stripe_of(tokens)
        sizes = stripe_sizes(tokens.n_visual, self.stripes)
        lengths = ops.on_device(sizes, attention.device)
        means = attention.new_zeros(len(attention), len(sizes)).index_add(1, stripe, attention) / lengths
        if not self.faithful:
            return ops.allocate(means.clamp(min=0).pow(self.power), sizes, n_keep)
        weights = torch.where(lengths > 1, means * SCALE, means).pow(self.power)
        whole = (weights / weights.sum(1, keepdim=True) * n_keep).floor().long()
        rank = weights.argsort(dim=1, descending=True, stable=True).argsort(1)
        return whole + (rank < n_keep - whole.sum(1, keepdim=True))

    def _stripe_of(self, tokens: VisualTokens) -> Tensor:
        """(N,) int64."""
        sizes = stripe_sizes(tokens.n_visual, self.stripes)
        return ops.on_device([place for place, size in enumerate(sizes) for _ in range(size)], tokens.keep.device)

    def _paper_order(self, tokens: VisualTokens, quotas: Tensor) -> Tensor:
        """(G, N): kept tokens by stripe and falling attention, those of whole stripes as they lie; then the others."""
        n, stripe = tokens.n_visual, self._stripe_of(tokens)
        lengths = ops.on_device(stripe_sizes(n, self.stripes), stripe.device)
        rank = cls_values(tokens)[:, 0].argsort(dim=1, descending=True, stable=True).argsort(1)
        place = torch.where((quotas >= lengths)[:, stripe], torch.arange(n, device=stripe.device), rank)
        return (stripe * n + place).masked_fill(~tokens.keep, n * n).argsort(dim=1, stable=True)


@functools.lru_cache(maxsize=256)
def stripe_sizes(n: int, n_stripes: int) -> tuple[int, ...]:
    """Tokens of every stripe; the first ones have one more."""
    n_stripes = min(n_stripes, n)
    return tuple(n // n_stripes + (i < n % n_stripes) for i in range(n_stripes))
