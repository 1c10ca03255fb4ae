"""CDPruner: keep tokens that differ from each other, more so those that matter for the text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ..core import kernels, ops
from ..core.layout import Layout
from ..core.lazy import F, torch
from ..core.signals import Kind, Signal, Tower
from ..core.tokens import VisualTokens
from ..cost.flops import Ops
from ..cost.selection import Widths
from .base import Method, Split
from .crops import crop_by_crop
from .panels import are_many, chosen_in_panels

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
    Needs:    TEXT_EMBEDS. Cost: O(N^2 D + K^2 N). Beyond 4,096 tokens no N x N matrix is held on a CPU.

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
        if are_many(features):
            return chosen_in_panels(_Determinant(features, relevance, n_keep), n_keep)
        kernel = relevance[:, :, None] * ops.cosine(features) * relevance[:, None]
        if (order := kernels.determinant(kernel, relevance, n_keep, LEAST)) is not None:
            return order
        residual = kernel.diagonal(dim1=1, dim2=2).clone()
        basis = kernel.new_zeros(len(kernel), n_keep, kernel.shape[1])
        rest, chosen = relevance.clamp(max=1), []
        for i in range(n_keep):
            newest = ops.first_highest(_rank(residual, rest))[:, None]
            own, column = residual.gather(1, newest), newest[:, None].expand(-1, i, 1)  # (G, 1), (G, i, 1)
            row = kernel.gather(1, newest[..., None].expand(-1, 1, kernel.shape[2]))[:, 0]
            known = (basis[:, :i].gather(2, column).transpose(1, 2) @ basis[:, :i])[:, 0]
            basis[:, i] = torch.where(own > LEAST, (row - known) / own.clamp(min=LEAST).sqrt(), 0.0)
            residual = (residual - basis[:, i].square()).clamp(min=0)
            residual, rest = residual.scatter(1, newest, 0), rest.scatter(1, newest, -torch.inf)
            chosen.append(newest[:, 0])
        return torch.stack(chosen, 1)


def _rank(residual: Tensor, rest: Tensor) -> Tensor:
    """2 + residual while there is any, then relevance of at most 1, -inf for chosen ones: no read from the device."""
    return torch.where(residual > LEAST, 2 + residual, rest)


class _Determinant:
    """Worth is the residual, then relevance; see `panels.Choice`.

    A panel is a pivoted Cholesky decomposition among its candidates; `settle` extends its rows to all N.
    """

    def __init__(self, features: Tensor, relevance: Tensor, n_keep: int):
        self._rows = F.normalize(features.float(), dim=-1) * relevance[..., None]  # the kernel is their product
        self._rest = relevance.clamp(max=1)
        self._residual = self._rows.square().sum(2)
        self._basis = self._rows.new_zeros(len(features), n_keep, features.shape[1])
        self._n_chosen = 0

    def worth(self) -> Tensor:
        return _rank(self._residual, self._rest)

    def open(self, candidates: Tensor) -> None:
        rows, basis = ops.take(self._rows, candidates), self._basis_at(candidates)
        self._candidates = candidates
        self._between = rows @ rows.transpose(1, 2) - basis.transpose(1, 2) @ basis
        self._inside, self._inside_rest = (x.gather(1, candidates) for x in (self._residual, self._rest))
        self._steps: list[Tensor] = []
        self._places: list[Tensor] = []

    def worth_inside(self) -> Tensor:
        return _rank(self._inside, self._inside_rest)

    def choose(self, place: Tensor) -> None:
        place = place[:, None]
        own = self._inside.gather(1, place)
        row = self._between.gather(1, place[..., None].expand_as(self._between[:, :1]))[:, 0]
        step = torch.where(own > LEAST, row / own.clamp(min=LEAST).sqrt(), 0.0)
        self._between = self._between - step[:, :, None] * step[:, None]
        self._inside = (self._inside - step.square()).clamp(min=0).scatter(1, place, 0)
        self._inside_rest = self._inside_rest.scatter(1, place, -torch.inf)
        self._steps.append(step)
        self._places.append(place)

    def settle(self, chosen: Tensor) -> None:
        places = torch.cat(self._places, 1)[:, None].expand(-1, len(self._steps), -1)
        # (G, P, P): what the steps took of the chosen ones, a row for each; a step without residual is the unit vector
        factor = torch.stack(self._steps, 1).gather(2, places).transpose(1, 2).tril()
        empty = factor.diagonal(dim1=1, dim2=2) == 0
        factor = factor.masked_fill(empty[..., None], 0) + torch.diag_embed(empty.to(factor))
        basis = self._basis[:, : self._n_chosen]
        rest = ops.take(self._rows, chosen) @ self._rows.transpose(1, 2)
        rest = rest - self._basis_at(chosen).transpose(1, 2) @ basis
        new = torch.linalg.solve_triangular(factor, rest.masked_fill(empty[..., None], 0), upper=False)
        self._basis[:, self._n_chosen : self._n_chosen + new.shape[1]] = new
        self._n_chosen += new.shape[1]
        self._residual = (self._residual - new.square().sum(1)).clamp(min=0).scatter(1, chosen, 0)
        self._rest = self._rest.scatter(1, chosen, -torch.inf)

    def _basis_at(self, index: Tensor) -> Tensor:
        """(G, chosen so far, C): the basis at tokens (G, C)."""
        basis = self._basis[:, : self._n_chosen]
        return basis.gather(2, index[:, None].expand(-1, basis.shape[1], -1))
