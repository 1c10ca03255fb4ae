"""The visual tokens of a group of images, as methods receive and return them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from .errors import MissingSignalError
from .layout import Layout
from .lazy import torch
from .signals import Form, Heads, Kind, Signal

if TYPE_CHECKING:
    from torch import Tensor


class Stage(Enum):
    """Where a method acts: before the language model, or between its decoder layers."""

    PRE_LLM = "pre-llm"
    DECODER = "decoder"


class Count(Enum):
    """What a method promises about the number of tokens it keeps.

    EXACT: the budget, always. AT_MOST: the budget or fewer, known from the layout (whole rows, pooling
    grids). CONTENT: depends on the picture.
    """

    EXACT = "exact"
    AT_MOST = "at most"
    CONTENT = "content"


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of G images of one layout, in packed space: one row per placeholder.

    Args:
        features: (G, N, D), as the language model would see them.
        layout: of every image of the group.
        keep: (G, N) bool; before the method runs, what filters left.
        signals: those that the method needs.
        scores: (G, N) float32, higher is kept; None if the method does not score.
        salts: one integer per image, for seeded randomness.
        index: (G, N), between decoder layers: which of the layout's tokens the present ones are; else None.
        sizes: (G, N) float32, of a method that merges: how many tokens a kept one stands for; None for one each.
    """

    features: Tensor
    layout: Layout
    keep: Tensor
    signals: dict[Signal, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None
    salts: tuple[int, ...] = ()
    index: Tensor | None = None
    sizes: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor, layout: Layout, signals=None, salts=None) -> VisualTokens:
        """Tokens with nothing dropped yet."""
        keep = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        return cls(features, layout, keep, dict(signals or {}), None, tuple(salts or (0,) * len(features)))

    @property
    def n_visual(self) -> int:
        return self.features.shape[1]

    def has(self, kind: Kind) -> bool:
        return any(s.kind is kind for s in self.signals)

    def signal(self, kind: Kind, form: Form | None = None, heads: Heads = "mean") -> Tensor:
        """The one signal of a kind (and form) over these heads.

        Raises:
            MissingSignalError: there is no such signal, or more than one.
        """
        found = [s for s in self.signals if s.kind is kind and form in (None, s.form) and s.heads == heads]
        if len(found) != 1:
            have = ", ".join(sorted(f"{s.kind.name} ({s.form})" for s in self.signals)) or "none"
            raise MissingSignalError(f"asked for one {kind.name} signal, found {len(found)}; present: {have}")
        return self.signals[found[0]]

    def keeping(self, index: Tensor, scores: Tensor | None = None) -> VisualTokens:
        """The same tokens, keeping those at `index`, (G, K)."""
        keep = torch.zeros_like(self.keep).scatter(1, index, True)
        return replace(self, keep=keep, scores=scores if scores is not None else self.scores)

    def crops_as_images(self, crops: Sequence[int]) -> tuple[Tensor, VisualTokens]:
        """C crops that lie alike as images of their own, the first one's of all G images first.

        Args:
            crops: their positions in `layout.crops`.

        Returns:
            (C, P) the crops' tokens, and the tokens of C G images in the layout of the first crop.
        """
        index = [self.layout.places_by_crop[crop] for crop in crops]
        at = torch.tensor(index).to(self.features.device, non_blocking=True)

        def apart(values: Tensor, axis: int = 1) -> Tensor:
            return values.index_select(axis, at.flatten()).unflatten(axis, at.shape).movedim(axis, 0).flatten(0, 1)

        signals = {}
        for signal, values in self.signals.items():
            if signal.kind.is_per_token:
                values = apart(values, 2)
            elif signal.kind is Kind.CLS_STATE:
                numbers = [self.layout.crops[crop] - int(self.layout.crops[0] > 0) for crop in crops]
                values = values[:, torch.tensor(numbers, device=values.device)].transpose(0, 1).flatten(0, 1)[:, None]
            else:
                values = values.repeat(len(crops), *(1,) * (values.ndim - 1))
            signals[signal] = values
        part = replace(
            self,
            features=apart(self.features),
            layout=self.layout.part(index[0]),
            keep=apart(self.keep),
            signals=signals,
            scores=None if self.scores is None else apart(self.scores),
            salts=self.salts * len(crops),
        )
        return at, part
