"""DAMRO's outliers as a filter: the strongest [CLS] attention may lie on background."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..core import ops
from ..core.signals import Signal, Tower
from ..core.tokens import VisualTokens
from .base import Filter, WithoutCLS, cls_signal, cls_values

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DAMROFilter(Filter):
    """Drop the tokens that [CLS] attends to most, before a score method selects: ["damro_filter", "vtc_cls"].

    The attention is that of one head over the full width, in the last vision layer. In every crop the `n_outliers`
    strongest tokens go.

    Source:   "DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination", arXiv:2410.04514;
              code: coder-gx/DAMRO@ed68d51.
    Faithful: to which tokens count as outliers.
    Differs:  the paper decodes against these tokens and keeps all; as a filter this is ours.
    Needs:    CLS_ROW (one head) of one layer. Text-agnostic. Cost: O(N).

    Args:
        n_outliers: tokens of a crop to drop, 10 of 576 in the paper; None is that share of the crop.
        layer: vision layer, absolute or negative from the end. None is the last one.
        without_cls: what to do where the tower has no [CLS] token: "error", or "received" for what tokens receive.
    """

    n_outliers: int | None = None
    layer: int | None = None
    without_cls: WithoutCLS = "error"

    limits: ClassVar = {"n_outliers": (0, 1e6)}
    source: ClassVar[str] = "arXiv:2410.04514"
    if_missing: ClassVar[str] = "without_cls=received"

    def needs(self, tower: Tower) -> frozenset[Signal]:
        layers = ((tower.default_layer(-1) if self.layer is None else tower.layer(self.layer)),)
        return frozenset({cls_signal(tower, layers, self.without_cls, heads="single")})

    def passes(self, tokens: VisualTokens) -> Tensor:
        sizes = tokens.layout.crop_sizes
        wanted = [round(n * 10 / 576) if self.n_outliers is None else min(self.n_outliers, n) for n in sizes]
        row = cls_values(tokens, "single")[:, 0]
        counts = ops.on_device(wanted, row.device).expand(len(row), -1)
        return ~ops.keep_top_of_parts(row, ops.on_device(tokens.layout.crop_places, row.device), counts)
