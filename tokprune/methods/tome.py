"""ToMe: merge the most similar pairs of tokens until few enough are left."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ..core import ops
from ..core.layout import Layout
from ..core.lazy import F, torch
from ..core.tokens import VisualTokens
from ..cost.flops import Ops
from ..cost.selection import Widths
from .base import Method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ToMe(Method):
    """Bipartite matching on the rows that the language model sees, round by round.

    A round splits the tokens alternately into A and B, gives every token of A its most similar one of B (cosine),
    and merges the r most similar pairs into their B, as a mean weighted by how many patches each stands for; r is at
    most half of the tokens. Rounds repeat until the budget is met.

    Source:   "Token Merging: Your ViT But Faster", arXiv:2210.09461. Written from the formula.
    Faithful: to the matching and the weighted mean; there are no golden cases.
    Differs:  the paper merges a few tokens in every layer of the tower, by keys, and makes attention proportional to
              sizes; here the finished features are merged, by themselves. What is left stays in raster order, a merged
              token at the place of its B.
    Needs:    nothing. Text-agnostic. Cost: O(N^2 D / 4) in the first round, a quarter in each of the next.
    """

    keeps_features: ClassVar[bool] = False
    source: ClassVar[str] = "arXiv:2210.09461"

    def cost(self, layout: Layout, n_keep: int, widths: Widths) -> Ops:
        """Similarities of A and B in every round."""
        left, spent = layout.n_visual, 0
        while left > n_keep:
            spent += (left + 1) // 2 * (left // 2) * widths.rows
            left = max(n_keep, left - left // 2)
        return Ops(spent)

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        x = tokens.features.float()
        sizes = torch.ones_like(x[..., :1])
        places = torch.arange(tokens.n_visual, device=x.device).expand(x.shape[:2])
        while x.shape[1] > n_keep:
            x, sizes, places = _round(x, sizes, places, min(x.shape[1] - n_keep, x.shape[1] // 2))
        keep = torch.zeros_like(tokens.keep).scatter(1, places, True)
        merged = torch.ones_like(keep, dtype=torch.float32).scatter(1, places, sizes[..., 0])
        return replace(tokens, keep=keep, features=ops.put(tokens.features, places, x), sizes=merged)


def _round(x: Tensor, sizes: Tensor, places: Tensor, n_merged: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge `n_merged` tokens into others; all three have one row less for each."""
    unit = F.normalize(x, dim=-1)
    likeness, best = _most_similar(unit[:, ::2], unit[:, 1::2])
    ranking = likeness.argsort(dim=1, descending=True, stable=True)
    gone, stay = ranking[:, :n_merged], ranking[:, n_merged:].sort(1).values
    target = best.gather(1, gone)
    weights = ops.take(sizes[:, ::2], gone)
    joining = ops.take(x[:, ::2], gone) * weights
    summed = (x[:, 1::2] * sizes[:, 1::2]).scatter_add_(1, target[..., None].expand_as(joining), joining)
    total = sizes[:, 1::2].scatter_add(1, target[..., None], weights)
    # Tokens that nothing was merged into stay bit by bit as they are.
    touched = torch.zeros_like(total).scatter(1, target[..., None], 1.0) > 0
    b = torch.where(touched, summed / total, x[:, 1::2])
    left = torch.cat([places[:, ::2].gather(1, stay), places[:, 1::2]], 1)
    rows = torch.cat([ops.take(x[:, ::2], stay), b], 1)
    sizes = torch.cat([ops.take(sizes[:, ::2], stay), total], 1)
    order = left.argsort(1)
    return ops.take(rows, order), ops.take(sizes, order), left.gather(1, order)


def _most_similar(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The largest product of every row of (G, A, D) with one of (G, B, D), and with which, (G, A) each."""
    found = []
    for rows in a.split(max(1, ops.LARGEST // max(1, len(b) * b.shape[1])), 1):
        near = rows @ b.transpose(1, 2)
        found.append((near.amax(2), ops.first_highest(near.flatten(0, 1)).view(near.shape[:2])))
    most, which = zip(*found, strict=True)
    return torch.cat(most, 1), torch.cat(which, 1)
