"""The shared language: visual tokens, the signals that methods ask for, and where a method acts."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal

import torch
from torch import Tensor

from .errors import MissingSignalError, OptionError


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


class Kind(Enum):
    """Kinds of signals, with their shapes; G images of one layout, l layers asked for, N visual tokens.

    CLS_ROW: attention of the [CLS] query to every visual token, mean over heads, (G, l, N); a softmax row is
    not renormalised after the [CLS] column is cut off. RECEIVED: attention that a visual token receives from
    all visual tokens, mean over heads and queries, (G, l, N). GIVEN: attention that it gives to all visual
    tokens, mean over heads and keys, (G, l, N). All are float32.
    """

    CLS_ROW = "cls_row"
    RECEIVED = "received"
    GIVEN = "given"


Form = Literal["softmax", "logits"]


@dataclass(frozen=True)
class Signal:
    """A kind with its layers (absolute, 0-based) and, for attention, after or before the softmax."""

    kind: Kind
    layers: tuple[int, ...]
    form: Form = "softmax"


@dataclass(frozen=True)
class Tower:
    """What methods may know of a vision tower: its depth, and whether it has a [CLS] token."""

    n_layers: int
    has_cls: bool

    def layer(self, index: int) -> int:
        """The absolute index of a layer; negative ones count from the end.

        Raises:
            OptionError: the tower has no such layer.
        """
        if not -self.n_layers <= index < self.n_layers:
            raise OptionError(
                f"layer {index} does not exist: this vision tower has {self.n_layers} layers; "
                f"type an index from {-self.n_layers} to {self.n_layers - 1}"
            )
        return index % self.n_layers

    def scaled(self, index: int, depth: int) -> int:
        """The layer as far into this tower as `index` is into a paper's tower of `depth` layers."""
        return min(round(index * self.n_layers / depth), self.n_layers - 1)


@dataclass(frozen=True)
class Layout:
    """Where the rows of one image lie, host side: crop, row and column of every token, each of length N.

    Crop -1 is a row that shows no patch (a newline, a [CLS] feature): it is never scored, and counts apart.
    Crop 0 is the thumbnail or the only crop, 1.. the others. Rows and columns are those of the mosaic.
    """

    crop: tuple[int, ...]
    row: tuple[int, ...]
    column: tuple[int, ...]

    @property
    def n_visual(self) -> int:
        """Tokens that show a patch."""
        return len(self.visual)

    @functools.cached_property
    def visual(self) -> tuple[int, ...]:
        """Indices of the tokens that show a patch."""
        return tuple(i for i, crop in enumerate(self.crop) if crop >= 0)

    @property
    def n_crops(self) -> int:
        """Crops, the thumbnail included."""
        return 1 + max(self.crop, default=-1)

    @functools.cached_property
    def height(self) -> int:
        """Rows of the mosaic."""
        return 1 + max((self.row[i] for i in self.visual), default=-1)

    @functools.cached_property
    def width(self) -> int:
        """Columns of the mosaic."""
        return 1 + max((self.column[i] for i in self.visual), default=-1)

    @functools.cached_property
    def without_specials(self) -> Layout:
        """The same without the rows that show no patch."""
        if len(self.visual) == len(self.crop):
            return self
        return Layout(*(tuple(t[i] for i in self.visual) for t in (self.crop, self.row, self.column)))


@functools.lru_cache(maxsize=64)
def grid_layout(height: int, width: int, n_leading: int = 0) -> Layout:
    """One crop in raster order, after `n_leading` rows that show no patch."""
    rows = [r for r in range(height) for _ in range(width)]
    columns = [c for _ in range(height) for c in range(width)]
    special = (-1,) * n_leading
    return Layout(crop=special + (0,) * (height * width), row=special + tuple(rows), column=special + tuple(columns))


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of G images of one layout, in packed space: one row per placeholder.

    Args:
        features: (G, N, D), as the language model would see them.
        layout: of every image of the group.
        keep: (G, N) bool; all True before a method ran.
        signals: what the method asked for.
        scores: (G, N) float32, higher is kept; None where a method does not score.
        salts: one integer an image, for seeded randomness.
    """

    features: Tensor
    layout: Layout
    keep: Tensor
    signals: dict[Signal, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None
    salts: tuple[int, ...] = ()

    @classmethod
    def of(cls, features: Tensor, layout: Layout, signals=None, salts=None) -> VisualTokens:
        """Tokens of which nothing is dropped yet."""
        keep = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        return cls(features, layout, keep, dict(signals or {}), None, tuple(salts or (0,) * len(features)))

    @property
    def n_visual(self) -> int:
        """N."""
        return self.features.shape[1]

    def has(self, kind: Kind) -> bool:
        """Whether there is a signal of this kind."""
        return any(s.kind is kind for s in self.signals)

    def signal(self, kind: Kind, form: Form | None = None) -> Tensor:
        """The one signal of a kind (and form).

        Raises:
            MissingSignalError: there is none, or more than one.
        """
        found = [s for s in self.signals if s.kind is kind and form in (None, s.form)]
        if len(found) != 1:
            have = ", ".join(sorted(f"{s.kind.name} ({s.form})" for s in self.signals)) or "none"
            raise MissingSignalError(f"asked for one {kind.name} signal, found {len(found)}; present: {have}")
        return self.signals[found[0]]

    def keeping(self, index: Tensor, scores: Tensor | None = None) -> VisualTokens:
        """The same tokens of which those at `index`, (G, K), are kept."""
        keep = torch.zeros_like(self.keep).scatter(1, index, True)
        return replace(self, keep=keep, scores=scores if scores is not None else self.scores)
