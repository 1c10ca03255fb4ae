"""EVS: keep the tokens of a video that changed since the frame before."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from ..core.lazy import torch
from ..core.tokens import VisualTokens
from .base import RankMethod
from .frames import by_frame, unlike_mean, unlike_previous

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class EVS(RankMethod):
    """Keep the first frame, and then what differs most from the same place in the frame before.

    The distance is 1 - cosine of the rows that the language model sees. All tokens of the video are ranked together.

    Source:   "Efficient Video Sampling", arXiv:2510.14624, in the form that serving engines run: cosines of rows, where
              the paper compares pixels. Written from the formula.
    Faithful: distances, kept sets and counts agree with the formula (golden cases evs). `paper_count` is the engines'
              number of tokens, computed in exact arithmetic.
    Differs:  the budget is met, also below one frame, where the engines keep all of the first: then its tokens compete
              with the others, by their distance to its mean. So does a picture, which has no frame before.
    Needs:    nothing; TEXT_EMBEDS with split=query. Text-agnostic. Cost: O(N D).
    """

    source: ClassVar[str] = "arXiv:2510.14624"

    def score(self, tokens: VisualTokens) -> Tensor:
        """The distance to the frame before, 0..2; of the first frame to its own mean."""
        first = 1 + unlike_mean(by_frame(tokens)[:, :1])
        return torch.cat([first, unlike_previous(tokens)], 1).flatten(1)

    def chosen(self, ranked: Tensor, tokens: VisualTokens, n_keep: int) -> Tensor:
        n_frames, n = tokens.layout.frames
        if n_frames > 1 and n_keep >= n and self.split == "joint":
            first = ranked[:, :n]
            ranked = torch.cat([torch.where(first.isfinite(), torch.inf, first), ranked[:, n:]], 1)
        return super().chosen(ranked, tokens, n_keep)

    def paper_count(self, n_frames: int, n: int, pruned: float) -> int:
        """Tokens that the engines keep of n_frames x n: the rate rounded down, one frame at least."""
        return max(n, int(n_frames * n * (1 - Fraction(str(pruned)))))
