"""FoPru: keep the visual tokens that attention in one vision layer focuses on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ..core import ops
from ..core.errors import OptionError
from ..core.layout import Layout, Region
from ..core.lazy import torch
from ..core.signals import Form, Kind, Signal, Tower
from ..core.tokens import Count, VisualTokens
from .base import RankMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FoPru(RankMethod):
    """Keep the tokens, or whole rows of tokens, with the largest focal score.

    Of the patch-to-patch attention P of one layer, mean over heads, the score is what a token receives
    (mean of its column) or what it gives (mean of its row), whichever varies more over the picture.

    Source:   "FoPru: Focal Pruning for Efficient Large Vision-Language Models", arXiv:2411.14164. There is no
              official code; checked against the port in dongxianzhe/hydrainfer@d4d5f4f.
    Faithful: kept sets and counts agree with the port, both forms, both strategies (golden cases fopru).
    Differs:  default form is softmax, where the port uses logits; fewer than one row is an error instead of
              an empty selection; equal scores go to the lower index.
    Needs:    RECEIVED and GIVEN of one layer; no [CLS], no text. Cost: O(H N^2 d) in chunks after the
              softmax, O(H N d) for logits.

    Args:
        strategy: "rank" keeps single tokens, an exact number; "row" keeps whole rows, at most the budget.
        form: attention after ("softmax") or before ("logits") the softmax. After it, what a token gives is
            nearly constant, so what it receives decides.
        gate: "variance" picks by the variance over the picture; "received" or "given" fixes the choice.
        layer: vision layer, absolute or negative from the end. None is the one before the last.
    """

    strategy: Literal["rank", "row"] = "rank"
    form: Form = "softmax"
    gate: Literal["variance", "received", "given"] = "variance"
    layer: int | None = None

    source: ClassVar[str] = "arXiv:2411.14164"

    def __post_init__(self):
        super().__post_init__()
        if self.strategy == "row" and self.split != "joint":
            raise OptionError(
                f"FoPru: rows of the mosaic belong to several crops; use strategy=rank with split={self.split}"
            )

    @property
    def count(self) -> Count:
        """Whole rows may fall short of the budget."""
        return Count.AT_MOST if self.strategy == "row" else Count.EXACT

    @property
    def is_filterable(self) -> bool:
        """Whole rows cannot leave single tokens out."""
        return self.strategy == "rank"

    def min_keep(self, layout: Layout) -> int:
        return min(region.width for region in layout.regions) if self.strategy == "row" else 1

    def needs(self, tower: Tower) -> frozenset[Signal]:
        layers = ((tower.default_layer(-2) if self.layer is None else tower.layer(self.layer)),)
        kinds = {"variance": (Kind.RECEIVED, Kind.GIVEN), "received": (Kind.RECEIVED,), "given": (Kind.GIVEN,)}
        return super().needs(tower) | {Signal(kind, layers, self.form) for kind in kinds[self.gate]}

    def score(self, tokens: VisualTokens) -> Tensor:
        if self.gate != "variance":
            return tokens.signal(Kind.RECEIVED if self.gate == "received" else Kind.GIVEN)[:, 0]
        received, given = tokens.signal(Kind.RECEIVED)[:, 0], tokens.signal(Kind.GIVEN)[:, 0]
        if tokens.n_visual == 1:
            return received  # the variance of one number is not defined
        more = received.var(1, keepdim=True) > given.var(1, keepdim=True)
        return torch.where(more, received, given)

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        if self.strategy == "rank":
            return super().select(tokens, n_keep)
        scores, kept = self.score(tokens), []
        regions = tokens.layout.regions
        for region, n_rows in zip(regions, _rows(regions, n_keep), strict=True):
            index = ops.on_device(region.index, scores.device)
            rows = ops.keep_top(scores[:, index].unflatten(1, (-1, region.width)).sum(2), n_rows)
            columns = torch.arange(region.width, device=rows.device)
            kept.append(index[(rows[..., None] * region.width + columns).flatten(1)])
        return tokens.keeping(torch.cat(kept, 1), scores)

    def paper_count(self, n_visual: int, keep_ratio: float, width: int) -> int:
        """Tokens the port keeps: the ratio truncated, of tokens or of rows."""
        if self.strategy == "row":
            return max(1, int(n_visual // width * keep_ratio)) * width
        return int(n_visual * keep_ratio)


def _rows(regions: Sequence[Region], n_keep: int) -> list[int]:
    """Whole rows of the thumbnail and of the mosaic within a budget, by their sizes; what is left goes to the first."""
    shares = ops.shares(tuple(len(r.index) for r in regions), n_keep)
    rows = [share // region.width for share, region in zip(shares, regions, strict=True)]
    left = n_keep - sum(n * region.width for n, region in zip(rows, regions, strict=True))
    for i, region in enumerate(regions):
        more = min(left // region.width, region.height - rows[i])
        rows[i], left = rows[i] + more, left - more * region.width
    return rows
