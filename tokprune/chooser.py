"""What decides which columns stay between decoder layers, and what it is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """What enters the language model in one pass, behind the compaction before it.

    Args:
        embeds: (B, S, D).
        valid: (B, S) bool; False is padding.
        source: (B, S) the user's columns, or None where they are the same.
        past: columns before these in layer 0.
    """

    embeds: Tensor
    valid: Tensor
    source: Tensor | None
    past: int


@dataclass(frozen=True)
class Cut:
    """What stays before a layer.

    Args:
        hidden: (B, K, D) hidden states, changed where a method merges.
        keep: (B, K) bool; False also for padding.
        lengths: columns that stay, by row, known on the host.
        n_tail: how many of the last columns of this pass stay in every row, at least.
    """

    hidden: Tensor
    keep: Tensor
    lengths: list[int]
    n_tail: int


class Here(Protocol):
    """What a chooser may ask about the layer that it is asked at."""

    def rotary(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the columns that are here, (B or 1, K, d)."""

    def alone(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cosines and sines as if every row were alone, without padding before it."""

    def cached(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys of earlier passes in a layer, (B, H, P, d), and which of them are no padding, (B, P)."""


class Chooser(Protocol):
    """Who decides what stays."""

    layers: frozenset[int]

    def begin(self, entry: Entry) -> bool:
        """Called with every pass over a prompt; whether something is to be cut in it."""

    def cut(self, layer: int, hidden: Tensor, here: Here) -> Cut | None:
        """Asked before each of `layers`; None leaves all columns."""

    def end(self, lengths: list[int], past: list[int], rows: list[list[int]]) -> None:
        """Called behind a pass with cuts: columns by layer, cached ones before, and behind a cut those of every row."""
