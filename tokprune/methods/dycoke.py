"""DyCoke: of four frames keep one whole, and of the others what differs from it or from their neighbour."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ..core import ops
from ..core.errors import OptionError
from ..core.lazy import torch
from ..core.tokens import Count, VisualTokens
from .base import Method
from .crops import rearranged
from .frames import by_frame, top_by_frame, unlike_mean

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DyCoke(Method):
    """Temporal merging of DyCoke, which in fact drops: one frame of four stays whole.

    Of four frames the second is compared with the first, the third with the first, and the fourth with the third, token
    by token at the same place (cosine); (1 - k) of the tokens of these three stay, those least like.

    Source:   "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", arXiv:2411.15024; code:
              KD-TAO/DyCoke@dd74634. Its first stage; the second one drops entries of the KV cache while decoding.
    Faithful: counts, order and kept sets agree with the authors' code (golden cases dycoke), with faithful=True.
    Differs:  the third frame of the last group is treated as those before it, and an odd last frame stays, where the
              code keeps the one whole and drops the other; tokens stay in their order, where the code sorts them by
              similarity; videos of fewer than five frames work. With k=none the same frames share a budget: whole
              frames first, the others evenly. If it is too small for the whole frames, they share it evenly and keep
              what is least like their mean. Nothing is dropped of a picture, or of a video of one frame, unless there
              is a budget.
    Needs:    nothing. Text-agnostic. Cost: O(N D).

    Args:
        k: share of the compared frames' tokens that is dropped, 0..1, without a budget: k=0.7 keeps 48 to 56 % of a
            video of eight frames and more. None takes a budget.
        faithful: counts and order of the authors' code.
    """

    k: float | None = 0.7
    faithful: bool = False

    limits: ClassVar = {"k": (0, 1)}
    source: ClassVar[str] = "arXiv:2411.15024"
    if_budget: ClassVar[str] = "k=none"

    def __post_init__(self):
        super().__post_init__()
        if self.faithful and self.k is None:
            raise OptionError("DyCoke: the authors' code takes no budget; use k=0.7 with faithful=true")

    @property
    def takes_budget(self) -> bool:
        return self.k is None

    @property
    def count(self) -> Count:
        """Without a budget, k and the number of frames decide."""
        return Count.EXACT if self.takes_budget else Count.CONTENT

    def counts(self, n_frames: int, n: int, n_keep: int) -> tuple[int, ...]:
        """Tokens that every frame of `n` keeps; `n_keep` is used with k=none."""
        compared = self._compared(n_frames)
        if self.k is not None:
            left = int((1 - self.k) * n)
            counts = tuple(n if other == t else left for t, other in enumerate(compared))
            return counts[:-1] + (0,) if self.faithful and n_frames % 2 and n_frames > 1 else counts
        whole = [t for t, other in enumerate(compared) if other == t]
        others = [t for t in range(n_frames) if t not in whole]
        first = min(n_keep, n * len(whole))
        given = dict(zip(whole, ops.shares((n,) * len(whole), first, even=True), strict=True))
        given |= dict(zip(others, ops.shares((n,) * len(others), n_keep - first, even=True), strict=True))
        return tuple(given[t] for t in range(n_frames))

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        scores = self.scores(tokens)
        counts = ops.on_device(self.counts(*tokens.layout.frames, n_keep), scores.device)
        out = replace(tokens, keep=top_by_frame(scores, counts.expand(len(scores), -1)).flatten(1))
        return rearranged(out, self.paper_order(out)) if self.faithful else out

    def scores(self, tokens: VisualTokens) -> Tensor:
        """(G, T, n): minus the cosine to the frame that is compared with; of whole frames, to their own mean."""
        frames = by_frame(tokens).split(1, 1)
        pairs = ((frames[t], frames[other]) for t, other in enumerate(self._compared(len(frames))))
        return torch.cat([unlike_mean(x) if x is y else -ops.paired_cosine(x, y) for x, y in pairs], 1)

    def paper_order(self, tokens: VisualTokens) -> Tensor:
        """(G, N): kept tokens in the code's order, by rising similarity in frames that are compared; then others."""
        scores, compared = self.scores(tokens), self._compared(tokens.layout.frames[0])
        n_frames, n = tokens.layout.frames
        is_whole = ops.on_device([other == t for t, other in enumerate(compared)], scores.device)
        rank = (-scores).argsort(dim=2, stable=True).argsort(2)
        rank = torch.where(is_whole[:, None], torch.arange(n, device=rank.device), rank)
        key = torch.arange(n_frames, device=rank.device)[:, None] * n + rank
        return key.flatten(1).masked_fill(~tokens.keep, n_frames * n).argsort(dim=1, stable=True)

    def _compared(self, n_frames: int) -> list[int]:
        """The frame that every frame is compared with; itself where it stays whole."""
        steps = [(0, 1, 2, 1)[t % 4] for t in range(n_frames)]
        if self.faithful and n_frames % 4 == 0:
            steps[n_frames - 2] = 0
        return [t - step for t, step in enumerate(steps)]
