"""What a method between decoder layers is: a score, a schedule that says when and how many, and exits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ..core import ops
from ..core.errors import OptionError
from ..core.layout import Layout
from ..core.schedules import Explicit, Schedule, Single, half_up
from ..core.signals import Decoder, Signal
from ..core.tokens import Count, Stage, VisualTokens
from .base import Method, ScoreMethod


@dataclass(frozen=True)
class DecoderMethod(ScoreMethod):
    """Ranks the visual tokens before a decoder layer; write `score` and `reads`.

    The budget is what is left of an image after the last cut. `select` is called at every cut with the tokens that are
    still there; `features` are hidden states at the layer's input, `index` says which of the layout's tokens they are.

    Args:
        schedule: when to cut, and how far; None is the paper's.
        uniform: the part of every cut's tokens that is spread evenly over the picture instead of ranked (the spatial
            sampling of ATP-LLaVA, arXiv 2412.00447; the rest of that method is trained).
    """

    schedule: Schedule | dict | str | None = None
    uniform: float = 0.0

    stage: ClassVar[Stage] = Stage.DECODER
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {"uniform": (0, 1)}

    def __post_init__(self):
        if isinstance(self.schedule, Mapping):
            object.__setattr__(self, "schedule", Explicit.of(self.schedule))
        elif isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", Schedule.parse(self.schedule))
        super().__post_init__()

    @property
    def default_schedule(self) -> Schedule:
        return Single()

    @property
    def plan(self) -> Schedule:
        return cast(Schedule, self.schedule or self.default_schedule)

    @property
    def takes_budget(self) -> bool:
        """Unless the schedule holds counts of its own."""
        return self.plan.takes_budget

    def check(self, decoder: Decoder) -> None:
        """Raise OptionError where this does not fit a language model."""
        self.plan.layers(decoder)

    def layers(self, decoder: Decoder) -> tuple[int, ...]:
        """Layers before which it may cut, ascending."""
        return self.plan.layers(decoder)

    def cuts(self, decoder: Decoder, n_visual: int, n_keep: int) -> dict[int, int]:
        """Tokens left of n_visual from a layer on, by layer, strictly falling."""
        found, here = {}, n_visual
        for layer, n in self.plan.counts(decoder, n_visual, n_keep).items():
            n = self.left(here, n)
            if n < here:
                found[layer] = here = n
        return found

    def left(self, n_present: int, n_keep: int) -> int:
        """What `select` is told to leave of the tokens that are there, where the schedule has `n_keep`: just that."""
        return n_keep

    def reads(self, layer: int) -> frozenset[Signal]:
        """Signals for the cut before a layer: of the layer before it, or of its own projections at its input."""
        raise NotImplementedError

    def chosen(self, ranked: Tensor, tokens: VisualTokens, n_keep: int) -> Tensor:
        """The highest scores; before them, where asked for, an even spread over the picture."""
        n_even = half_up(self.uniform, n_keep)
        if n_even:
            place = torch.arange(tokens.n_visual, device=ranked.device).expand_as(ranked)
            place = place if tokens.index is None else tokens.index
            turn = ops.on_device(spread_order(tokens.layout), ranked.device)[place]
            even = torch.zeros_like(tokens.keep).scatter(1, ops.keep_top(-turn.float(), n_even), True)
            ranked = ranked.masked_fill(even, torch.inf)
        return super().chosen(ranked, tokens, n_keep)


def spread_order(layout: Layout) -> tuple[int, ...]:
    """For every row of a layout its turn in an even spread over the picture: the first k turns always lie apart.

    Rows that show no patch come last. The turns of a region are those of a two-dimensional low-discrepancy sequence
    (bits of row and column interleaved and reversed).
    """
    bits = max(layout.row + layout.column + (1,)).bit_length()

    def reversed_bits(row: int, column: int) -> int:
        turn = 0
        for i in range(bits):
            turn = turn << 2 | ((row ^ column) >> i & 1) << 1 | (row >> i & 1)
        return turn

    n = len(layout.crop)
    keys = [
        (layout.crop[i] < 0, reversed_bits(max(layout.row[i], 0), max(layout.column[i], 0)), layout.crop[i], i)
        for i in range(n)
    ]
    turns = [0] * n
    for turn, (*_, i) in enumerate(sorted(keys)):
        turns[i] = turn
    return tuple(turns)


@dataclass(frozen=True)
class ExitMethod(Method):
    """Lets all visual tokens of a prompt leave at once, at the first layer where `exits` says so; takes no budget."""

    stage: ClassVar[Stage] = Stage.DECODER

    @property
    def takes_budget(self) -> bool:
        return False

    @property
    def count(self) -> Count:
        """All or nothing, by prompt."""
        return Count.CONTENT

    def check(self, decoder: Decoder) -> None:
        """Raise OptionError where this does not fit a language model."""
        self.layers(decoder)

    def layers(self, decoder: Decoder) -> tuple[int, ...]:
        """Layers before which it is asked, ascending."""
        raise NotImplementedError

    def cuts(self, decoder: Decoder, n_visual: int, n_keep: int) -> dict[int, int]:
        """Nothing is left from an exit on; whether it comes there is not known before."""
        return dict.fromkeys(self.layers(decoder), 0)

    def reads(self, layer: int) -> frozenset[Signal]:
        """Signals for the decision before a layer."""
        raise NotImplementedError

    def exits(self, tokens: VisualTokens) -> Tensor:
        """(G,) bool: whether these leave; the same for all images of a prompt."""
        raise NotImplementedError

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        return replace(tokens, keep=tokens.keep & ~self.exits(tokens)[:, None])


DecoderStage: Any = (DecoderMethod, ExitMethod)


def checked_layer(layer: int | None, name: str) -> None:
    """Raise where a layer cannot be cut before on any language model."""
    if layer == 0:
        raise OptionError(f"{name}=0: nothing is cut before the first layer; type {name}=2, for instance")
