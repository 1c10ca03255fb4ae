"""Filters before a score method, as one method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..errors import OptionError
from ..flops import Ops, Widths
from ..types import Count, Layout, Signal, Tower, VisualTokens
from .base import Filter, Method, ScoreMethod


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
