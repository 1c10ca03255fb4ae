"""What a method is: a frozen dataclass of options that says what it needs and selects visual tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from .. import ops
from ..flops import Ops
from ..registry import check
from ..types import Count, Layout, Signal, Stage, Tower, VisualTokens


@dataclass(frozen=True)
class Method:
    """Selects visual tokens; subclass it with options as fields and write `select`.

    A method knows no model and never loops over images: it gets the G images of one layout at once. It does
    not read from the device. The budget is an argument, not an option.
    """

    stage: ClassVar[Stage] = Stage.PRE_LLM
    takes_budget: ClassVar[bool] = True
    keeps_features: ClassVar[bool] = True  # kept tokens stay as they are; False where a method merges or averages
    source: ClassVar[str] = ""
    if_missing: ClassVar[str] = ""  # the option to type where a tower lacks what this needs

    def __post_init__(self):
        for option in fields(self):
            check(type(self), option.name, getattr(self, option.name))

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

    def cost(self, n_visual: int, n_keep: int, width: int) -> Ops:
        """Matrix products of `select` for one image of `n_visual` tokens of a width, signals not counted."""
        return Ops()

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        """The tokens with `keep` set, and `features` changed where the method merges."""
        raise NotImplementedError

    def __str__(self):
        options = ", ".join(
            f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default
        )
        return f"{type(self).__name__}({options})"


@dataclass(frozen=True)
class ScoreMethod(Method):
    """A method that keeps the highest scores: write `score`."""

    def score(self, tokens: VisualTokens) -> Tensor:
        """(G, N) float32, finite; higher is kept."""
        raise NotImplementedError

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        """Keep the `n_keep` highest scores; equal ones go to the lower index."""
        scores = self.score(tokens)
        return tokens.keeping(ops.keep_top(scores, n_keep), scores)
