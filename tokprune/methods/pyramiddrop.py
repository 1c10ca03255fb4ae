"""PyramidDrop: cut several times, each time a part of what is left, by the next layer's own attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..core.lazy import torch
from ..core.schedules import Pyramid, Schedule
from ..core.signals import Kind, Signal
from ..core.tokens import VisualTokens
from .decoder import DecoderMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PyramidDrop(DecoderMethod):
    """Cuts before layers 8, 16 and 24 of 32; before layer l it uses the attention of layer l.

    s_i = mean_h A_l[h, last prompt token, i], computed with the input norm and the projections of layer l on the
    hidden states at its input; the softmax runs over the whole row, text among it. The same factor at every cut, so
    that the budget is left after the last; the paper's factor 1/2 is keep_ratio=0.125.

    Source:   "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
              PyramidDrop, CVPR 2025, arXiv 2410.17247; code: Cooperx521/PyramidDrop@6444f30.
    Faithful: kept sets and counts agree with the authors' code (golden cases pyramiddrop).
    Differs:  what is kept keeps the position that it came with, where the code counts positions anew behind every cut
              (`paper_positions`); counts are rounded half up, the code truncates; every image of a prompt is cut, the
              code cuts the first.
    Needs:    LM_ROW of the layer behind every cut. Text-guided. Cost: O(n D^2) for keys and O(H n d) a cut.
    """

    source: ClassVar[str] = "PyramidDrop, CVPR 2025, arXiv 2410.17247"

    @property
    def default_schedule(self) -> Schedule:
        return Pyramid()

    def reads(self, layer: int) -> frozenset[Signal]:
        return frozenset({Signal(Kind.LM_ROW, (layer,))})

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.signal(Kind.LM_ROW)[:, 0]

    @staticmethod
    def paper_count(n_original: int, ratio: float) -> int:
        """The code's count: a fraction of the tokens before the first cut, truncated."""
        return int(n_original * ratio)


def paper_positions(lengths: Tensor) -> Tensor:
    """Positions as the authors' code counts them after a cut, (B, longest): 0, 1, 2 .. and 0 in the right padding.

    Args:
        lengths: (B,) int64, host side: columns of every row that are left, text among them.
    """
    places = torch.arange(int(lengths.max()))
    return torch.where(places < lengths[:, None], places, 0)
