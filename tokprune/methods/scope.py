"""SCOPE: keep tokens that together resemble all others, more so those that attention picks out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ..core import ops
from ..core.layout import Layout
from ..core.lazy import torch
from ..core.signals import Kind, Signal, Tower
from ..core.tokens import VisualTokens
from ..cost.flops import Ops
from ..cost.selection import Widths
from .base import Method, Split, cls_values, late_layer
from .coverage import Cosines, greedy, n_cosine_rows
from .crops import crop_by_crop

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 1e-4  # sums of cosines up to here are rounding: everything is covered


@dataclass(frozen=True)
class SCOPE(Method):
    """Choose one token after the other, each the one with the largest gain in coverage times saliency.

    A token is covered as far as its cosine to the most similar chosen token, at least 0. The gain g_j of token j is
    what it adds to the coverage of all tokens; its saliency a_j is what [CLS] attends to, the softmax over patches
    alone. The next token is the one with the largest g_j a_j^alpha. When all is covered, the most salient fill up.

    Source:   "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs", arXiv:2510.24214. Written
              from the formula; checked against the form in Tencent/AngelSlim@67394ce (Apache-2.0).
    Faithful: saliency, kept sets and order agree with that form (golden cases scope).
    Differs:  every image by itself, where that form has one pool for all images of a request. After a choice, gains are
              corrected for the tokens whose cover grew most, more of them than usually change, not for all. A
              tower without [CLS] ranks by attention received in its last layer, as that form.
    Needs:    CLS_ROW (or RECEIVED) of one layer; nothing with alpha=0. Text-agnostic. Cost: O(N^2 D + N^2 log K);
              O(N^2 D log K) beyond 16,384 tokens, where no N x N matrix is held.

    Args:
        alpha: power of the saliency; 0 is coverage alone.
        combine: "multiply", or "add" for g_j + a_j^alpha.
        layer: vision layer, absolute or negative from the end. None is the one before the last, and the last one where
            the tower has no [CLS].
        split: "joint" covers all tokens of an image together, "even" gives every crop the same share.
    """

    alpha: float = 1.0
    combine: Literal["multiply", "add"] = "multiply"
    layer: int | None = None
    split: Split = "joint"

    limits: ClassVar = {"alpha": (0, 100)}
    source: ClassVar[str] = "arXiv:2510.24214"

    def needs(self, tower: Tower) -> frozenset[Signal]:
        layers = (late_layer(tower, self.layer),)
        if not self.alpha:
            return frozenset()
        if not tower.has_cls:
            return frozenset({Signal(Kind.RECEIVED, layers)})
        return frozenset({Signal(Kind.CLS_ROW, layers, special="none")})

    def cost(self, layout: Layout, n_keep: int, widths: Widths) -> Ops:
        """All cosines; of many tokens, the rows as often as they are made."""
        sizes = layout.crop_sizes if self.split == "even" else (layout.n_visual,)
        shares = ops.shares(sizes, n_keep, even=True)
        return Ops(sum(n * n_cosine_rows(n, k) * widths.rows for n, k in zip(sizes, shares, strict=True) if k))

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        if self.split == "even" and len(tokens.layout.crops) > 1:
            shares = ops.shares(tokens.layout.crop_sizes, n_keep, even=True)
            return crop_by_crop(tokens, shares, lambda crop, n: crop.keeping(self.order(crop, n)))
        return tokens.keeping(self.order(tokens, n_keep))

    def order(self, tokens: VisualTokens, n_keep: int) -> Tensor:
        """Indices in the order they are chosen, (G, n_keep)."""
        cosines = Cosines(tokens.features)
        saliency = self._saliency(tokens)
        share = saliency / saliency.amax(1, keepdim=True).clamp(min=1e-30)

        def rank(gain: Tensor) -> Tensor:
            joined = gain * share if self.combine == "multiply" else gain + saliency
            # 1 + what decides while there is any gain, then saliency below 1: one ranking, no read from the device
            return torch.where(gain > LEAST, 1 + joined, share.clamp(max=1))

        return greedy(cosines.rows, lambda newest: cosines.rows(newest[:, None])[:, 0], tokens.keep, n_keep, rank)

    def _saliency(self, tokens: VisualTokens) -> Tensor:
        """a^alpha, (G, N) float64."""
        if not self.alpha:
            return torch.ones_like(tokens.keep, dtype=torch.float64)
        return cls_values(tokens)[:, 0].double().clamp(min=0).pow(self.alpha)
