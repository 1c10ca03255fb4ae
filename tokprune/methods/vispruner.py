"""VisPruner: half of the tokens by attention, the others what is left when duplicates go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ..core import ops
from ..core.layout import Layout
from ..core.lazy import torch
from ..core.signals import Kind, Signal, Tower
from ..core.tokens import VisualTokens
from ..cost.flops import Ops
from ..cost.selection import Widths
from .base import Method, Split, WithoutCLS, cls_signal, cls_values, late_layer
from .coverage import HELD, Cosines
from .crops import crop_by_crop
from .neighbours import NearestOfMany, rounds_with_lists
from .panels import are_many

if TYPE_CHECKING:
    from torch import Tensor

STEP, OF = 8, 576  # tokens that leave in a round; of more than `HELD` as large a share as of the 576 of the paper


@dataclass(frozen=True)
class VisPruner(Method):
    """Important tokens by attention, diverse tokens by dropping duplicates from the rest, a few at a time.

    The important tokens are those that [CLS] attends to. The rest is put in order of falling attention. In every
    round it is split by parity of its places; those in even places that are most like one in an odd place, by cosine,
    leave; the others of them, by falling likeness, come before those in odd places in the next round.

    Source:   "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
              arXiv:2412.01818v2; code: Theia-4869/VisPruner@aefa01a. The port: Tencent/AngelSlim@67394ce.
    Faithful: important tokens and kept sets agree with the authors' code; with variant=angelslim, kept sets agree with
              the port (golden cases vispruner).
    Differs:  any budget: the code fails where the rest has an odd number of tokens, or fewer than 16. A crop keeps its
              share of the budget, where the code keeps as many of every crop. Of more than 4,096 tokens, 1 of 72 leaves
              in a round, as 8 of 576 in the paper. Where the model folds patches, states are their mean.
    Needs:    CLS_ROW of one layer, TOWER_STATES (not for variant=angelslim). Text-agnostic. Cost: O(N^2 D + N^3), of N
              tokens of a crop.

    Args:
        important: share of the kept tokens chosen by attention, 0..1.
        variant: "angelslim" as that port has it: rows of the language model are compared; the rest stays in raster
            order; the share is rounded, not truncated; the softmax of [CLS] is over patches alone.
        layer: vision layer of the attention, absolute or negative from the end. None is the one before the last, and
            the last one where the tower has no [CLS].
        split: "even" gives every crop the same share, as the code; "joint" looks at all tokens of an image together.
        without_cls: what to do where the tower has no [CLS] token: "error", or "received" for what tokens receive.
    """

    important: float = 0.5
    variant: Literal["authors", "angelslim"] = "authors"
    layer: int | None = None
    split: Split = "even"
    without_cls: WithoutCLS = "error"

    limits: ClassVar = {"important": (0, 1)}
    source: ClassVar[str] = "arXiv:2412.01818"
    if_missing: ClassVar[str] = "without_cls=received"

    def needs(self, tower: Tower) -> frozenset[Signal]:
        layers, is_port = (late_layer(tower, self.layer),), self.variant == "angelslim"
        attention = cls_signal(tower, layers, self.without_cls, special="none" if is_port else "keys")
        return frozenset({attention} if is_port else {attention, Signal(Kind.TOWER_STATES)})

    def cost(self, layout: Layout, n_keep: int, widths: Widths) -> Ops:
        """Cosines of the rest; of many tokens, those of what is left once more whenever half of them are gone."""
        sizes = layout.crop_sizes if self.split == "even" else (layout.n_visual,)
        width, spent = widths.rows if self.variant == "angelslim" else widths.states, 0
        for n, k in zip(sizes, ops.shares(sizes, n_keep, even=True), strict=True):
            n_important = self.n_important(k)
            rest, left = n - n_important, k - n_important
            rounds = self._rounds(rest, left) if left else []
            compared = rest**2 if rest <= HELD else sum(m**2 for m in rounds_with_lists(rounds))
            spent += compared * width if rounds else 0
        return Ops(spent)

    def n_important(self, n_keep: int) -> int:
        """How many of the kept tokens attention chooses."""
        share = n_keep * self.important
        return max(0, min(round(share), n_keep - 1)) if self.variant == "angelslim" else int(share)

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        if self.split == "joint" or len(tokens.layout.crops) == 1:
            return self._chosen(tokens, n_keep)
        return crop_by_crop(tokens, ops.shares(tokens.layout.crop_sizes, n_keep, even=True), self._chosen)

    def _chosen(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        n_important = self.n_important(n_keep)
        order = torch.sort(cls_values(tokens)[:, 0], dim=1, descending=True, stable=True).indices
        important, rest = order[:, :n_important], order[:, n_important:]
        if n_keep == n_important:
            return tokens.keeping(important)
        is_port = self.variant == "angelslim"
        rest = rest.sort(dim=1).values if is_port else rest
        compared = tokens.features if is_port else tokens.signal(Kind.TOWER_STATES)[:, 0]
        diverse = rest.gather(1, self.diverse(ops.take(compared, rest), n_keep - n_important))
        return tokens.keeping(torch.cat([important, diverse], 1))

    def diverse(self, x: Tensor, n_keep: int) -> Tensor:
        """Which of the rows (G, R, D) are left, (G, n_keep) in the order of the last round."""
        nearest, n = _nearest_of(x), x.shape[1]
        left = torch.arange(n, device=x.device).expand(len(x), n)
        for size in self._rounds(n, n_keep):
            even, odd = left[:, ::2], left[:, 1::2]
            n_leave = _n_leaving(n, size, n_keep)
            by_likeness = torch.sort(nearest(even, odd), dim=1, descending=True, stable=True).indices
            left = torch.cat([even.gather(1, by_likeness[:, n_leave:]), odd], 1)
            left = left.sort(dim=1).values if self.variant == "angelslim" else left
        return left

    def _rounds(self, n: int, n_keep: int) -> list[int]:
        """How many are left before every round."""
        sizes, size = [], n
        while size > n_keep:
            sizes.append(size)
            size -= _n_leaving(n, size, n_keep)
        return sizes


def _n_leaving(n: int, size: int, n_keep: int) -> int:
    """Of n rows, `size` of which are left, those that leave in a round: at most the ones in even places."""
    return min(STEP if n <= HELD else n * STEP // OF, size - n_keep, -(-size // 2))


def _nearest_of(x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of tokens (G, a) and others (G, b) to the largest cosine of each of the first, (G, a)."""
    if not are_many(x):
        return Cosines(x).nearest
    images = [NearestOfMany(own) for own in x]

    def nearest(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([image(*pair) for image, *pair in zip(images, first, second, strict=True)])

    return nearest
