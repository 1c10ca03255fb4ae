"""VTC-CLS: keep the visual tokens that the vision tower's [CLS] token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..core.errors import OptionError
from ..core.signals import Signal, Tower
from ..core.tokens import VisualTokens
from .base import RankMethod, WithoutCLS, cls_signal, cls_values

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VTCCLS(RankMethod):
    """Keep what [CLS] attends to, summed over several vision layers.

    s_i = sum over layers l = start_layer .. L-2 of mean_h A_l[h, CLS, i]. The last layer is left out:
    LLaVA reads the output of the one before it. The single layer L-2, every crop by itself, is FasterVLM (alias
    `fastervlm`).

    Source:   "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs", arXiv:2412.05819;
              code: THU-MIG/VTC-CLS@e41ac9b. FasterVLM: arXiv:2412.01818v1.
    Faithful: scores, kept sets and counts agree with the authors' code (golden cases vtc_cls, fastervlm).
    Differs:  works at any batch size; float32 scores where the authors' are half precision; equal scores go
              to the lower index; selects after the projector, which for a per-token MLP changes nothing.
    Needs:    CLS_ROW. Text-agnostic. Cost: O(H N d) a layer, no N x N product.

    Args:
        start_layer: first layer of the sum, absolute or negative from the end. None is the authors' 16 of 24,
            scaled to this tower's depth. -2 is the last layer of the sum alone. Start with None.
        without_cls: what to do where the tower has no [CLS] token (SigLIP): "error", or "received" to score
            by the attention a token receives in the same layers, which is another method's idea.
    """

    start_layer: int | None = None
    without_cls: WithoutCLS = "error"

    source: ClassVar[str] = "arXiv:2412.05819"
    if_missing: ClassVar[str] = "without_cls=received"

    def needs(self, tower: Tower) -> frozenset[Signal]:
        last = tower.default_layer(-2)
        start = self._start(tower, last)
        if start > last:
            raise OptionError(
                f"start_layer={self.start_layer} is layer {start}, after layer {last}, the last one summed; "
                f"use start_layer={last} for that layer alone"
            )
        return super().needs(tower) | {cls_signal(tower, tower.layers_from(start, last), self.without_cls)}

    def _start(self, tower: Tower, last: int) -> int:
        if self.start_layer is None:
            return min(tower.scaled(16, 24), last)
        if self.start_layer == -2:  # the last one summed, also where layer -2 itself attends within windows
            return last
        return tower.layer(self.start_layer)

    def score(self, tokens: VisualTokens) -> Tensor:
        return cls_values(tokens).sum(1)
