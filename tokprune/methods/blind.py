"""The blind floor: no visual token at all."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core.layout import Layout
from ..core.lazy import torch
from ..core.tokens import VisualTokens
from .base import Method


@dataclass(frozen=True)
class Blind(Method):
    """Keep no visual token: what the language model answers without looking.

    The only method that keeps nothing.

    Source:   a control; no paper.
    Faithful: nothing to be faithful to.
    Differs:  Nothing known.
    Needs:    nothing. Text-agnostic. Cost: none.
    """

    @property
    def takes_budget(self) -> bool:
        return False

    def min_keep(self, layout: Layout) -> int:
        return 0

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        return replace(tokens, keep=torch.zeros_like(tokens.keep))
