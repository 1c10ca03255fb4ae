"""TokenCorr: as many tokens as a picture has patterns, found by the correlation of keys and of [CLS]."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from ..core import ops
from ..core.errors import OptionError
from ..core.layout import Layout
from ..core.lazy import F, torch
from ..core.signals import Kind, Signal, Tower
from ..core.tokens import Count, VisualTokens
from ..cost.flops import Ops
from ..cost.selection import Widths
from .base import Method, WithoutCLS, cls_signal, cls_values
from .crops import crop_by_crop, is_thumbnail

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1024  # rows of cosines at a time


@dataclass(frozen=True)
class TokenCorr(Method):
    """Sample local tokens by early [CLS] attention, as many as are not repetitions, and add late outliers.

    A token of a crop is redundant when more than `repeats` of the crop's tokens have keys in an early layer with a
    cosine above `similar` to its own. As many tokens as are not, at least one, are drawn without
    replacement by the early [CLS] attention; the IQR outliers of the late [CLS] attention join them. A thumbnail
    of a picture with crops is kept whole.

    Source:   "Token-level Correlation-guided Compression", arXiv:2407.14439. A re-implementation from
              description: no code is published, and thresholds and layers here are ours.
    Faithful: there is nothing to compare with.
    Differs:  unknown; whether dropped tokens are merged into kept ones is not described.
    Needs:    KEYS of an early layer, CLS_ROW of an early and a late one. Text-agnostic. Cost: O(N^2 d) a crop.

    Args:
        similar: cosine above which two keys show the same pattern, -1..1.
        repeats: share of similar tokens above which a token is redundant, 0..1.
        sample: "seeded" draws, the same on every device; "top" takes the most attended.
        seed: of the draw.
        early, late: vision layers, absolute or negative from the end; None is 2 and 22 of 24, scaled.
        thumbnail: whether a thumbnail of a picture with crops is kept whole, or compressed like the crops.
        without_cls: what to do where the tower has no [CLS] token: "error", or "received" for what tokens receive.
    """

    similar: float = 0.9
    repeats: float = 0.2
    sample: Literal["seeded", "top"] = "seeded"
    seed: int = 0
    early: int | None = None
    late: int | None = None
    thumbnail: bool = True
    without_cls: WithoutCLS = "error"

    limits: ClassVar = {"similar": (-1, 1), "repeats": (0, 1)}
    source: ClassVar[str] = "arXiv:2407.14439"
    cpu_rate: ClassVar[float] = 120e9
    if_missing: ClassVar[str] = "without_cls=received"

    @property
    def takes_budget(self) -> bool:
        return False

    @property
    def count(self) -> Count:
        return Count.CONTENT

    def needs(self, tower: Tower) -> frozenset[Signal]:
        early = tower.scaled(2, 24) if self.early is None else tower.layer(self.early)
        late = tower.scaled(22, 24) if self.late is None else tower.layer(self.late)
        if early > late:
            raise OptionError(f"early is layer {early}, after late, layer {late}; use an early layer up to {late}")
        layers = tuple(sorted({early, late}))
        return frozenset({Signal(Kind.KEYS, (early,)), cls_signal(tower, layers, self.without_cls)})

    def cost(self, layout: Layout, n_keep: int, widths: Widths) -> Ops:
        """All cosines of keys within crops."""
        return Ops(sum(n * n * widths.keys for n in layout.crop_sizes))

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        whole = self.thumbnail and len(tokens.layout.crops) > 1 and tokens.layout.crops[0] == 0
        noisy = replace(tokens, scores=self._noise(tokens))
        out = replace(crop_by_crop(noisy, tokens.layout.crop_sizes, self._compress), scores=tokens.scores)
        if not whole:
            return out
        return replace(out, keep=out.keep | is_thumbnail(out.layout, out.keep.device))

    def _compress(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        attention = cls_values(tokens)
        n_local = self.n_distinct(tokens).clamp(min=1)[:, None]
        assert tokens.scores is not None  # noqa: S101 - the noise
        order = tokens.scores + attention[:, 0].clamp(min=1e-30).log()
        rank = order.argsort(dim=1, descending=True, stable=True).argsort(1)
        return replace(tokens, keep=(rank < n_local) | ops.outliers(attention[:, -1]))

    def n_distinct(self, tokens: VisualTokens) -> Tensor:
        """(G,) int64: tokens that are not redundant, d N."""
        others = _n_similar(tokens.signal(Kind.KEYS)[:, 0].flatten(2), self.similar) - 1  # a token is like itself
        return (others <= self.repeats * tokens.n_visual).sum(1)

    def _noise(self, tokens: VisualTokens) -> Tensor:
        """(G, N) Gumbel noise, drawn by crop: the highest sums with it are a draw without replacement."""
        if self.sample == "top":
            return torch.zeros_like(tokens.keep, dtype=torch.float32)
        layout, noise = tokens.layout, torch.empty(tokens.keep.shape, dtype=torch.float64)
        for row, salt in enumerate(tokens.salts):
            for crop, index in zip(layout.crops, layout.places_by_crop, strict=True):
                mixed = ((self.seed * 1_000_003 + len(index)) * 1_000_003 + salt) * 1_009 + crop
                draw = torch.Generator().manual_seed(mixed % 2**63)
                uniform = torch.rand(len(index), generator=draw, dtype=torch.float64)
                noise[row, list(index)] = -(-uniform.clamp(min=1e-30).log()).log()
        return noise.float().to(tokens.keep.device, non_blocking=True)


def _n_similar(x: Tensor, least: float) -> Tensor:
    """(G, N): how many rows of (G, N, D) have a cosine above `least` to each, itself among them; pairs count once."""
    unit = F.normalize(x.float(), dim=-1)
    found = torch.zeros_like(unit[..., 0])
    for first in range(0, x.shape[1], BLOCK):
        rows = unit[:, first : first + BLOCK]
        # Ones and zeros in place of the cosines: their float32 sums are exact, and faster than those of bool.
        near = (rows @ unit[:, first:].transpose(1, 2)).gt_(least)
        found[:, first : first + BLOCK] += near.sum(2)
        found[:, first + BLOCK :] += near[:, :, BLOCK:].sum(1)
    return found
