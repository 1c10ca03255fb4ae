"""Signals that methods can request from a vision tower or a language model, and facts about both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from .errors import OptionError


class Kind(Enum):
    """Kinds of signals, with their shapes; G images of one layout, l layers asked for, N visual tokens.

    CLS_ROW: attention of the [CLS] query to every visual token, mean over heads, (G, l, N); a softmax row is
    not renormalised after the [CLS] column is dropped. RECEIVED: attention that a visual token receives from
    all visual tokens of its crop, mean over heads and queries, (G, l, N). GIVEN: attention that it gives to all
    visual tokens of its crop, mean over heads and keys, (G, l, N). KEYS: keys of every head, (G, l, N, H, d).
    TOWER_STATES: hidden states of the layer that the model reads, before a final norm, mean over the patches of a
    token, (G, 1, N, D_tower).
    CLS_STATE: the tower's [CLS] state where the model reads it, (G, C, D_tower) for the C crops that it encodes; only
    where the projector takes one patch a row. TEXT_EMBEDS: input embeddings of the text of the image's prompt,
    (G, T, D), rows of zeros elsewhere; available only when the language model runs. PIXELS: the P pixel values that a
    visual token shows, (G, 1, N, P), as the model is given them; known before the tower runs. All others are float32.

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
    TOWER_STATES = "tower_states"
    CLS_STATE = "cls_state"
    TEXT_EMBEDS = "text_embeds"
    PIXELS = "pixels"
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
        kinds = (Kind.CLS_ROW, Kind.RECEIVED, Kind.GIVEN, Kind.KEYS, Kind.TOWER_STATES, Kind.PIXELS)
        return self in kinds

    @property
    def is_decoder(self) -> bool:
        """Whether it is measured in the language model."""
        return self.value.startswith("lm_")


Form = Literal["softmax", "logits"]


Heads = Literal["mean", "single"]


Text = Literal["after", "last", "all"]


Special = Literal["keys", "both", "none"]


@dataclass(frozen=True)
class Signal:
    """A kind with its layers (absolute, 0-based) and, for attention, how it is computed.

    Args:
        kind: what is measured.
        layers: of the vision tower, or of the language model for its kinds; empty for kinds without a layer.
        form: after or before the softmax.
        heads: mean over the tower's heads, or one head over the full width.
        text: for kinds about text: the text after the image, after the last image of the prompt, or all of it.
            If no text follows, the prompt's last token.
        special: for attention in the tower, where its special tokens ([CLS], registers) take part: as keys of the
            softmax alone, also as queries of what a token receives ("both"), or not at all. What they receive is
            always left out.
    """

    kind: Kind
    layers: tuple[int, ...] = ()
    form: Form = "softmax"
    heads: Heads = "mean"
    text: Text = "after"
    special: Special = "keys"


@dataclass(frozen=True)
class Tower:
    """Facts about a vision tower that methods may use.

    Args:
        n_layers: its depth.
        has_cls: whether it has a [CLS] token.
        projects_rows: whether the projector takes one patch per row, so that merged states can be projected.
        full_layers: layers in which every patch attends to the whole picture; empty for all layers.
    """

    n_layers: int
    has_cls: bool
    projects_rows: bool = True
    full_layers: tuple[int, ...] = ()

    def layer(self, index: int) -> int:
        """The absolute index of a layer; negative ones count from the end.

        Raises:
            OptionError: the tower has no such layer.
        """
        if not -self.n_layers <= index < self.n_layers:
            raise OptionError(
                f"layer {index} does not exist: this vision tower has {self.n_layers} layers; "
                f"use an index from {-self.n_layers} to {self.n_layers - 1}"
            )
        found = index % self.n_layers
        if self.full_layers and found not in self.full_layers:
            raise OptionError(
                f"layer {index} of this vision tower attends within windows, so its scores are not comparable over the "
                f"picture; use one of {', '.join(map(str, self.full_layers))}"
            )
        return found

    def default_layer(self, index: int) -> int:
        """As `layer`, for a method's default: the last full layer up to it, or the first one after it."""
        found = index % self.n_layers
        if not self.full_layers:
            return found
        return max((i for i in self.full_layers if i <= found), default=self.full_layers[0])

    def layers_from(self, start: int, last: int) -> tuple[int, ...]:
        """Full layers from `start` to `last`, both included; at least one."""
        found = tuple(i for i in range(start, last + 1) if not self.full_layers or i in self.full_layers)
        return found or (self.default_layer(last),)

    def scaled(self, index: int, depth: int) -> int:
        """Layer `index` of a paper's tower of `depth` layers, scaled to this tower's depth."""
        return self.default_layer(min(round(index * self.n_layers / depth), self.n_layers - 1))


@dataclass(frozen=True)
class Decoder:
    """Facts about a language model that methods may use.

    Args:
        n_layers: its depth.
        width: of its hidden states.
        fingerprint: a hash of its configuration; fitted files match one model only.
        first_cut: the first layer before which tokens can be cut.
    """

    n_layers: int
    width: int = 0
    fingerprint: str = ""
    first_cut: int = 1

    def layer(self, index: int) -> int:
        """The absolute index of a layer to cut before; negative ones count from the end.

        Raises:
            OptionError: the layer does not exist, or is the first.
        """
        found = index + self.n_layers if index < 0 else index
        if not self.first_cut <= found < self.n_layers:
            first = "layer 0 sees all tokens (use a method before the language model to drop them earlier)"
            early = f"this language model adds visual features up to layer {self.first_cut - 1}"
            raise OptionError(
                f"cannot cut before layer {index}: "
                + (
                    first
                    if found == 0
                    else early
                    if 0 < found < self.first_cut
                    else f"there are {self.n_layers} layers"
                )
                + f"; use an index from {self.first_cut} to {self.n_layers - 1}"
            )
        return found

    def scaled(self, index: int, depth: int) -> int:
        """Layer `index` of a paper's language model of `depth` layers, scaled to this model's depth."""
        return max(self.first_cut, min(math.floor(index * self.n_layers / depth + 0.5), self.n_layers - 1))
