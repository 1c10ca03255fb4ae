"""GlobalCom²: the thumbnail decides how much each crop keeps, and helps to rank its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ..core import ops
from ..core.errors import OptionError
from ..core.lazy import torch
from ..core.signals import Form, Kind, Signal, Tower
from ..core.tokens import Count, VisualTokens
from . import crops as mosaic
from .base import ScoreMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GlobalCom2(ScoreMethod):
    """Split the budget over crops by the thumbnail's scores; within a crop, use the scores of both.

    g and c_j are the [CLS] scores of thumbnail and crop j. Crop j weighs r_j = 1 + s_j - mean(s), s the softmax of
    the sums of g over the thumbnail's cells, divided by `temperature`. A token of crop j scores
    g'/|g'| + c_j/|c_j|, g' the thumbnail's map interpolated to where the token lies. Thumbnail and crops get
    N_t : N_j r_j of the budget. Without a thumbnail (video) crops share evenly and score by themselves.

    Source:   "Global Compression Commander", arXiv:2501.05179; code: xuyang-liu16/GlobalCom2@96b2d00.
    Faithful: retention ratios, counts, kept sets and sequences agree with the authors' code (golden cases
              globalcom2), with faithful=True.
    Differs:  the exact budget by largest remainder, where the code truncates and loses what a full crop cannot take;
              tokens stay where they lie, where the code mixes up the columns of padded crops and leaves the thumbnail
              in the order of scores. faithful=True does as the code does, but for newlines: it keeps one
              for every row that the model has, not for rows of padding. The fallback without [CLS] is from a
              description, on the rows the language model sees.
    Needs:    CLS_ROW of the last layer; nothing where there is no [CLS]. Text-agnostic. Cost: O(N).

    Args:
        form: [CLS] scores before ("logits", the code) or after ("softmax") the softmax. temperature suits logits.
        layer: vision layer, absolute or negative from the end. None is the last one.
        temperature: of the softmax over crops, above 0; 5 to 20 in the paper.
        alpha: None adds scores of unit length; 0..1 mixes alpha g' + (1 - alpha) c_j instead.
        allocate: "richness", or "even" for the control that gives every crop of the mosaic the same ratio.
        renormalise: ratios that were clipped to 1 make the others larger, as in the first release.
        faithful: truncate counts and order tokens as the authors' code does.
        ratio: with faithful, the ratio to keep as the paper takes it; None is the budget's.
    """

    form: Form = "logits"
    layer: int | None = None
    temperature: float = 10.0
    alpha: float | None = None
    allocate: Literal["richness", "even"] = "richness"
    renormalise: bool = False
    faithful: bool = False
    ratio: float | None = None

    limits: ClassVar = {"temperature": (1e-6, 1e6), "alpha": (0, 1), "ratio": (0, 1)}
    source: ClassVar[str] = "arXiv:2501.05179"

    def __post_init__(self):
        super().__post_init__()
        if self.ratio is not None and not self.faithful:
            raise OptionError("GlobalCom2: ratio needs faithful=True; otherwise use keep_ratio=0.25 as the budget")

    @property
    def count(self) -> Count:
        """Truncation loses a few tokens; how many depends on the picture."""
        return Count.CONTENT if self.faithful else Count.EXACT

    @property
    def newlines(self) -> Literal["keep_rows_with_tokens", "keep", "drop"]:
        """The authors' code keeps them all."""
        return "keep" if self.faithful else "keep_rows_with_tokens"

    def needs(self, tower: Tower) -> frozenset[Signal]:
        layers = ((tower.default_layer(-1) if self.layer is None else tower.layer(self.layer)),)
        return frozenset({Signal(Kind.CLS_ROW, layers, self.form)} if tower.has_cls else ())

    def score(self, tokens: VisualTokens) -> Tensor:
        own, layout = self._own(tokens), tokens.layout
        if len(layout.crops) == 1 or layout.crops[0] != 0:
            return own
        shared = mosaic.thumbnail_on_mosaic(own, layout)
        if self.alpha is not None:
            mixed = self.alpha * shared + (1 - self.alpha) * own
        else:
            both = torch.stack([shared, own], 2)
            mixed = (both / mosaic.norm_by_crop(both, layout)).sum(2)
        return torch.where(mosaic.is_thumbnail(layout, own.device), own, mixed)

    def retention(self, tokens: VisualTokens, ratio: float) -> Tensor:
        """(G, crops of the mosaic) in 0..1: the share that each may keep where the mean is `ratio`."""
        layout, own = tokens.layout, self._own(tokens)
        grid = own[:, ops.on_device(layout.regions[0].index, own.device)]
        sums = mosaic.counts_by_cell(grid, mosaic.thumbnail_cells(layout), layout)
        weights = torch.zeros_like(sums) if self.allocate == "even" else (sums / self.temperature).softmax(1)
        kept = (ratio * (1 + weights - weights.mean(1, keepdim=True))).clamp(max=1)
        if self.renormalise:
            mean = kept.mean(1, keepdim=True)
            is_met = (mean - ratio).abs() <= 1e-8 + 1e-5 * ratio
            kept = torch.where(is_met, kept, (kept * ratio / mean).clamp(max=1))
        return kept

    def chosen(self, ranked: Tensor, tokens: VisualTokens, n_keep: int) -> Tensor:
        layout = tokens.layout
        if len(layout.crops) == 1 and not self.faithful:
            return super().chosen(ranked, tokens, n_keep)
        if layout.crops[0] != 0:
            return mosaic.top_by_crop(ranked, layout, ops.shares(layout.crop_sizes, n_keep, even=True))
        ratio = n_keep / layout.n_visual if self.ratio is None else self.ratio
        retention = self.retention(tokens, ratio) if len(layout.crops) > 1 else ranked.new_zeros(len(ranked), 0)
        share = torch.nn.functional.pad(retention, (1, 0), value=ratio) * ops.on_device(
            layout.crop_sizes, ranked.device
        )
        counts = share.long() if self.faithful else ops.allocate(share, layout.crop_sizes, n_keep)
        return mosaic.top_by_crop(ranked, layout, counts)

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        out = super().select(tokens, n_keep)
        return mosaic.rearranged(out, self.paper_order(out)) if self.faithful else out

    def paper_order(self, tokens: VisualTokens) -> Tensor:
        """(G, N): kept tokens in the order of the code's sequence, newlines left out; then the others."""
        key = (
            ops.on_device(mosaic.compacted_places(tokens.layout), tokens.keep.device).double().expand(tokens.keep.shape)
        )
        rank = self.score(tokens).argsort(dim=1, descending=True, stable=True).argsort(1)
        key = torch.where(mosaic.is_thumbnail(tokens.layout, key.device), rank.double() - 1e9, key)
        return key.masked_fill(~tokens.keep, torch.inf).argsort(dim=1, stable=True)

    def _own(self, tokens: VisualTokens) -> Tensor:
        """Scores of every token in its own crop, (G, N)."""
        if tokens.has(Kind.CLS_ROW):
            return tokens.signal(Kind.CLS_ROW, self.form)[:, 0]
        return mosaic.unlike_mean(tokens.features, tokens.layout)
