"""SparseVLM: relevant text tokens rate the visual ones; some of the dropped are merged and kept."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, cast

from ..core import ops
from ..core.budget import REFERENCE_TEXT
from ..core.layout import Layout
from ..core.lazy import torch
from ..core.schedules import PAPER_DEPTH, Schedule
from ..core.signals import Decoder, Kind, Signal
from ..core.tokens import Count, VisualTokens
from ..cost.flops import Ops
from ..cost.selection import Widths
from .clustering import cluster_means
from .decoder import DecoderMethod

if TYPE_CHECKING:
    from torch import Tensor

TABLES = ((66, 30, 17), (238, 48, 26), (303, 110, 36), (300, 200, 110))  # of 576, after each cut
TABLE_SIZE = 576


@dataclass(frozen=True)
class Tables(Schedule):
    """The code's tables, as fractions of the tokens received; between them log-linear in what is left at the end."""

    def ratios(self, decoder: Decoder, keep: float) -> dict[int, float]:
        """Outside of the tables: the ratios of the nearest, to what is left at the end, at most 1."""
        logs = [[math.log(n / TABLE_SIZE) for n in table] for table in TABLES]
        wanted = math.log(keep)
        at = min(max(wanted, logs[0][-1]), logs[-1][-1])
        low, high = next(pair for pair in itertools.pairwise(logs) if at <= pair[1][-1])
        share = (at - low[-1]) / (high[-1] - low[-1])
        curve = [min(math.exp(a + share * (b - a) + wanted - at), 1.0) for a, b in zip(low, high, strict=True)]
        # The paper drops after its layers 2, 6 and 15.
        return {decoder.scaled(i, PAPER_DEPTH): ratio for i, ratio in zip((3, 7, 16), curve, strict=True)}


@dataclass(frozen=True)
class SparseVLM(DecoderMethod):
    """Three cuts by the attention of rater tokens; what was nearly kept is clustered into a few more tokens.

    Raters are the text tokens t with m_t > mean(m), m = mean over visual tokens v of softmax_t(E_v . E_t), on
    embeddings at the input of the language model. s_i = mean over raters and heads of the attention to i in the layer
    before the cut. Of d dropped tokens the best int(0.3 d) + 1 = r are recycled: density-peak clustering
    (DPC-KNN) into int(r / 10) + 1 groups, and the mean of each (sum / (number + 1e-6)) is one token.

    Source:   "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
              SparseVLM, ICML 2025, arXiv 2410.04417; code: Gumpest/SparseVLMs@26a5f48, first version.
    Faithful: raters, scores, kept and recycled tokens and merged states agree with the authors' code (golden cases
              sparsevlm).
    Differs:  the budget counts merged tokens, where the tables leave them out (`faithful` does too). A merged token
              stands at the place and position of its cluster's centre, in the code behind all kept ones. Ties of the
              clustering go to the lower index, in the code to chance. Budgets between the tables are interpolated.
              Where a budget has room for no more than the clusters, one token is kept and there are fewer clusters;
              a budget of 1 merges nothing. Two numbers of kept tokens can have the same total with their merged ones;
              then the larger is taken.
    Needs:    LM_TEXT_ROWS of the layer before every cut, LM_EMBEDS, LM_TEXT_EMBEDS. Text-guided.
              Cost: O(N T D) for raters, O(H T n d) for rows and O(r^2 D) for clusters a cut.

    Args:
        recycle: merge some of the dropped tokens; False only drops.
        faithful: counts are those of kept tokens, and merged ones come on top, as in the code: `cuts` has the totals.
    """

    recycle: bool = True
    faithful: bool = False

    keeps_features = property(lambda self: not self.recycle)
    source: ClassVar[str] = "SparseVLM, ICML 2025, arXiv 2410.04417"

    @property
    def default_schedule(self) -> Schedule:
        return Tables()

    @property
    def count(self) -> Count:
        """With merged tokens on top there is no guarantee; `cuts` has the number."""
        return Count.CONTENT if self.faithful and self.recycle else Count.EXACT

    def left(self, n_present: int, n_keep: int) -> int:
        """The budget; with `faithful`, plus merged tokens."""
        n_best = self.paper_count(n_present, n_keep)
        return n_best + self.n_clusters(n_present - n_best) if self.faithful else n_keep

    def n_best(self, n_present: int, n_keep: int) -> int:
        """How many are kept unmerged, so that `n_keep` are left with the merged ones; at least one."""
        fitting = (k for k in range(n_keep, 0, -1) if k + self.n_clusters(n_present - k) == n_keep)
        return next(fitting, 1)

    def n_clusters(self, n_dropped: int) -> int:
        """Number of merged tokens for a number of dropped ones."""
        return n_recycled(n_dropped) // 10 + 1 if n_dropped and self.recycle else 0

    @staticmethod
    def paper_count(n_present: int, n_table: int) -> int:
        """Kept tokens of a stage in the code, from its table."""
        return min(n_table, n_present - 1)

    def reads(self, layer: int) -> frozenset[Signal]:
        rows = Signal(Kind.LM_TEXT_ROWS, (layer - 1,))
        return frozenset({rows, Signal(Kind.LM_EMBEDS), Signal(Kind.LM_TEXT_EMBEDS)})

    def cost(self, layout: Layout, n_keep: int, widths: Widths) -> Ops:
        """Raters, with a reference text, and distances of clusters."""
        n = layout.n_visual
        n_merged = n_recycled(n - self.n_best(n, n_keep)) if self.recycle else 0
        return Ops((REFERENCE_TEXT * n + n_merged**2) * widths.rows)

    def raters(self, visual: Tensor, text: Tensor) -> Tensor:
        """Which text tokens are raters, (G, T) bool; all of them if none is above the mean.

        Args:
            visual: (G, N, D) embeddings.
            text: (G, T, D); rows of zeros are padding.
        """
        exists = text.abs().amax(2) > 0
        logits = visual.float() @ text.float().transpose(1, 2)
        lowest = torch.finfo(logits.dtype).min
        m = logits.masked_fill(~exists[:, None], lowest).softmax(2).mean(1).masked_fill(~exists, 0)
        rates = (m > m.sum(1, keepdim=True) / exists.sum(1, keepdim=True).clamp(min=1)) & exists
        return torch.where(rates.any(1, keepdim=True), rates, exists)

    def score(self, tokens: VisualTokens) -> Tensor:
        rates = self.raters(tokens.signal(Kind.LM_EMBEDS), tokens.signal(Kind.LM_TEXT_EMBEDS)).float()
        rows = tokens.signal(Kind.LM_TEXT_ROWS) * rates[..., None]
        return rows.sum(1) / rates.sum(1, keepdim=True).clamp(min=1)

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        n_best = self.n_best(tokens.n_visual, n_keep)
        best, recycled = self.parts(tokens, n_best)
        if n_keep == n_best:
            return best
        centres, rows = self.merged(tokens, recycled, n_keep - n_best)
        return replace(best, keep=best.keep.scatter(1, centres, True), features=ops.put(best.features, centres, rows))

    def parts(self, tokens: VisualTokens, n_best: int) -> tuple[VisualTokens, Tensor]:
        """The tokens of which the best are kept, and the indices of the recycled ones, by descending score, (G, r)."""
        best = super().select(tokens, n_best)
        # Filtered tokens come last.
        ranked = cast("Tensor", best.scores).masked_fill(~tokens.keep, torch.finfo(torch.float32).min)
        order = ranked.masked_fill(best.keep, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        return best, order[:, : n_recycled(tokens.n_visual - n_best)]

    def merged(self, tokens: VisualTokens, recycled: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
        """Indices of cluster centres, (G, C), and the means of the clusters, (G, C, D) float32."""
        centres, means = cluster_means(ops.take(tokens.features, recycled), n_clusters)
        return recycled.gather(1, centres), means


def n_recycled(n_dropped: int) -> int:
    """How many of the dropped tokens are clustered."""
    return int(0.3 * n_dropped) + 1
