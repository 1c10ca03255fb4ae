"""LLaVA-PruMerge+: a uniform grid of tokens in addition to the outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..core import ops
from ..core.errors import OptionError
from ..core.lazy import torch
from .prumerge import PruMerge

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge, and tokens of a uniform grid in addition to the outliers.

    With a ratio r of outliers the grid is every int(int(1 / r) / 3)-th token of a crop, those not chosen already.
    With a budget a fifth of it is chosen by attention, the rest is spread evenly over the other tokens.

    Source:   "LLaVA-PruMerge", arXiv:2403.15388; code: 42Shawn/LLaVA-PruMerge@097c041, and the form with fixed
              counts in THU-MIG/VTC-CLS@e41ac9b.
    Faithful: counts, order and merged tokens agree with both codes (golden cases prumerge_plus), the second with its
              pairs of n_top and step: 13 and 11, 40 and 6, 95 and 3.
    Differs:  as PruMerge; no outlier leaves the pooled token alone, where the code divides by zero. With a budget the
              count is exact, where a grid that meets chosen tokens falls short.
    Needs:    as PruMerge.

    Args:
        adaptive: outliers decide how many tokens stay, without a budget; otherwise the budget, pooled ones included.
        n_top: with adaptive, this many tokens by attention instead of the outliers.
        step: with adaptive, this step of the grid instead of the ratio's.
        layer: vision layer, absolute or negative from the end. None is the last one.
        without_cls: what to do where the tower has no [CLS] token: "error", or "received" for what tokens receive.
    """

    n_top: int | None = None
    step: int | None = None

    counts_by_crop: ClassVar[bool] = True
    limits: ClassVar = {"n_top": (1, 1e6), "step": (1, 1e6)}

    def __post_init__(self):
        super().__post_init__()
        if not self.adaptive and (self.n_top, self.step) != (None, None):
            raise OptionError("PruMergePlus: n_top and step replace the budget; leave adaptive=false out")

    def chosen(self, attention: Tensor, n_top: int, ratio: float) -> Tensor:
        n = attention.shape[1]
        order = attention.argsort(dim=1, descending=True, stable=True)
        if not self.adaptive:
            top = order[:, : -(-n_top // 5)]
            others = torch.zeros_like(attention).scatter(1, top, -1.0)
            left = ops.keep_top(others, n - top.shape[1])
            spread = [(2 * i + 1) * left.shape[1] // (2 * (n_top - top.shape[1])) for i in range(n_top - top.shape[1])]
            return torch.cat([top, left[:, ops.on_device(spread, left.device)] if spread else left[:, :0]], 1)
        top = order[:, : n_top if self.n_top is None else self.n_top]
        step = max(1, int(int(1 / ratio) / 3) if self.step is None and ratio else self.step or n)
        taken = set(top[0].tolist())
        grid = [i for i in range(0, n - 1, step) if i not in taken] if ratio or self.step else []
        return torch.cat([top, ops.on_device(grid, top.device).long()[None]], 1)
