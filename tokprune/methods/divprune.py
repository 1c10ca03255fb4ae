"""DivPrune: keep tokens that are far from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..core import ops
from ..core.layout import Layout
from ..core.lazy import torch
from ..core.tokens import VisualTokens
from ..cost.flops import Ops
from ..cost.selection import Widths
from .base import Method, Split
from .crops import crop_by_crop

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DivPrune(Method):
    """Choose one token after the other, each the farthest from those already chosen.

    The distance is 1 - cosine of the rows that the language model sees. The first token is the one whose nearest
    neighbour is farthest; then the one whose nearest chosen token is farthest.

    Source:   "DivPrune: Diversity-based Visual Token Pruning", arXiv:2503.02175. Written from the formula; checked
              against the form in Tencent/AngelSlim@67394ce (Apache-2.0).
    Faithful: kept sets and order agree with that form (golden cases divprune).
    Differs:  newlines are no candidates; no token is chosen twice in half precision; equal distances go to the lower
              index.
    Needs:    nothing. Text-agnostic. Cost: O(N^2 D) once, O(N) a kept token.

    Args:
        split: "joint" looks at all tokens of an image together, "even" gives every crop the same share.
    """

    split: Split = "joint"

    source: ClassVar[str] = "arXiv:2503.02175"

    def cost(self, layout: Layout, n_keep: int, widths: Widths) -> Ops:
        """All cosines."""
        sizes = layout.crop_sizes if self.split == "even" else (layout.n_visual,)
        shares = ops.shares(sizes, n_keep, even=True)
        return Ops(sum(n * n * widths.rows for n, k in zip(sizes, shares, strict=True) if k))

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        if self.split == "even" and len(tokens.layout.crops) > 1:
            shares = ops.shares(tokens.layout.crop_sizes, n_keep, even=True)
            return crop_by_crop(tokens, shares, lambda crop, n: crop.keeping(self.order(crop, n)))
        return tokens.keeping(self.order(tokens, n_keep))

    def order(self, tokens: VisualTokens, n_keep: int) -> Tensor:
        """Indices in the order they are chosen, (G, n_keep)."""
        distance = 1 - ops.cosine(tokens.features)
        itself = torch.eye(tokens.n_visual, dtype=torch.bool, device=distance.device)
        newest = ops.first_highest(distance.masked_fill(itself, torch.inf).amin(2))
        chosen, nearest = [newest], torch.full_like(distance[:, 0], torch.inf)
        for _ in range(n_keep - 1):
            row = distance.gather(1, newest[:, None, None].expand(-1, 1, tokens.n_visual))[:, 0]
            nearest = nearest.minimum(row).scatter(1, newest[:, None], -torch.inf)
            newest = ops.first_highest(nearest)
            chosen.append(newest)
        return torch.stack(chosen, 1)
