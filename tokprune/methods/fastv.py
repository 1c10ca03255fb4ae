"""FastV: after a few decoder layers keep the visual tokens that the last prompt token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..core.errors import OptionError
from ..core.schedules import Schedule, Single
from ..core.signals import Kind, Signal
from ..core.tokens import VisualTokens
from .decoder import DecoderMethod, checked_layer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FastV(DecoderMethod):
    """One cut before decoder layer K, by the attention that a token receives in layer K - 1.

    s_i = mean_h A_{K-1}[h, last prompt token, i]; the softmax runs over the whole row, text among it. What is kept
    keeps its position.

    Source:   "An Image is Worth 1/2 Tokens After Layer 2", FastV, ECCV 2024, arXiv 2403.06764.
    Faithful: kept sets, counts and positions agree with the authors' code (golden cases fastv).
    Differs:  every image of a batch by itself, where the code lets the first decide for all; no cut at layer 0, which
              the code makes a random one; the cut holds for the whole generation, as in the authors' version with a
              cache.
    Needs:    LM_ROW of one layer. Text-guided. Cost: O(H N d).

    Args:
        layer: K, the first layer that sees fewer tokens, absolute or negative from the end. None is the paper's 2 of
            32, scaled to this model's depth.
    """

    layer: int | None = None

    source: ClassVar[str] = "FastV, ECCV 2024, arXiv 2403.06764"

    def __post_init__(self):
        super().__post_init__()
        checked_layer(self.layer, "layer")
        if self.layer is not None and self.schedule is not None:
            raise OptionError(
                f"FastV: layer={self.layer} and a schedule both say where to cut; leave one out "
                f"(layer={self.layer} alone is schedule=single/{self.layer})"
            )

    @property
    def default_schedule(self) -> Schedule:
        return Single(self.layer)

    def reads(self, layer: int) -> frozenset[Signal]:
        return frozenset({Signal(Kind.LM_ROW, (layer - 1,))})

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.signal(Kind.LM_ROW)[:, 0]

    @staticmethod
    def paper_count(n_visual: int, pruned_ratio: float) -> int:
        """The code's count: half to even. The paper's ratio is what goes, 0..1."""
        return round(n_visual * (1 - pruned_ratio))
