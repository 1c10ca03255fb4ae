"""Base classes of methods: frozen dataclasses of options that declare what they need and select visual tokens."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..core import ops
from ..core.errors import MethodError, OptionError, shown
from ..core.layout import Layout
from ..core.lazy import torch
from ..core.registry import check
from ..core.scores import heard
from ..core.signals import Form, Heads, Kind, Signal, Special, Tower
from ..core.tokens import Count, Stage, VisualTokens
from ..cost.flops import Ops
from ..cost.selection import Widths
from .crops import top_by_crop

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["joint", "even"]
RankSplit = Literal["joint", "even", "query"]
WithoutCLS = Literal["error", "received"]


@dataclass(frozen=True)
class Method:
    """Selects visual tokens; subclass it with options as fields and write `select`.

    A method is independent of models and never loops over images: it gets the G images of one layout together. It
    causes no device-to-host sync. The budget is an argument, not an option.
    """

    stage: ClassVar[Stage] = Stage.PRE_LLM
    keeps_features: ClassVar[bool] = True  # False if kept tokens are merged or averaged
    # "tower": merges the projector's input where possible; "pixels": selects before the tower, which runs on the rest.
    space: ClassVar[Literal["packed", "tower", "pixels"]] = "packed"
    is_filter: ClassVar[bool] = False  # needs a method after it
    keeps_positions: ClassVar[bool] = False  # kept tokens have to keep their positions
    attention_bias: ClassVar[Any] = None  # what attention gets, a `restore.Bias`; None for nothing
    needs_file: ClassVar[str] = ""  # the option with the file that it cannot run without
    # FLOPs of `cost` a second that `select` reaches on one CPU thread, within some factor of 3; a warning goes by it.
    cpu_rate: ClassVar[float] = 50e9
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
        raise unwritten(self, "select", "return tokens.keeping(index) for the (images, n_keep) indices that stay")

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
        raise unwritten(self, "score", "return (images, tokens), higher is kept")

    def chosen(self, ranked: Tensor, tokens: VisualTokens, n_keep: int) -> Tensor:
        """(G, N) bool: what is kept; scores of filtered tokens are -inf."""
        return torch.zeros_like(tokens.keep).scatter(1, ops.keep_top(ranked, n_keep), True)

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        """Keep high scores; ties go to the lower index, filtered tokens come last."""
        scores = checked_scores(self, self.score(tokens), tokens)
        heard(scores, tokens.index)
        ranked = scores.masked_fill(~tokens.keep, -torch.inf)
        return replace(tokens, keep=self.chosen(ranked, tokens, n_keep), scores=scores)


@dataclass(frozen=True)
class RankMethod(ScoreMethod):
    """A score method that ranks all tokens of an image together, or each crop separately.

    A subclass that needs signals adds them to what `super().needs(tower)` gives.

    Args:
        split: "joint" ranks all tokens of an image together; "even" gives every crop (of a video: every frame) the same
            share, as methods that compress each crop separately; "query" gives larger shares to crops that are like the
            prompt's text (QuoTA, `methods/quota.py`). With one crop they are the same.
    """

    split: RankSplit = "joint"

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({Signal(Kind.TEXT_EMBEDS)} if self.split == "query" else ())

    def cost(self, layout: Layout, n_keep: int, widths: Widths) -> Ops:
        """One product of every crop's mean with the question, where that splits the budget."""
        n_crops = len(layout.crops)
        return Ops(n_crops * widths.rows if self.split == "query" and n_crops > 1 else 0)

    def chosen(self, ranked: Tensor, tokens: VisualTokens, n_keep: int) -> Tensor:
        layout = tokens.layout
        if self.split == "joint" or len(layout.crops) == 1:
            return super().chosen(ranked, tokens, n_keep)
        if self.split == "query":
            from . import quota

            return top_by_crop(ranked, layout, quota.budgets(quota.relevance(tokens), layout.crop_sizes, n_keep))
        return top_by_crop(ranked, layout, ops.shares(layout.crop_sizes, n_keep, even=True))


@dataclass(frozen=True)
class Filter(Method):
    """Drops tokens before a score method selects from the rest: write `passes`. It takes no budget."""

    is_filter: ClassVar[bool] = True

    @property
    def takes_budget(self) -> bool:
        return False

    def passes(self, tokens: VisualTokens) -> Tensor:
        """(G, N) bool: what is left."""
        raise unwritten(self, "passes", "return (images, tokens) bool, true for what is left")


def unwritten(method: object, function: str, use: str) -> MethodError:
    """The error for a function that a subclass has to write."""
    return MethodError(f"{type(method).__name__} does not write {function}(self, tokens, ...): {use}")


def checked_scores(method: Method, scores: Tensor, tokens: VisualTokens) -> Tensor:
    """What `score` returned; nothing is read from the device.

    Raises:
        MethodError: it is no tensor of one number a token, or not on their device.
    """
    where = f"{type(method).__name__}.score must return (images, tokens)"
    shape = tuple(tokens.keep.shape)
    if not isinstance(scores, torch.Tensor):
        raise MethodError(f"{where}, a tensor of shape {shape} here, not {type(scores).__name__}")
    if tuple(scores.shape) != shape:
        raise MethodError(f"{where}, here {shape}; it returned {tuple(scores.shape)}")
    if not scores.is_floating_point() or scores.device != tokens.keep.device:
        raise MethodError(
            f"{where} as float32 on {tokens.keep.device}; it returned {scores.dtype} on {scores.device}: use "
            "scores.float(), and make tensors on tokens.features.device"
        )
    return scores


def checked_selection(method: Method, selected: VisualTokens, tokens: VisualTokens) -> VisualTokens:
    """What `select` returned, by type and shape; nothing is read from the device.

    Raises:
        MethodError: it is not these tokens with `keep` set.
    """
    where = f"{type(method).__name__}.select must return the tokens that it was given, with keep set"
    use = "use tokens.keeping(index) with (images, n_keep) indices"
    if not isinstance(selected, VisualTokens):
        raise MethodError(f"{where}, not {type(selected).__name__}: {use}")
    keep, shape = selected.keep, tuple(tokens.keep.shape)
    if not isinstance(keep, torch.Tensor) or keep.dtype != torch.bool or tuple(keep.shape) != shape:
        found = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, torch.Tensor) else type(keep).__name__
        raise MethodError(f"{where} as bool {shape}; keep is {found}: {use}")
    if tuple(selected.features.shape) != tuple(tokens.features.shape):
        raise MethodError(
            f"{where}; features became {tuple(selected.features.shape)} and were {tuple(tokens.features.shape)}: write "
            "merged tokens to rows that are kept"
        )
    return selected


MISCOUNTED, NOT_FINITE = 1, 2


def mistake(selected: VisualTokens, n_keep: int | None, count: Count) -> Tensor:
    """Scalar int8 on the device: 0, `MISCOUNTED` or `NOT_FINITE`; it is read together with what is read anyway.

    Args:
        selected: what `select` returned, with G images.
        n_keep: what it was asked to keep of each; None for a method that decides by itself.
        count: what the method promises about it.
    """
    found = torch.zeros((), dtype=torch.int8, device=selected.keep.device)
    if n_keep is not None and count is not Count.CONTENT:
        counts = selected.keep.sum(1)
        found = ((counts != n_keep) if count is Count.EXACT else (counts > n_keep)).any() * MISCOUNTED + found
    if selected.scores is not None:
        found = found.maximum((~selected.scores.isfinite()).any() * (found + NOT_FINITE))
    return found


def mistaken(method: Method, code: int) -> MethodError:
    """The error for a selection with a `mistake`."""
    if code >= NOT_FINITE:
        return MethodError(
            f"{type(method).__name__}.score returned NaN or infinity, which have no rank: use finite numbers (clamp a "
            "divisor, mask before a softmax), or torch.nan_to_num"
        )
    return MethodError(
        f"{type(method).__name__}.select kept another number of tokens than n_keep: keep exactly n_keep of each image, "
        "or let its property count return Count.AT_MOST or Count.CONTENT (tokprune.core)"
    )


def asked_signals(method: Method, function: Literal["needs", "reads"], where: Any) -> frozenset[Signal]:
    """What a method asks for, by `needs(tower)` or `reads(layer)`, checked.

    Raises:
        MethodError: it is no set of signals, or they are of another place.
    """
    found = getattr(method, function)(where)
    layers = "layer - 1," if function == "reads" else "tower.layer(-2),"
    kind = "LM_ROW" if function == "reads" else "CLS_ROW"
    use = f"return frozenset({{Signal(Kind.{kind}, ({layers}))}})"
    says = f"{type(method).__name__}.{function} must return a frozenset of signals"
    if not isinstance(found, (frozenset, set)) or not all(isinstance(signal, Signal) for signal in found):
        raise MethodError(f"{says}, not {shown(found)}: {use}")
    other = sorted(s.kind.name for s in found if s.kind.is_decoder != (function == "reads"))
    if other:
        place = "a vision tower" if function == "reads" else "the language model"
        raise MethodError(f"{says}; {other[0]} is measured in {place}: {use}")
    return frozenset(found)


def late_layer(tower: Tower, layer: int | None) -> int:
    """The layer of late attention: that option, else the one before the last, or the last one without [CLS].

    Papers on towers with [CLS] (CLIP) read what LLaVA reads; those on others (Qwen-VL) the last layer.
    """
    return tower.default_layer(-2 if tower.has_cls else -1) if layer is None else tower.layer(layer)


def cls_signal(
    tower: Tower,
    layers: tuple[int, ...],
    without_cls: WithoutCLS,
    form: Form = "softmax",
    heads: Heads = "mean",
    special: Special = "keys",
) -> Signal:
    """The signal for [CLS] attention; for received attention if `without_cls` says so and the tower has no [CLS]."""
    received = without_cls == "received" and not tower.has_cls
    return Signal(Kind.RECEIVED if received else Kind.CLS_ROW, layers, form, heads, special=special)


def cls_values(tokens: VisualTokens, heads: Heads = "mean") -> Tensor:
    """(G, l, N): the values of the `cls_signal` over these heads."""
    return tokens.signal(Kind.CLS_ROW if tokens.has(Kind.CLS_ROW) else Kind.RECEIVED, heads=heads)
