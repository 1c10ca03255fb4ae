"""Base classes of methods: frozen dataclasses of options that declare what they need and select visual tokens."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core import ops
from ..core.errors import OptionError
from ..core.layout import Layout
from ..core.registry import check
from ..core.signals import Form, Heads, Kind, Signal, Tower
from ..core.tokens import Count, Stage, VisualTokens
from ..cost.flops import Ops
from ..cost.selection import Widths
from .crops import top_by_crop

Split = Literal["joint", "even"]
WithoutCLS = Literal["error", "received"]


@dataclass(frozen=True)
class Method:
    """Selects visual tokens; subclass it with options as fields and write `select`.

    A method is independent of models and never loops over images: it gets the G images of one layout together. It
    causes no device-to-host sync. The budget is an argument, not an option.
    """

    stage: ClassVar[Stage] = Stage.PRE_LLM
    keeps_features: ClassVar[bool] = True  # False if kept tokens are merged or averaged
    space: ClassVar[Literal["packed", "tower"]] = "packed"  # "tower": merges the projector's input where possible
    is_filter: ClassVar[bool] = False  # needs a method after it
    needs_file: ClassVar[str] = ""  # the option with the file that it cannot run without
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {}  # least and largest value of numeric options
    source: ClassVar[str] = ""
    if_missing: ClassVar[str] = ""  # the option to use if the tower lacks a signal
    if_budget: ClassVar[str] = ""  # the option that makes it take a budget

    def __post_init__(self):
        for option in fields(self):
            check(type(self), option.name, getattr(self, option.name))
        for name, (least, most) in self.limits.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise OptionError(f"{type(self).__name__}: {name}={value} is out of range; use {least:g} to {most:g}")

    @property
    def takes_budget(self) -> bool:
        """True if the method takes a token budget, False if it decides by itself."""
        return True

    @property
    def n_budgets(self) -> int:
        """How many budgets it takes: 0 or 1, or 2 for a list of two methods."""
        return int(self.takes_budget)

    @property
    def stages(self) -> tuple[Method | None, Method | None]:
        """The methods before the language model and between its layers."""
        return (self, None) if self.stage is Stage.PRE_LLM else (None, self)

    @property
    def members(self) -> tuple[Method, ...]:
        """Filters and methods in the order of a list."""
        return (self,)

    @property
    def newlines(self) -> Literal["keep_rows_with_tokens", "keep", "drop"]:
        """Which newlines stay when attach() gets newlines="auto"."""
        return "keep_rows_with_tokens"

    @property
    def count(self) -> Count:
        """How the number of kept tokens relates to the budget."""
        return Count.EXACT

    def min_keep(self, layout: Layout) -> int:
        """The least budget this method can meet on a layout."""
        return 1

    def needs(self, tower: Tower) -> frozenset[Signal]:
        """Signals to collect from this tower, with absolute layers.

        Raises:
            OptionError: a layer option does not exist in this tower.
        """
        return frozenset()

    def cost(self, layout: Layout, n_keep: int, widths: Widths) -> Ops:
        """Matrix products of `select` for one image; signals not counted."""
        return Ops()

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        """The tokens with `keep` set, and `features` changed where the method merges."""
        raise NotImplementedError

    def write_file(self, path: Path) -> None:
        """Write a copy of the file that `needs_file` names.

        Raises:
            OSError: it cannot be written.
        """
        shutil.copyfile(getattr(self, self.needs_file), path)

    def __str__(self):
        options = ", ".join(
            f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default
        )
        return f"{type(self).__name__}({options})"


@dataclass(frozen=True)
class ScoreMethod(Method):
    """A method that keeps high scores: write `score`, and `chosen` if it is not simply the highest."""

    @property
    def is_filterable(self) -> bool:
        """Whether filters may drop tokens before it."""
        return True

    def score(self, tokens: VisualTokens) -> Tensor:
        """(G, N) float32, finite; higher is kept."""
        raise NotImplementedError

    def chosen(self, ranked: Tensor, tokens: VisualTokens, n_keep: int) -> Tensor:
        """(G, N) bool: what is kept; scores of filtered tokens are -inf."""
        return torch.zeros_like(tokens.keep).scatter(1, ops.keep_top(ranked, n_keep), True)

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        """Keep high scores; ties go to the lower index, filtered tokens come last."""
        scores = self.score(tokens)
        ranked = scores.masked_fill(~tokens.keep, -torch.inf)
        return replace(tokens, keep=self.chosen(ranked, tokens, n_keep), scores=scores)


@dataclass(frozen=True)
class RankMethod(ScoreMethod):
    """A score method that ranks all tokens of an image together, or each crop separately.

    Args:
        split: "joint" ranks all tokens of an image together; "even" gives every crop the same share, as
            methods that compress each crop separately. With one crop they are the same.
    """

    split: Split = "joint"

    def chosen(self, ranked: Tensor, tokens: VisualTokens, n_keep: int) -> Tensor:
        if self.split == "joint" or len(tokens.layout.crops) == 1:
            return super().chosen(ranked, tokens, n_keep)
        return top_by_crop(ranked, tokens.layout, ops.shares(tokens.layout.crop_sizes, n_keep, even=True))


@dataclass(frozen=True)
class Filter(Method):
    """Drops tokens before a score method selects from the rest: write `passes`. It takes no budget."""

    is_filter: ClassVar[bool] = True

    @property
    def takes_budget(self) -> bool:
        return False

    def passes(self, tokens: VisualTokens) -> Tensor:
        """(G, N) bool: what is left."""
        raise NotImplementedError


def cls_signal(
    tower: Tower, layers: tuple[int, ...], without_cls: WithoutCLS, form: Form = "softmax", heads: Heads = "mean"
) -> Signal:
    """The signal for [CLS] attention; for received attention if `without_cls` says so and the tower has no [CLS]."""
    received = without_cls == "received" and not tower.has_cls
    return Signal(Kind.RECEIVED if received else Kind.CLS_ROW, layers, form, heads)


def cls_values(tokens: VisualTokens, heads: Heads = "mean") -> Tensor:
    """(G, l, N): the values of the `cls_signal` over these heads."""
    return tokens.signal(Kind.CLS_ROW if tokens.has(Kind.CLS_ROW) else Kind.RECEIVED, heads=heads)
