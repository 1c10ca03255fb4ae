"""DivPrune: keep tokens that are far from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..core import kernels, ops
from ..core.layout import Layout
from ..core.lazy import F, torch
from ..core.tokens import VisualTokens
from ..cost.flops import Ops
from ..cost.selection import Widths
from .base import Method, Split
from .coverage import CHUNK, HELD
from .crops import crop_by_crop
from .panels import are_many, chosen_in_panels

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
    Needs:    nothing. Text-agnostic. Cost: O(N^2 D) once, O(N) a kept token. Beyond 4,096 tokens no N x N matrix is
              held on a CPU.

    Args:
        split: "joint" looks at all tokens of an image together, "even" gives every crop the same share.
    """

    split: Split = "joint"

    source: ClassVar[str] = "arXiv:2503.02175"

    def cost(self, layout: Layout, n_keep: int, widths: Widths) -> Ops:
        """All cosines; of many tokens, those to the chosen ones once more."""
        sizes = layout.crop_sizes if self.split == "even" else (layout.n_visual,)
        shares = ops.shares(sizes, n_keep, even=True)
        pairs = sum(n * n if n <= HELD else n * (n // 2 + k) for n, k in zip(sizes, shares, strict=True) if k)
        return Ops(pairs * widths.rows)

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        if self.split == "even" and len(tokens.layout.crops) > 1:
            shares = ops.shares(tokens.layout.crop_sizes, n_keep, even=True)
            return crop_by_crop(tokens, shares, lambda crop, n: crop.keeping(self.order(crop, n)))
        return tokens.keeping(self.order(tokens, n_keep))

    def order(self, tokens: VisualTokens, n_keep: int) -> Tensor:
        """Indices in the order they are chosen, (G, n_keep)."""
        if are_many(tokens.features):
            return _order_of_many(F.normalize(tokens.features.float(), dim=-1), n_keep)
        distance = 1 - ops.cosine(tokens.features)
        itself = torch.eye(tokens.n_visual, dtype=torch.bool, device=distance.device)
        newest = ops.first_highest(distance.masked_fill(itself, torch.inf).amin(2))
        if (order := kernels.farthest(distance, newest, n_keep)) is not None:
            return order
        chosen, nearest = [newest], torch.full_like(distance[:, 0], torch.inf)
        for _ in range(n_keep - 1):
            row = distance.gather(1, newest[:, None, None].expand(-1, 1, tokens.n_visual))[:, 0]
            nearest = nearest.minimum(row).scatter(1, newest[:, None], -torch.inf)
            newest = ops.first_highest(nearest)
            chosen.append(newest)
        return torch.stack(chosen, 1)


def _order_of_many(unit: Tensor, n_keep: int) -> Tensor:
    """`order` of (G, N, D) rows of length 1, in panels."""
    farthest = _Farthest(unit)
    first = ops.first_highest(_to_nearest(unit))[:, None]
    farthest.settle(first)
    return torch.cat([first, chosen_in_panels(farthest, n_keep - 1)], 1) if n_keep > 1 else first


def _to_nearest(unit: Tensor) -> Tensor:
    """(G, N): the distance to the nearest other row."""
    places = torch.arange(unit.shape[1])
    nearest = torch.full_like(unit[..., 0], -torch.inf)
    for at in places.split(CHUNK):
        first, rest = int(at[0]), places[int(at[0]) :]
        cosines = unit[:, at] @ unit[:, first:].transpose(1, 2)  # of a pair once
        cosines = cosines.masked_fill(rest == at[:, None], -torch.inf)
        nearest[:, first:] = nearest[:, first:].maximum(cosines.amax(1))
        nearest[:, at] = nearest[:, at].maximum(cosines.amax(2))
    return 1 - nearest


class _Farthest:
    """Worth is the distance to the nearest chosen row; see `panels.Choice`."""

    def __init__(self, unit: Tensor):
        self._unit = unit
        self._nearest = torch.full_like(unit[..., 0], torch.inf)

    def worth(self) -> Tensor:
        return self._nearest

    def open(self, candidates: Tensor) -> None:
        rows = ops.take(self._unit, candidates)
        self._between = 1 - rows @ rows.transpose(1, 2)
        self._inside = self._nearest.gather(1, candidates)

    def worth_inside(self) -> Tensor:
        return self._inside

    def choose(self, place: Tensor) -> None:
        place = place[:, None]
        row = self._between.gather(1, place[..., None].expand_as(self._between[:, :1]))[:, 0]
        self._inside = self._inside.minimum(row).scatter(1, place, -torch.inf)

    def settle(self, chosen: Tensor) -> None:
        near = (ops.take(self._unit, chosen) @ self._unit.transpose(1, 2)).amax(1)
        self._nearest = self._nearest.minimum(1 - near).scatter(1, chosen, -torch.inf)
