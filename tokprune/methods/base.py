"""What a method is: a frozen dataclass of options that says what it needs and selects visual tokens."""

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

    A method knows no model and never loops over images: it gets the G images of one layout at once. It does
    not read from the device. The budget is an argument, not an option.
    """

    stage: ClassVar[Stage] = Stage.PRE_LLM
    keeps_features: ClassVar[bool] = True  # kept tokens stay as they are; False where a method merges or averages
    space: ClassVar[Literal["packed", "tower"]] = "packed"  # "tower": merges what the projector takes, if it can
    is_filter: ClassVar[bool] = False  # only goes before a method, in a list
    needs_file: ClassVar[str] = ""  # the option that names a file without which it does nothing
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {}  # least and largest value of numeric options
    source: ClassVar[str] = ""
    if_missing: ClassVar[str] = ""  # the option to type where a tower lacks what this needs
    if_budget: ClassVar[str] = ""  # the option to type where a budget is asked of a method that decides by itself

    def __post_init__(self):
        for option in fields(self):
            check(type(self), option.name, getattr(self, option.name))
        for name, (least, most) in self.limits.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise OptionError(f"{type(self).__name__}: {name}={value} is out of range; type {least:g} to {most:g}")

    @property
    def takes_budget(self) -> bool:
        """Whether it keeps what it is told to; False where it decides by itself."""
        return True

    @property
    def n_budgets(self) -> int:
        """How many budgets it takes; a list of two methods takes two."""
        return int(self.takes_budget)

    @property
    def stages(self) -> tuple[Method | None, Method | None]:
        """What acts before the language model, and between its layers."""
        return (self, None) if self.stage is Stage.PRE_LLM else (None, self)

    @property
    def members(self) -> tuple[Method, ...]:
        """Filters and methods in the order of a list."""
        return (self,)

    @property
    def newlines(self) -> Literal["keep_rows_with_tokens", "keep", "drop"]:
        """Which newlines stay where attach() is not told."""
        return "keep_rows_with_tokens"

    @property
    def count(self) -> Count:
        """What the number of kept tokens promises."""
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
        """Write what was read from the file that `needs_file` names; a copy of it unless a method kept what it read.

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
    """A method that keeps high scores: write `score`, and `chosen` where it is not the highest of all."""

    @property
    def is_filterable(self) -> bool:
        """Whether filters may drop tokens before it."""
        return True

    def score(self, tokens: VisualTokens) -> Tensor:
        """(G, N) float32, finite; higher is kept."""
        raise NotImplementedError

    def chosen(self, ranked: Tensor, tokens: VisualTokens, n_keep: int) -> Tensor:
        """(G, N) bool: what is kept, from scores of which those that a filter dropped are -inf."""
        return torch.zeros_like(tokens.keep).scatter(1, ops.keep_top(ranked, n_keep), True)

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        """Keep high scores; equal ones go to the lower index, what a filter dropped comes last."""
        scores = self.score(tokens)
        ranked = scores.masked_fill(~tokens.keep, -torch.inf)
        return replace(tokens, keep=self.chosen(ranked, tokens, n_keep), scores=scores)


@dataclass(frozen=True)
class RankMethod(ScoreMethod):
    """A score method that ranks all tokens of an image together, or those of every crop by themselves.

    Args:
        split: "joint" ranks all tokens of an image together; "even" gives every crop the same share, as methods
            do that compress each crop by itself. Where there is one crop it is the same.
    """

    split: Split = "joint"

    def chosen(self, ranked: Tensor, tokens: VisualTokens, n_keep: int) -> Tensor:
        if self.split == "joint" or len(tokens.layout.crops) == 1:
            return super().chosen(ranked, tokens, n_keep)
        return top_by_crop(ranked, tokens.layout, ops.shares(tokens.layout.crop_sizes, n_keep, even=True))


@dataclass(frozen=True)
class Filter(Method):
    """Drops tokens before a score method selects among the others: write `passes`. It takes no budget."""

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
    """What [CLS] attends to, or, where that is asked for and there is none, what tokens receive."""
    received = without_cls == "received" and not tower.has_cls
    return Signal(Kind.RECEIVED if received else Kind.CLS_ROW, layers, form, heads)


def cls_values(tokens: VisualTokens, heads: Heads = "mean") -> Tensor:
    """(G, l, N): the values of the only `cls_signal` over these heads."""
    return tokens.signal(Kind.CLS_ROW if tokens.has(Kind.CLS_ROW) else Kind.RECEIVED, heads=heads)
