"""The random control: what any method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.lazy import torch
from ..core.tokens import VisualTokens
from .base import RankMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Random(RankMethod):
    """Keep tokens drawn without replacement, seeded.

    The draw depends on the seed, the number of tokens and the image's salt alone: it is the same on every
    device, in every batch, and the smaller budget's tokens are among the larger one's.

    Source:   a control; no paper.
    Faithful: nothing to be faithful to.
    Differs:  Nothing known.
    Needs:    nothing. Text-agnostic. Cost: O(N).

    Args:
        seed: any integer; report at least three.
    """

    seed: int = 0

    def score(self, tokens: VisualTokens) -> Tensor:
        """Negative place in a random order, (G, N)."""
        orders = {salt: self._order(tokens.n_visual, salt) for salt in set(tokens.salts)}
        return torch.stack([orders[salt] for salt in tokens.salts]).to(tokens.features.device, non_blocking=True)

    def _order(self, n_visual: int, salt: int) -> Tensor:
        mixed = (self.seed * 1_000_003 + n_visual) * 1_000_003 + salt
        generator = torch.Generator().manual_seed(mixed % 2**63)
        return -torch.randperm(n_visual, generator=generator).float()
