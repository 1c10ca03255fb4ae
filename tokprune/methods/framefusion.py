"""FrameFusion: average what stays alike from frame to frame, then drop what is least attended to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ..core import ops
from ..core.lazy import F, torch
from ..core.signals import Signal, Tower
from ..core.tokens import Count, VisualTokens
from .base import Method, cls_signal, cls_values
from .frames import by_frame, unlike_previous

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FrameFusion(Method):
    """Merge tokens into those of the frame before, the most similar first; what is over the budget then is dropped.

    A token whose cosine to its place in the frame before is at least `similarity` may be merged. Runs of such tokens
    along time become their mean, at the place of the first one. If that does not meet the budget, the least attended
    of the rest leave.

    Source:   "FrameFusion: Combining Similarity and Importance for Video Token Reduction", arXiv:2501.01986; code:
              thu-nics/FrameFusion@fbec1d2.
    Faithful: kept sets and merged tokens of a merging step, and kept sets of the pruning step given its attention,
              agree with the authors' code (golden cases framefusion); `paper_ratio` is its formula for the sparsity of
              a layer.
    Differs:  the code merges before the first layers of the language model, until little is similar, and then drops by
              the attention of all tokens of the prompt there. Here both happen before the language model, on the rows
              that it receives and with the attention of the vision tower. faithful=True is one merging step as in the
              code, without pruning: more tokens than the budget stay where fewer are similar; join it with a method
              between layers, as framefusion:faithful=true+fastv. Where features of deeper tower layers are added
              later, merged tokens get those of their own place. Of a picture nothing is merged.
    Needs:    CLS_ROW or RECEIVED of the last layer; nothing with faithful=True. Text-agnostic. Cost: O(N D).

    Args:
        similarity: cosine from which on tokens are merged, -1 to 1.
        layer: vision layer, absolute or negative from the end. None is the last one.
        faithful: one merging step alone.
    """

    similarity: float = 0.6
    layer: int | None = None
    faithful: bool = False

    keeps_features: ClassVar[bool] = False
    limits: ClassVar = {"similarity": (-1, 1)}
    source: ClassVar[str] = "arXiv:2501.01986"

    @property
    def count(self) -> Count:
        """Merging alone may find too few tokens that are similar."""
        return Count.CONTENT if self.faithful else Count.EXACT

    def needs(self, tower: Tower) -> frozenset[Signal]:
        layer = tower.default_layer(-1) if self.layer is None else tower.layer(self.layer)
        return frozenset(() if self.faithful else {cls_signal(tower, (layer,), "received")})

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        joins = self.joins(tokens, n_keep)
        keep = ~joins.flatten(1)
        if not self.faithful:
            rank = cls_values(tokens)[:, 0].masked_fill(~keep, -torch.inf)
            keep = torch.zeros_like(keep).scatter(1, ops.keep_top(rank, n_keep), True)
        features, sizes = merged_runs(tokens, joins)
        return replace(tokens, keep=keep, features=features, sizes=sizes)

    def joins(self, tokens: VisualTokens, n_keep: int) -> Tensor:
        """(G, T, n) bool: tokens that are merged into the frame before, as many as are over the budget at most."""
        near = F.pad(1 - unlike_previous(tokens), (0, 0, 1, 0), value=-torch.inf)
        rank = near.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(1).view_as(near)
        return (rank < tokens.n_visual - n_keep) & (near >= self.similarity)

    def paper_ratio(self, cost: float, sparsity: Sequence[float], n_layers: int = 28) -> float:
        """The share of its tokens that a layer has to drop for the whole model to cost so much.

        Args:
            cost: of all layers, as a share of that without dropping.
            sparsity: what the layers before it dropped, each of what it got.
            n_layers: of the language model; the code has 28 for any.
        """
        left, spent = 1.0, 0.0
        for share in sparsity:
            left *= 1 - share
            spent += left
        ratio = (n_layers * cost - spent) / ((n_layers - len(sparsity)) * left)
        return min(max(1 - ratio, 0.0), 1.0)


def merged_runs(tokens: VisualTokens, joins: Tensor) -> tuple[Tensor, Tensor]:
    """(G, N, D): the first token of every run along time becomes the mean of the run, whose length is (G, N) float32.

    Args:
        tokens: of a video.
        joins: (G, T, n) bool, tokens that belong to the run of the frame before.
    """
    frames = by_frame(tokens)
    n_frames, n = tokens.layout.frames
    at = torch.arange(n_frames, device=joins.device)[:, None].expand_as(joins)
    first = at.masked_fill(joins, 0).cummax(1).values * n + torch.arange(n, device=joins.device)
    index = first.flatten(1)
    length = torch.zeros_like(index).scatter_add(1, index, torch.ones_like(index))
    sums = torch.zeros_like(tokens.features, dtype=torch.float32)
    for t in range(n_frames):
        own = index[:, t * n : (t + 1) * n, None].expand(-1, -1, sums.shape[2])
        sums.scatter_add_(1, own, frames[:, t].float())
    means = (sums / length.clamp(min=1)[..., None]).to(tokens.features.dtype)
    return torch.where(length[..., None] > 1, means, tokens.features), length.float()
