"""Base classes of methods between decoder layers: a score with a schedule, and exits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from ..core import ops
from ..core.errors import OptionError
from ..core.layout import Layout
from ..core.lazy import torch
from ..core.schedules import Explicit, Schedule, Single, half_up
from ..core.signals import Decoder, Signal
from ..core.tokens import Count, Stage, VisualTokens
from .base import Method, ScoreMethod, unwritten

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DecoderMethod(ScoreMethod):
    """Ranks the visual tokens before a decoder layer; write `score` and `reads`.

    The budget is what is left of an image after the last cut. `select` is called at every cut with the tokens that are
    left; `features` are hidden states at the layer's input, `index` says which of the layout's tokens they are.

    Args:
        schedule: before which layers to cut, and how far; None is the paper's, scaled to this model's depth.
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
        """False if the schedule sets counts itself."""
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
        """The `n_keep` that `select` gets for `n_present` tokens, where the schedule says `n_keep`."""
        return n_keep

    def reads(self, layer: int) -> frozenset[Signal]:
        """Signals for the cut before a layer: of the layer before it, or of its own projections at its input."""
        raise unwritten(self, "reads", "return frozenset({Signal(Kind.LM_ROW, (layer - 1,))}) or other signals")

    def chosen(self, ranked: Tensor, tokens: VisualTokens, n_keep: int) -> Tensor:
        """The `uniform` part spread evenly over the picture, then the highest scores."""
        n_even = half_up(self.uniform, n_keep)
        if n_even:
            place = torch.arange(tokens.n_visual, device=ranked.device).expand_as(ranked)
            place = place if tokens.index is None else tokens.index
            turn = ops.on_device(spread_order(tokens.layout), ranked.device)[place]
            even = torch.zeros_like(tokens.keep).scatter(1, ops.keep_top(-turn.float(), n_even), True)
            ranked = ranked.masked_fill(even, torch.inf)
        return super().chosen(ranked, tokens, n_keep)


def spread_order(layout: Layout) -> tuple[int, ...]:
    """The position of every token in an even spread over the picture: the first k are always far apart.

    Special tokens (newline, [CLS]) come last. Within a region the order is a two-dimensional low-discrepancy sequence
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
    """Drops all visual tokens of a prompt at the first layer where `exits` says so; takes no budget."""

    stage: ClassVar[Stage] = Stage.DECODER

    @property
    def takes_budget(self) -> bool:
        return False

    @property
    def count(self) -> Count:
        """All or nothing, depending on the prompt."""
        return Count.CONTENT

    def check(self, decoder: Decoder) -> None:
        """Raise OptionError where this does not fit a language model."""
        self.layers(decoder)

    def layers(self, decoder: Decoder) -> tuple[int, ...]:
        """Layers before which it decides, ascending."""
        raise unwritten(self, "layers", "return the layers before which it decides")

    def cuts(self, decoder: Decoder, n_visual: int, n_keep: int) -> dict[int, int]:
        """Nothing is left after an exit; whether one happens is not known in advance."""
        return dict.fromkeys(self.layers(decoder), 0)

    def reads(self, layer: int) -> frozenset[Signal]:
        """Signals for the decision before a layer."""
        raise unwritten(self, "reads", "return frozenset({Signal(Kind.LM_ROW, (layer - 1,))}) or other signals")

    def exits(self, tokens: VisualTokens) -> Tensor:
        """(G,) bool: whether these exit; the same for all images of a prompt."""
        raise unwritten(self, "exits", "return (images,) bool")

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        return replace(tokens, keep=tokens.keep & ~self.exits(tokens)[:, None])


DecoderStage: Any = (DecoderMethod, ExitMethod)


def checked_layer(layer: int | None, name: str) -> None:
    """Raise OptionError for layer 0, which always sees all tokens."""
    if layer == 0:
        raise OptionError(f"invalid {name}=0: the first layer always sees all tokens; use {name}=2, for instance")
