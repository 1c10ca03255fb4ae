"""CDPruner: keep tokens that differ from each other, more so those that matter for the text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ..core import ops
from ..core.layout import Layout
from ..core.lazy import F, torch
from ..core.signals import Kind, Signal, Tower
from ..core.tokens import VisualTokens
from ..cost.flops import Ops
from ..cost.selection import Widths
from .base import Method, Split
from .crops import crop_by_crop

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 1e-6  # residuals up to here are rounding: the rank of the features is exhausted


@dataclass(frozen=True)
class CDPruner(Method):
    """The most probable set of a determinantal point process, conditioned on the text.

    With S the cosines of the visual tokens and q their relevance, scaled to 0..1, the kernel is diag(q) S diag(q);
    tokens are chosen greedily, each the one with the largest residual. Relevance is minus the mean cosine to the
    embeddings of the text: the paper's sign.

    Source:   "Beyond Attention or Similarity: Maximizing Conditional Diversity", arXiv:2506.10967; code:
              Theia-4869/CDPruner@9541616.
    Faithful: relevance, kept sets and order agree with the authors' code, given its embeddings (golden cases cdpruner).
    Differs:  the paper compares CLIP's text tower with CLIP's projected patches; here no second model is loaded, and
              the language model's own embeddings of all the text of the prompt are compared with the rows that it
              sees. So tokens are selected when the language model runs, in a hook before it, not when pictures are
              encoded. Relevance is scaled over one image, where the code takes the batch. Residuals are clamped;
              beyond the rank of the features the most relevant tokens fill up.
    Needs:    TEXT_EMBEDS. Cost: O(N^2 D + K^2 N).

    Args:
        split: "joint" looks at all tokens of an image together, "even" gives every crop the same share, as the code.
        invert: the paper's sign, which CLIP's inverted patch-to-text cosines ask for; without it, tokens like the text
            are relevant.
    """

    split: Split = "joint"
    invert: bool = True

    source: ClassVar[str] = "arXiv:2506.10967"

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({Signal(Kind.TEXT_EMBEDS)})

    def cost(self, layout: Layout, n_keep: int, widths: Widths) -> Ops:
        """All cosines, the updates, and one product with the mean direction of the text."""
        sizes = layout.crop_sizes if self.split == "even" else (layout.n_visual,)
        shares = ops.shares(layout.crop_sizes, n_keep, even=True) if self.split == "even" else (n_keep,)
        pairs = [(n, k) for n, k in zip(sizes, shares, strict=True) if k]
        updates = sum(n * k * (k - 1) // 2 for n, k in pairs)
        return Ops(updates + (sum(n * n for n, _ in pairs) + layout.n_visual) * widths.rows)

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        relevance = self.relevance(tokens.features, tokens.signal(Kind.TEXT_EMBEDS))
        return self.choose(tokens, relevance, n_keep)

    def relevance(self, embeds: Tensor, text: Tensor) -> Tensor:
        """(G, N) in 0..1; embeds (G, N, D), text (G, T, D) with rows of zeros where there is none."""
        n_text = (text != 0).any(-1).sum(1).clamp(min=1)[:, None]
        # The mean of cosines is the product with the sum of unit vectors.
        direction = F.normalize(text.float(), dim=-1).sum(1)[..., None] / n_text[..., None]
        near = (F.normalize(embeds.float(), dim=-1) @ direction)[..., 0]
        near = -near if self.invert else near
        low, high = near.amin(1, keepdim=True), near.amax(1, keepdim=True)
        return (near - low + 1e-6) / (high - low).clamp(min=1e-6)

    def choose(self, tokens: VisualTokens, relevance: Tensor, n_keep: int) -> VisualTokens:
        if self.split == "joint" or len(tokens.layout.crops) == 1:
            return tokens.keeping(self.order(tokens.features, relevance, n_keep))
        shares = ops.shares(tokens.layout.crop_sizes, n_keep, even=True)
        # Relevance travels with the tokens of a crop as one more channel.
        wide = replace(tokens, features=torch.cat([tokens.features.float(), relevance[..., None]], 2))
        chosen = crop_by_crop(
            wide, shares, lambda c, n: c.keeping(self.order(c.features[..., :-1], c.features[..., -1], n))
        )
        return replace(tokens, keep=chosen.keep)

    def order(self, features: Tensor, relevance: Tensor, n_keep: int) -> Tensor:
        """Indices in the order they are chosen, (G, n_keep)."""
        kernel = relevance[:, :, None] * ops.cosine(features) * relevance[:, None]
        residual = kernel.diagonal(dim1=1, dim2=2).clone()
        basis = kernel.new_zeros(len(kernel), n_keep, kernel.shape[1])
        free, chosen = torch.ones_like(residual, dtype=torch.bool), []
        for i in range(n_keep):
            # 2 + residual while there is any, then relevance below 1: one ranking, no read from the device
            rank = torch.where(residual > LEAST, 2 + residual, relevance.clamp(max=1))
            newest = ops.first_highest(rank.masked_fill(~free, -torch.inf))[:, None]
            own, column = residual.gather(1, newest), newest[:, None].expand(-1, i, 1)  # (G, 1), (G, i, 1)
            row = kernel.gather(1, newest[..., None].expand(-1, 1, kernel.shape[2]))[:, 0]
            known = (basis[:, :i].gather(2, column).transpose(1, 2) @ basis[:, :i])[:, 0]
            basis[:, i] = torch.where(own > LEAST, (row - known) / own.clamp(min=LEAST).sqrt(), 0.0)
            residual = (residual - basis[:, i].square()).clamp(min=0)
            free = free.scatter(1, newest, False)
            chosen.append(newest[:, 0])
        return torch.stack(chosen, 1)
