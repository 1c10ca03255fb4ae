"""HiPrune: a few anchors of a middle layer with their neighbours, the rest by attention of a late layer."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ..core import ops
from ..core.errors import OptionError
from ..core.layout import Layout
from ..core.lazy import torch
from ..core.signals import Kind, Signal, Tower
from ..core.tokens import VisualTokens
from .base import Method, Split, late_layer
from .crops import crop_by_crop

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HiPrune(Method):
    """Anchors by attention received in a middle layer, their four neighbours, and then attention of a late layer.

    Of K tokens of a crop, alpha K / 5 are anchors, rounded half to even, and may be none. What a token receives is the
    mean over all queries, the one of [CLS] among them.

    Source:   "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
              arXiv:2508.00553; code: Danielement321/HiPrune@6e83a12. The port: Tencent/AngelSlim@67394ce.
    Faithful: scores, anchors, neighbours and kept sets agree with the authors' code, and with the port for
              variant=angelslim, with faithful=True (golden cases hiprune).
    Differs:  neighbours outside of the crop do not exist; the code's wrap into the row before or after, or become the
              first or last token (faithful=True). A budget too small for all neighbours keeps the anchors first.
              The middle layer is 9 of 24, or 16 of 32 where the tower has no [CLS], scaled to this tower's depth.
    Needs:    RECEIVED of two layers (CLS_ROW for variant=angelslim). Text-agnostic. Cost: O(H N^2 d) for the signals.

    Args:
        alpha: share of the kept tokens that anchors and their neighbours make up, 0..1.
        variant: "angelslim" as that port has it: what [CLS] attends to, the softmax over patches alone, and at least
            one anchor of 5 tokens or more.
        layer: vision layer of the anchors, absolute or negative from the end.
        late: that of the other tokens. None is the one before the last, and the last one where the tower has no [CLS].
        split: "even" gives every crop the same share, as the code; "joint" looks at all tokens of an image together.
        faithful: neighbours as the authors' code has them.
    """

    alpha: float = 0.1
    variant: Literal["authors", "angelslim"] = "authors"
    layer: int | None = None
    late: int | None = None
    split: Split = "even"
    faithful: bool = False

    limits: ClassVar = {"alpha": (0, 1)}
    source: ClassVar[str] = "arXiv:2508.00553"

    def needs(self, tower: Tower) -> frozenset[Signal]:
        late = late_layer(tower, self.late)
        default = tower.scaled(8, 24) if tower.has_cls else tower.scaled(15, 32)
        middle = min(default, late) if self.layer is None else tower.layer(self.layer)
        if middle > late:
            raise OptionError(f"layer is layer {middle}, after late, layer {late}; use a layer up to {late}")
        layers = tuple(sorted({middle, late}))
        if not tower.has_cls:
            return frozenset({Signal(Kind.RECEIVED, layers)})
        if self.variant == "angelslim":
            return frozenset({Signal(Kind.CLS_ROW, layers, special="none")})
        return frozenset({Signal(Kind.RECEIVED, layers, special="both")})

    def n_anchors(self, n_keep: int) -> int:
        """How many of the kept tokens are anchors."""
        least = int(self.variant == "angelslim" and n_keep >= 5 and self.alpha > 0)
        return max(round(n_keep * self.alpha / 5), least)

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        if self.split == "joint" or len(tokens.layout.crops) == 1:
            return self._chosen(tokens, n_keep)
        # The authors' neighbours depend on where the mosaic has a crop.
        return crop_by_crop(
            tokens, ops.shares(tokens.layout.crop_sizes, n_keep, even=True), self._chosen, apart=self.faithful
        )

    def _chosen(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        late = self._attention(tokens)[:, -1].double()
        anchors = self.anchors(tokens, n_keep)
        share = late / late.amax(1, keepdim=True).clamp(min=1e-30)
        # 4 and more for anchors, 2 and more for their neighbours: one ranking
        return tokens.keeping(ops.keep_top(share + 2.0 * self.around(anchors, tokens.layout) + 4.0 * anchors, n_keep))

    def anchors(self, tokens: VisualTokens, n_keep: int) -> Tensor:
        """(G, N) bool: the most attended tokens of the middle layer."""
        best = ops.keep_top(self._attention(tokens)[:, 0], self.n_anchors(n_keep))
        return torch.zeros_like(tokens.keep).scatter(1, best, True)

    def _attention(self, tokens: VisualTokens) -> Tensor:
        """(G, 1 or 2, N): of the middle layer, and of the late one where it is another."""
        is_port = self.variant == "angelslim" and tokens.has(Kind.CLS_ROW)
        return tokens.signal(Kind.CLS_ROW if is_port else Kind.RECEIVED)

    def around(self, anchors: Tensor, layout: Layout) -> Tensor:
        """(G, N) bool: the neighbours of anchors, some of which may be anchors."""
        n = anchors.shape[1]
        to = ops.on_device(_clamped(n, layout.width) if self.faithful else _neighbours(layout), anchors.device)
        found = torch.zeros(len(anchors), n + 1, device=anchors.device)
        return found.index_add(1, to, anchors.float().repeat_interleave(4, 1))[:, :n] > 0


@functools.lru_cache(maxsize=64)
def _neighbours(layout: Layout) -> tuple[int, ...]:
    """Four a token, in its crop; N where there is none."""
    at = {(layout.crop[i], layout.row[i], layout.column[i]): i for i in layout.visual}
    steps = ((0, -1), (0, 1), (-1, 0), (1, 0))
    return tuple(at.get((crop, row + y, column + x), len(at)) for crop, row, column in at for y, x in steps)


def _clamped(n: int, width: int) -> tuple[int, ...]:
    """The code's: places before and after in the raster of n tokens, within 0..n-1."""
    return tuple(min(max(i + step, 0), n - 1) for i in range(n) for step in (-1, 1, -width, width))
