"""HiRED: early attention of the thumbnail splits the budget, late attention of every crop spends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ..core import ops
from ..core.errors import OptionError
from ..core.layout import Layout
from ..core.lazy import torch
from ..core.signals import Signal, Tower
from ..core.tokens import Count, VisualTokens
from .base import ScoreMethod, WithoutCLS, cls_signal, cls_values
from .crops import counts_by_cell, thumbnail_cells, top_by_crop

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HiRED(ScoreMethod):
    """Keep what [CLS] attends to in a late layer; crops share by where it looks in the first one.

    The thumbnail gets `alpha` of the budget. The (1 - alpha) N_t tokens of the thumbnail with the most [CLS]
    attention in the first vision layer are counted by crop: the rest of the budget is split by these counts.

    Source:   "HiRED: Attention-Guided Token Dropping", arXiv:2408.10945; code: hasanar1f/HiRED@502d6dd.
    Faithful: budgets and kept sets of every crop agree with the authors' code (golden cases hired), with
              faithful=True and the code's total as the budget.
    Differs:  the exact budget by largest remainder, where the code truncates; a crop counts the part of the thumbnail
              that it shows, where the code counts strips of the raster; the code lays tiles of grids that are not
              square out the other way round and loses tokens by it, which is not reproduced.
    Needs:    CLS_ROW of two layers. Text-agnostic. Cost: O(N).

    Args:
        alpha: share of the thumbnail, 0..1.
        budget_layer: vision layer that splits the budget; None is the first one.
        layer: vision layer that ranks tokens; None is the one before the last.
        faithful: truncate counts, count strips, and drop newlines, as the authors' code does.
        without_cls: what to do where the tower has no [CLS] token: "error", or "received" for what tokens receive.
    """

    alpha: float = 0.5
    budget_layer: int | None = None
    layer: int | None = None
    faithful: bool = False
    without_cls: WithoutCLS = "error"

    limits: ClassVar = {"alpha": (0, 1)}
    source: ClassVar[str] = "arXiv:2408.10945"
    if_missing: ClassVar[str] = "without_cls=received"

    @property
    def count(self) -> Count:
        """Truncation loses a few tokens; how many depends on the picture."""
        return Count.CONTENT if self.faithful else Count.EXACT

    @property
    def newlines(self) -> Literal["keep_rows_with_tokens", "drop"]:
        """The authors' code has none."""
        return "drop" if self.faithful else "keep_rows_with_tokens"

    def needs(self, tower: Tower) -> frozenset[Signal]:
        early = tower.default_layer(0) if self.budget_layer is None else tower.layer(self.budget_layer)
        late = tower.default_layer(-2) if self.layer is None else tower.layer(self.layer)
        if early > late:
            raise OptionError(f"budget_layer is layer {early}, after layer={late}; use a layer up to {late}")
        return frozenset({cls_signal(tower, tuple(sorted({early, late})), self.without_cls)})

    def score(self, tokens: VisualTokens) -> Tensor:
        return cls_values(tokens)[:, -1]

    def chosen(self, ranked: Tensor, tokens: VisualTokens, n_keep: int) -> Tensor:
        layout = tokens.layout
        if len(layout.crops) == 1 or layout.crops[0] != 0:
            return top_by_crop(ranked, layout, ops.shares(layout.crop_sizes, n_keep, even=True))
        counts = self.crop_counts(tokens).double()
        sizes, total = layout.crop_sizes, counts.sum(1, keepdim=True)
        if not self.faithful:
            own = total * self.alpha / max(1 - self.alpha, 1e-9)
            return top_by_crop(ranked, layout, ops.allocate(torch.cat([own, counts], 1), sizes, n_keep))
        n_own = min(int(self.alpha * n_keep), sizes[0])
        rest = ((counts / total.clamp(min=1)).float() * (n_keep - n_own)).long()
        rest = rest.minimum(ops.on_device(sizes[1:], rest.device))
        return top_by_crop(ranked, layout, torch.cat([torch.full_like(rest[:, :1], n_own), rest], 1))

    def crop_counts(self, tokens: VisualTokens) -> Tensor:
        """(G, crops of the mosaic): early winners of the thumbnail that each crop shows."""
        layout, thumbnail = tokens.layout, tokens.layout.regions[0]
        early = cls_values(tokens)[:, 0, ops.on_device(thumbnail.index, tokens.keep.device)]
        winners = ops.keep_top(early, max(1, int(len(thumbnail.index) * (1 - self.alpha))))
        won = torch.zeros_like(early).scatter(1, winners, 1.0)
        return counts_by_cell(won, _strips(layout) if self.faithful else thumbnail_cells(layout), layout)


def _strips(layout: Layout) -> list[int]:
    """As many pieces of the thumbnail's raster as there are crops; of fewer tokens, one a piece."""
    n_crops, n = layout.crop_grid[0] * layout.crop_grid[1], len(layout.regions[0].index)
    return [min(i // max(n // n_crops, 1), n_crops - 1) for i in range(n)]
