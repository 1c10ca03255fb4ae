"""Filters before a score method, as one method."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..core.errors import OptionError
from ..core.signals import Signal, Tower
from ..core.tokens import Count, Stage, VisualTokens
from .base import Filter, Method, ScoreMethod, asked_signals
from .decoder import DecoderMethod


@dataclass(frozen=True)
class Chain(Method):
    """Filters, then a method: filtered tokens come last in the method's ranking.

    They are kept after all if the budget is larger than the number of other tokens. Every filter sees all tokens, not
    what the filter before it left.

    Args:
        filters: in any order.
        method: selects from what is left.
    """

    filters: tuple[Filter, ...]
    method: ScoreMethod

    def __post_init__(self):
        for part in self.filters:
            if not isinstance(part, Filter):
                raise OptionError(f"{part} is not a filter; use a list of filters, then one method")
        if len({type(part) for part in self.filters}) < len(self.filters):
            raise OptionError("the list has a filter twice; use each once")
        if not isinstance(self.method, ScoreMethod) or not self.method.is_filterable:
            raise OptionError(f"{self.method} does not rank single tokens, so nothing can be filtered before it")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset().union(*(asked_signals(part, "needs", tower) for part in (*self.filters, self.method)))

    @property
    def members(self) -> tuple[Method, ...]:
        return *self.filters, self.method

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        for part in self.filters:
            tokens = replace(tokens, keep=tokens.keep & part.passes(tokens))
        return self.method.select(tokens, n_keep)

    def __str__(self):
        return " + ".join(map(str, (*self.filters, self.method)))


@dataclass(frozen=True)
class DecoderChain(Chain):
    """The same between decoder layers; filters run at every cut."""

    filters: tuple[Any, ...]
    method: DecoderMethod

    stage: ClassVar[Stage] = Stage.DECODER

    def reads(self, layer: int) -> frozenset[Signal]:
        return frozenset().union(*(asked_signals(part, "reads", layer) for part in (*self.filters, self.method)))


# Of a chain, these are the method's.
for _name in ("takes_budget", "keeps_features", "newlines", "count", "min_keep", "cost"):
    setattr(Chain, _name, property(operator.attrgetter(f"method.{_name}")))
for _name in ("check", "layers", "cuts"):
    setattr(DecoderChain, _name, property(operator.attrgetter(f"method.{_name}")))


@dataclass(frozen=True)
class Pair:
    """A method before the language model and one between its layers, which receives what the first one kept.

    Args:
        before, between: the two, with their filters.
    """

    before: Method
    between: Method

    stage: ClassVar[None] = None
    is_filter: ClassVar[bool] = False
    needs_file: ClassVar[str] = ""
    if_budget: ClassVar[str] = ""

    @property
    def stages(self) -> tuple[Method, Method]:
        return self.before, self.between

    @property
    def members(self) -> tuple[Method, ...]:
        return *self.before.members, *self.between.members

    @property
    def n_budgets(self) -> int:
        return self.before.n_budgets + self.between.n_budgets

    @property
    def takes_budget(self) -> bool:
        return self.n_budgets > 0

    @property
    def keeps_features(self) -> bool:
        return self.before.keeps_features and self.between.keeps_features

    @property
    def count(self) -> Count:
        """The weaker guarantee of the two."""
        return Count.CONTENT if Count.CONTENT in (self.before.count, self.between.count) else self.between.count

    def __str__(self):
        return f"{self.before} + {self.between}"
