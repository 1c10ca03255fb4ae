"""DART: keep a few pivots, and for each the tokens that are least like it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from ..core import ops
from ..core.errors import OptionError
from ..core.layout import Layout
from ..core.lazy import F, torch
from ..core.signals import Kind, Signal
from ..core.tokens import Count, VisualTokens
from ..cost.flops import Ops
from ..cost.selection import Widths
from .decoder import DecoderMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DART(DecoderMethod):
    """One cut; duplicates are dropped, regardless of attention.

    Pivots are the visual and the text tokens with the largest L1 norm of keys (all heads) in the layer before the cut.
    They are visited one after the other, visual ones first, then text, each by descending norm; every pivot keeps the
    `quota` visual tokens, of those that are left, whose hidden states have the lowest cosine to its own. Visual pivots
    are kept too. quota = ceil((budget - visual pivots) / pivots), and the budget ends it.

    Source:   "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",
              DART, EMNLP 2025, arXiv 2502.11494. The authors' repository was not available: checked against
              Tencent/AngelSlim@67394ce and ModelTC/LightCompress@9701d03.
    Faithful: pivots, order and kept sets agree with AngelSlim; with LightCompress where its order of pivots is given
              (golden cases dart).
    Differs:  LightCompress visits pivots in the order of a Python set, which is nobody's intention, and compares states
              behind the final norm; here they are compared as they are. A budget below the number of visual pivots
              keeps the first of them. `uniform` has no place here: nothing is ranked.
    Needs:    LM_KEYS and LM_TEXT_KEYS of the layer before the cut, LM_TEXT_STATES. Text-guided. Cost: O(P n D).

    Args:
        pivots: visual pivots, from 1.
        text_pivots: text pivots, fewer where there is less text.
        text: where those come from: the text after the image, or all of the prompt (AngelSlim).
        faithful: LightCompress' count, pivots + all pivots x int(budget / all pivots), which is not the budget.
    """

    pivots: int = 4
    text_pivots: int = 4
    text: Literal["after", "all"] = "after"
    faithful: bool = False

    limits: ClassVar = {"uniform": (0, 1), "pivots": (1, 1e6), "text_pivots": (0, 1e6)}
    source: ClassVar[str] = "DART, EMNLP 2025, arXiv 2502.11494"

    def __post_init__(self):
        super().__post_init__()
        if self.uniform:
            raise OptionError(f"DART ranks nothing, so uniform={self.uniform} has no effect; leave it out")

    @property
    def count(self) -> Count:
        """With LightCompress' count there is no guarantee; `cuts` has the number."""
        return Count.CONTENT if self.faithful else Count.EXACT

    def left(self, n_present: int, n_keep: int) -> int:
        return self.overshoot(n_keep) if self.faithful else n_keep

    def overshoot(self, budget: int) -> int:
        n_pivots = self.pivots + self.text_pivots
        return self.pivots + n_pivots * (budget // n_pivots)

    def paper_count(self, n_visual: int, reduction_ratio: float) -> int:
        """AngelSlim's count, or LightCompress'; the ratio is what goes, 0..1."""
        kept = n_visual * (1 - reduction_ratio)
        return self.overshoot(int(kept)) if self.faithful else round(kept)

    def reads(self, layer: int) -> frozenset[Signal]:
        text_keys = Signal(Kind.LM_TEXT_KEYS, (layer - 1,), text=self.text)
        return frozenset({Signal(Kind.LM_KEYS, (layer - 1,)), text_keys, Signal(Kind.LM_TEXT_STATES, text=self.text)})

    def cost(self, layout: Layout, n_keep: int, widths: Widths) -> Ops:
        """Cosines to all pivots."""
        return Ops((self.pivots + self.text_pivots) * layout.n_visual * widths.rows)

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        visual = self.visual_pivots(tokens, n_keep)
        text, exists = self.text_pivots_of(tokens)
        states = [ops.take(tokens.features, visual), ops.take(tokens.signal(Kind.LM_TEXT_STATES), text)]
        pivots = torch.cat([s.float() for s in states], 1)
        return self.around(tokens, visual, pivots, torch.cat([torch.ones_like(visual) > 0, exists], 1), n_keep)

    def visual_pivots(self, tokens: VisualTokens, n_keep: int) -> Tensor:
        """Indices of at most `n_keep` visual pivots, by descending norm, (G, P)."""
        norms = tokens.signal(Kind.LM_KEYS).abs().sum((2, 3)).masked_fill(~tokens.keep, -1.0)
        return _largest(norms, min(self.pivots, n_keep))[0]

    def text_pivots_of(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        """Indices of text pivots, by descending norm, (G, P), and which of them are not padding."""
        index, norms = _largest(tokens.signal(Kind.LM_TEXT_KEYS).abs().sum((2, 3)), self.text_pivots)
        return index, norms > 0

    def around(self, tokens: VisualTokens, visual: Tensor, pivots: Tensor, exists: Tensor, n_keep: int) -> VisualTokens:
        """Exactly `n_keep` tokens: the visual pivots at (G, P_v), and those least like pivots (G, P, D), in turn.

        Args:
            tokens: what to choose from.
            visual: (G, P_v) their indices, at most n_keep.
            pivots: (G, P, D) states of all pivots, in the order of their turns.
            exists: (G, P) bool; False is padding.
            n_keep: 1..n.
        """
        unit = F.normalize(tokens.features.float(), dim=-1)
        near = F.normalize(pivots.float(), dim=-1) @ unit.transpose(1, 2)  # (G, P, n)
        near = torch.where(tokens.keep[:, None], near, near + 4)  # what a filter dropped comes last
        keep = torch.zeros_like(tokens.keep).scatter(1, visual, True)
        rank = torch.arange(tokens.n_visual, device=keep.device)
        n_pivots, left = exists.sum(1, keepdim=True), torch.full_like(visual[:, :1], n_keep - visual.shape[1])
        quota = (left + n_pivots - 1) // n_pivots
        for i in range(pivots.shape[1]):
            taken = torch.minimum(quota, left) * exists[:, i : i + 1]
            order = near[:, i].masked_fill(keep, torch.inf).sort(dim=1, stable=True).indices
            keep = keep | torch.zeros_like(keep).scatter(1, order, rank < taken)
            left = left - taken
        return replace(tokens, keep=keep)


def _largest(norms: Tensor, n: int) -> tuple[Tensor, Tensor]:
    values, index = norms.sort(dim=1, descending=True, stable=True)
    return index[:, :n], values[:, :n]
