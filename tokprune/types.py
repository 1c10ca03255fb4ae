"""The shared language: visual tokens, the signals that methods ask for, and where a method acts."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
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
    all visual tokens of its crop, mean over heads and queries, (G, l, N). GIVEN: attention that it gives to all
    visual tokens of its crop, mean over heads and keys, (G, l, N). KEYS: keys of every head, (G, l, N, H, d).
    CLS_STATE: the tower's [CLS] state where the model reads it, (G, C, D_tower) for the C crops that it encodes; only
    where the projector takes one patch a row. TEXT_EMBEDS: input embeddings of the text of the image's prompt,
    (G, T, D), rows of zeros elsewhere; known when the language model runs, not before. All are float32.

    Of the language model, for a cut before one of its layers; n visual tokens are still there, T tokens of text:
    LM_ROW: attention of the last prompt token to them, mean over heads, (G, l, n); the softmax runs over the whole
    row, text among it. LM_MASS: the part of that row on all visual tokens of the prompt, (G, l). LM_TEXT_ROWS:
    attention of every text token to them, mean over heads, (G, T, n). LM_KEYS, LM_TEXT_KEYS: keys after the rotary
    embedding, of the heads that store them, (G, n, H, d) and (G, T, H, d). LM_TEXT_STATES: hidden states of the text
    at the cut, (G, T, D); LM_FIRST_STATE: that of the prompt's first token, (G, D). LM_EMBEDS: visual tokens as the
    language model received them, (G, N, D); LM_TEXT_EMBEDS: the text, (G, T, D).
    """

    CLS_ROW = "cls_row"
    RECEIVED = "received"
    GIVEN = "given"
    KEYS = "keys"
    CLS_STATE = "cls_state"
    TEXT_EMBEDS = "text_embeds"
    LM_ROW = "lm_row"
    LM_MASS = "lm_mass"
    LM_TEXT_ROWS = "lm_text_rows"
    LM_KEYS = "lm_keys"
    LM_TEXT_KEYS = "lm_text_keys"
    LM_TEXT_STATES = "lm_text_states"
    LM_FIRST_STATE = "lm_first_state"
    LM_EMBEDS = "lm_embeds"
    LM_TEXT_EMBEDS = "lm_text_embeds"

    @property
    def is_per_token(self) -> bool:
        """Whether axis 2 goes over visual tokens of the vision tower."""
        return self in (Kind.CLS_ROW, Kind.RECEIVED, Kind.GIVEN, Kind.KEYS)

    @property
    def is_decoder(self) -> bool:
        """Whether it is of the language model's layers."""
        return self.value.startswith("lm_")


Form = Literal["softmax", "logits"]
Heads = Literal["mean", "single"]
Text = Literal["after", "last", "all"]


@dataclass(frozen=True)
class Signal:
    """A kind with its layers (absolute, 0-based) and, for attention, how it is computed.

    Args:
        kind: what it is.
        layers: of the vision tower, or of the language model for kinds of its own; empty for kinds that belong to none.
        form: after or before the softmax.
        heads: mean over the tower's heads, or one head over the full width.
        text: for kinds about text: what comes after the image, after the last image of the prompt, or all of it.
            Where nothing comes after, it is the prompt's last token.
    """

    kind: Kind
    layers: tuple[int, ...] = ()
    form: Form = "softmax"
    heads: Heads = "mean"
    text: Text = "after"


@dataclass(frozen=True)
class Tower:
    """What methods may know of a vision tower.

    Args:
        n_layers: its depth.
        has_cls: whether it has a [CLS] token.
        projects_rows: whether the projector takes one patch a row, so that merged states can be projected anew.
    """

    n_layers: int
    has_cls: bool
    projects_rows: bool = True

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
class Decoder:
    """What methods may know of a language model.

    Args:
        n_layers: its depth.
        width: of its hidden states.
        fingerprint: a hash of its configuration; what was fitted to one fits no other.
    """

    n_layers: int
    width: int = 0
    fingerprint: str = ""

    def layer(self, index: int) -> int:
        """The absolute index of a layer to cut before; negative ones count from the end.

        Raises:
            OptionError: there is no such layer, or it is the first.
        """
        found = index + self.n_layers if index < 0 else index
        if not 1 <= found < self.n_layers:
            first = "nothing is cut before layer 0 (a method before the language model does that)"
            raise OptionError(
                f"cannot cut before layer {index}: "
                + (first if found == 0 else f"this language model has {self.n_layers} layers")
                + f"; type an index from 1 to {self.n_layers - 1}"
            )
        return found

    def scaled(self, index: int, depth: int) -> int:
        """The layer as far into this language model as `index` is into a paper's of `depth` layers; at least 1."""
        return max(1, min(math.floor(index * self.n_layers / depth + 0.5), self.n_layers - 1))


@dataclass(frozen=True)
class Region:
    """A full grid of tokens: the thumbnail, or the mosaic of the crops; `index` is in raster order."""

    height: int
    width: int
    index: tuple[int, ...]


NEWLINE, NO_PATCH = -1, -2


@dataclass(frozen=True)
class Layout:
    """Where the rows of one image lie, host side: crop, row and column of every token, each of length N.

    Crop 0 is the thumbnail or the only crop, 1.. the others, in raster order. Rows and columns of a thumbnail are
    its own, those of the crops are of their mosaic. Crop -1 is a newline at the end of mosaic row `row`, or of the
    whole picture where that is -1; crop -2 shows no patch either (a [CLS] feature). Both are never scored and
    count apart.

    Args:
        crop, row, column: of every token.
        crop_grid: rows and columns of crops, (0, 0) where there is a thumbnail or an only crop and no other.
    """

    crop: tuple[int, ...]
    row: tuple[int, ...]
    column: tuple[int, ...]
    crop_grid: tuple[int, int] = (0, 0)

    @property
    def n_visual(self) -> int:
        """Tokens that show a patch."""
        return len(self.visual)

    @property
    def n_newlines(self) -> int:
        """Newlines."""
        return self.crop.count(NEWLINE)

    @functools.cached_property
    def visual(self) -> tuple[int, ...]:
        """Indices of the tokens that show a patch."""
        return tuple(i for i, crop in enumerate(self.crop) if crop >= 0)

    @functools.cached_property
    def crops(self) -> tuple[int, ...]:
        """Crops that have tokens, ascending."""
        return tuple(sorted({c for c in self.crop if c >= 0}))

    @functools.cached_property
    def crop_places(self) -> tuple[int, ...]:
        """Place of every visual token's crop among `crops`."""
        places = {crop: place for place, crop in enumerate(self.crops)}
        return tuple(places[self.crop[i]] for i in self.visual)

    @functools.cached_property
    def crop_sizes(self) -> tuple[int, ...]:
        """Tokens of every crop, in the order of `crops`."""
        return tuple(self.crop_places.count(place) for place in range(len(self.crops)))

    @property
    def n_crops(self) -> int:
        """Crops that the tower encodes: the thumbnail or only crop, and those of the mosaic, padding among them."""
        rows, columns = self.crop_grid
        return int(0 in self.crops) + rows * columns

    @property
    def height(self) -> int:
        """Rows of the mosaic, or of the only crop."""
        return self.regions[-1].height if self.regions else 0

    @property
    def width(self) -> int:
        """Columns of the mosaic, or of the only crop."""
        return self.regions[-1].width if self.regions else 0

    @functools.cached_property
    def regions(self) -> tuple[Region, ...]:
        """The thumbnail or only crop, and the mosaic of the others, as far as they exist."""
        parts = ([i for i in self.visual if self.crop[i] == 0], [i for i in self.visual if self.crop[i] > 0])
        return tuple(self._region(part) for part in parts if part)

    def _region(self, index: list[int]) -> Region:
        raster = sorted(index, key=lambda i: (self.row[i], self.column[i]))
        height, width = 1 + max(self.row[i] for i in index), 1 + max(self.column[i] for i in index)
        return Region(height, width, tuple(raster))

    @functools.cached_property
    def without_specials(self) -> Layout:
        """The same without the rows that show no patch."""
        return self if len(self.visual) == len(self.crop) else self.part(self.visual)

    def part(self, index: Sequence[int]) -> Layout:
        """The layout of some of the tokens."""
        crop, row, column = (tuple(t[i] for i in index) for t in (self.crop, self.row, self.column))
        return Layout(crop, row, column, self.crop_grid)


@functools.lru_cache(maxsize=64)
def grid_layout(height: int, width: int, n_leading: int = 0) -> Layout:
    """One crop in raster order, after `n_leading` rows that show no patch."""
    rows = [r for r in range(height) for _ in range(width)]
    columns = [c for _ in range(height) for c in range(width)]
    special, nowhere = (NO_PATCH,) * n_leading, (-1,) * n_leading
    return Layout(crop=special + (0,) * (height * width), row=nowhere + tuple(rows), column=nowhere + tuple(columns))


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of G images of one layout, in packed space: one row per placeholder.

    Args:
        features: (G, N, D), as the language model would see them.
        layout: of every image of the group.
        keep: (G, N) bool; before a method ran, what filters left.
        signals: what the method asked for.
        scores: (G, N) float32, higher is kept; None where a method does not score.
        salts: one integer an image, for seeded randomness.
        index: (G, N), between decoder layers: which of the layout's tokens the present ones are; else None.
    """

    features: Tensor
    layout: Layout
    keep: Tensor
    signals: dict[Signal, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None
    salts: tuple[int, ...] = ()
    index: Tensor | None = None

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

    def signal(self, kind: Kind, form: Form | None = None, heads: Heads = "mean") -> Tensor:
        """The one signal of a kind (and form) over these heads.

        Raises:
            MissingSignalError: there is none, or more than one.
        """
        found = [s for s in self.signals if s.kind is kind and form in (None, s.form) and s.heads == heads]
        if len(found) != 1:
            have = ", ".join(sorted(f"{s.kind.name} ({s.form})" for s in self.signals)) or "none"
            raise MissingSignalError(f"asked for one {kind.name} signal, found {len(found)}; present: {have}")
        return self.signals[found[0]]

    def keeping(self, index: Tensor, scores: Tensor | None = None) -> VisualTokens:
        """The same tokens of which those at `index`, (G, K), are kept."""
        keep = torch.zeros_like(self.keep).scatter(1, index, True)
        return replace(self, keep=keep, scores=scores if scores is not None else self.scores)

    def part(self, index: Sequence[int], crop: int) -> VisualTokens:
        """The tokens of one crop, given their indices and the crop's place among `layout.crops`."""
        at = torch.tensor(index).to(self.features.device, non_blocking=True)
        signals = {}
        for signal, values in self.signals.items():
            if signal.kind.is_per_token:
                values = values[:, :, at]
            elif signal.kind is Kind.CLS_STATE:
                number = self.layout.crops[crop] - int(self.layout.crops[0] > 0)
                values = values[:, number : number + 1]
            signals[signal] = values
        return replace(
            self,
            features=self.features[:, at],
            layout=self.layout.part(index),
            keep=self.keep[:, at],
            signals=signals,
            scores=None if self.scores is None else self.scores[:, at],
        )
