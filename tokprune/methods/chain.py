"""Filters before a score method, as one method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from ..errors import OptionError
from ..flops import Ops, Widths
from ..types import Count, Decoder, Layout, Signal, Stage, Tower, VisualTokens
from .base import Filter, Method, ScoreMethod
from .decoder import DecoderMethod


@dataclass(frozen=True)
class Chain(Method):
    """What filters drop comes last in the ranking of the method behind them.

    Tokens that were dropped come back where the budget asks for more than the others. Filters see all tokens, not
    what the filter before them left.

    Args:
        filters: in any order.
        method: what selects.
    """

    filters: tuple[Filter, ...]
    method: ScoreMethod

    def __post_init__(self):
        for part in self.filters:
            if not isinstance(part, Filter):
                raise OptionError(f"{part} is no filter; a list is filters, then the method that selects")
        if len({type(part) for part in self.filters}) < len(self.filters):
            raise OptionError("a filter stands twice in the list; name each once")
        if not isinstance(self.method, ScoreMethod) or not self.method.is_filterable:
            raise OptionError(f"{self.method} does not rank single tokens, so nothing can be filtered before it")

    @property
    def takes_budget(self) -> bool:
        """The method's."""
        return self.method.takes_budget

    @property
    def keeps_features(self) -> bool:  # type: ignore[override]
        """The method's."""
        return self.method.keeps_features

    @property
    def newlines(self) -> Literal["keep_rows_with_tokens", "keep", "drop"]:
        """The method's."""
        return self.method.newlines

    @property
    def count(self) -> Count:
        """The method's."""
        return self.method.count

    def min_keep(self, layout: Layout) -> int:
        """The method's."""
        return self.method.min_keep(layout)

    def needs(self, tower: Tower) -> frozenset[Signal]:
        """What any of them needs."""
        return frozenset().union(*(part.needs(tower) for part in (*self.filters, self.method)))

    def cost(self, layout: Layout, n_keep: int, widths: Widths) -> Ops:
        """The method's."""
        return self.method.cost(layout, n_keep, widths)

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        """Filter, then select."""
        for part in self.filters:
            tokens = replace(tokens, keep=tokens.keep & part.passes(tokens))
        return self.method.select(tokens, n_keep)

    def __str__(self):
        return " + ".join(map(str, (*self.filters, self.method)))


@dataclass(frozen=True)
class DecoderChain(Chain):
    """The same between decoder layers; filters are asked at every cut."""

    filters: tuple[Any, ...]
    method: DecoderMethod

    stage: ClassVar[Stage] = Stage.DECODER

    def check(self, decoder: Decoder) -> None:
        """The method's."""
        self.method.check(decoder)

    def layers(self, decoder: Decoder) -> tuple[int, ...]:
        """The method's."""
        return self.method.layers(decoder)

    def cuts(self, decoder: Decoder, n_visual: int, n_keep: int) -> dict[int, int]:
        """The method's."""
        return self.method.cuts(decoder, n_visual, n_keep)

    def reads(self, layer: int) -> frozenset[Signal]:
        """What any of them needs."""
        return frozenset().union(*(part.reads(layer) for part in (*self.filters, self.method)))


@dataclass(frozen=True)
class Pipeline(Method):
    """A method before the language model and one between its layers, which gets what the first one leaves.

    Args:
        first: before.
        decoder: between.
    """

    first: Method
    decoder: Method

    @property
    def n_budgets(self) -> int:
        """Of both."""
        return self.first.n_budgets + self.decoder.n_budgets

    @property
    def takes_budget(self) -> bool:
        """Whether either does."""
        return self.n_budgets > 0

    @property
    def count(self) -> Count:
        """The less certain of both."""
        return Count.CONTENT if Count.CONTENT in (self.first.count, self.decoder.count) else self.decoder.count

    def needs(self, tower: Tower) -> frozenset[Signal]:
        """The first one's."""
        return self.first.needs(tower)

    def __str__(self):
        return f"{self.first} + {self.decoder}"
