"""VisionZip: keep what [CLS] attends to, and gather the rest around a few evenly spaced tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..core import ops
from ..core.layout import Layout
from ..core.lazy import F, torch
from ..core.signals import Kind, Signal, Tower
from ..core.tokens import VisualTokens
from ..cost.flops import Ops
from ..cost.selection import Widths
from .base import Method
from .crops import crop_by_crop, in_order

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VisionZip(Method):
    """Dominant tokens by attention, contextual tokens by merging; every crop by itself, with an even share.

    Of K tokens of a crop, C are contextual: of the tokens that are not dominant, in raster order, every M // C-th is
    a target; every other one goes to the target with the most similar key (mean over heads), and a target becomes
    itself plus the mean of those. The [CLS] state takes a place of its own where the model can project it.
    Order: [CLS], dominant in raster order, contextual.

    Source:   "VisionZip: Longer is Better but Not Necessary in VLMs", arXiv:2412.04467; code:
              dvlab-research/VisionZip@3151f6d.
    Faithful: dominant tokens, targets, assignments and merged tokens agree with the authors' code (golden cases
              visionzip).
    Differs:  tokens of a crop stay together, where the code puts the [CLS] and the contextual tokens of all crops
              behind the others, without newlines; shares follow the budget (10 contextual of 64). Where the model
              folds several patches into a token, rows of the language model are merged, without [CLS]. A
              tower without [CLS] ranks by attention received, as the authors' variants do.
    Needs:    CLS_ROW (or RECEIVED) and KEYS of one layer, CLS_STATE. Text-agnostic. Cost: O(N C d).

    Args:
        contextual: contextual tokens of a crop; None is 10 of 64.
        layer: vision layer, absolute or negative from the end. None is the one before the last.
    """

    contextual: int | None = None
    layer: int | None = None

    keeps_features: ClassVar[bool] = False
    space: ClassVar = "tower"
    limits: ClassVar = {"contextual": (0, 1e6)}
    source: ClassVar[str] = "arXiv:2412.04467"

    def needs(self, tower: Tower) -> frozenset[Signal]:
        """Attention and keys of one layer, and the [CLS] state where the projector takes it."""
        layers = (tower.default_layer(-2) if self.layer is None else tower.layer(self.layer),)
        found = {Signal(Kind.CLS_ROW if tower.has_cls else Kind.RECEIVED, layers), Signal(Kind.KEYS, layers)}
        return frozenset(found | ({Signal(Kind.CLS_STATE)} if tower.has_cls and tower.projects_rows else set()))

    def cost(self, layout: Layout, n_keep: int, widths: Widths) -> Ops:
        """Similarities to targets by keys of one head's width, and the means."""
        shares, spent = ops.shares(layout.crop_sizes, n_keep, even=True), 0
        for n, k in zip(layout.crop_sizes, shares, strict=True):
            n_targets = self._n_contextual(k) if k else 0
            n_rest = n - (k - n_targets - int(widths.has_cls_state))
            spent += n_rest * n_targets * (widths.head + widths.rows)
        return Ops(spent)

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        return crop_by_crop(tokens, ops.shares(tokens.layout.crop_sizes, n_keep, even=True), self._compress)

    def _n_contextual(self, n_keep: int) -> int:
        wanted = round(n_keep * 10 / 64) if self.contextual is None else self.contextual
        return min(wanted, n_keep - 1)

    def _compress(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        n_targets, n_cls = self._n_contextual(n_keep), int(tokens.has(Kind.CLS_STATE))
        n_dominant = n_keep - n_targets - n_cls
        dominant, rest = self.dominant(tokens, n_dominant)
        targets, groups = self.contextual_groups(tokens, rest, n_targets)
        x = tokens.features.float()
        rows = [tokens.signal(Kind.CLS_STATE)] if n_cls else []
        rows += [ops.take(x, dominant), ops.take(x, targets) + _means(ops.take(x, rest), groups)]
        keep = torch.zeros_like(tokens.keep).scatter(1, torch.cat([dominant, targets], 1), True)
        # The [CLS] state needs a place: that of the best token without one.
        spare = ops.keep_top(self._attention(tokens).masked_fill(keep, -torch.inf), n_cls) if n_cls else dominant[:, :0]
        return in_order(tokens, keep.scatter(1, spare, True), torch.cat(rows, 1))

    def dominant(self, tokens: VisualTokens, n_keep: int) -> tuple[Tensor, Tensor]:
        """Indices of the most attended tokens, (G, K), and of the others, (G, M), each ascending."""
        scores = self._attention(tokens)
        chosen = ops.keep_top(scores, n_keep)
        left = torch.ones_like(scores).scatter(1, chosen, 0.0)
        return chosen, ops.keep_top(left, tokens.n_visual - n_keep)

    def contextual_groups(self, tokens: VisualTokens, rest: Tensor, n_targets: int) -> tuple[Tensor, Tensor]:
        """Indices of the targets, (G, C), and which of the others (G, M) each gathers, (G, M, C) of 0 or 1."""
        n_rest = rest.shape[1]
        step = max(1, n_rest // max(n_targets, 1))
        at = torch.arange(n_targets, device=rest.device) * step
        keys = tokens.signal(Kind.KEYS)[:, 0].mean(2)  # (G, N, d)
        keys = F.normalize(ops.take(keys, rest), dim=-1)
        near = keys @ keys[:, at].transpose(1, 2)  # (G, M, C)
        if not n_targets:
            return rest[:, :0], near
        best = ops.first_highest(near.flatten(0, 1)).view(near.shape[:2])
        groups = F.one_hot(best, n_targets).to(near.dtype)
        return rest[:, at], groups.index_fill(1, at, 0.0)

    def _attention(self, tokens: VisualTokens) -> Tensor:
        kind = Kind.CLS_ROW if tokens.has(Kind.CLS_ROW) else Kind.RECEIVED
        return tokens.signal(kind)[:, 0]


def _means(x: Tensor, groups: Tensor) -> Tensor:
    """(G, C, D): mean of the rows (G, M, D) that each group gathers, 0 for none."""
    return groups.transpose(1, 2) @ x / groups.sum(1).clamp(min=1)[..., None]
