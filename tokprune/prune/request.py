"""What is asked of a model: a method before the language model, one between its layers, their budgets, or a replay."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..core.budget import REFERENCE_TEXT, Budget, Scope
from ..core.errors import BudgetError, OptionError, TokPruneError, UnknownOptionError
from ..core.lazy import torch
from ..core.registry import nearest
from ..core.signals import Decoder
from ..core.tokens import Stage
from ..cost.flops import Shape
from ..methods import Spec, build_method
from ..methods.base import Method
from ..methods.compose import Pair

if TYPE_CHECKING:
    from torch import Tensor

Given = tuple[Any, Any, Any]  # keep_ratio, keep_tokens, flops_ratio
ARGUMENTS = (
    "keep_ratio",
    "keep_tokens",
    "flops_ratio",
    "flops_scope",
    "flops_text",
    "positions",
    "newlines",
    "replay",
)
Positions = Literal["auto", "contiguous", "original"]
Newlines = Literal["keep_rows_with_tokens", "keep", "drop"]


@dataclass(frozen=True)
class Replay:
    """What an earlier attachment kept: of every image indices by layer, 0 for before the language model."""

    kept: Sequence[Mapping[int, Tensor]]

    def of(self, image: int) -> Mapping[int, Tensor]:
        """Of one image of the call.

        Raises:
            TokPruneError: the call has more images than were kept of.
        """
        if image >= len(self.kept):
            raise TokPruneError(
                f"replay holds the selections of {len(self.kept)} images and this call has more; pass what was kept of "
                "the same call"
            )
        return self.kept[image]

    def keep(self, image: int, layer: int, n_rows: int) -> Tensor:
        """(N,) bool on the CPU; everything where nothing was dropped at this layer."""
        kept = self.of(image).get(layer)
        if kept is None:
            return torch.ones(n_rows, dtype=torch.bool)
        if len(kept) and int(kept.max()) >= n_rows:
            raise TokPruneError(f"replay keeps row {int(kept.max())} of an image of {n_rows} rows; is it another one?")
        return torch.zeros(n_rows, dtype=torch.bool).index_fill(0, kept, True)


@dataclass(frozen=True)
class Request:
    """What is asked of a model; everything is checked that needs no model.

    Args:
        label: the methods as they were asked for.
        method: the method object, or a pair of them.
        before, between: what selects before the language model and between its layers; None where nothing does.
        before_budget, between_budget: None for a method that decides by itself.
        replay: kept tokens to use again, instead of selecting.
        positions: "contiguous" renumbers the kept tokens, "original" leaves their numbers, "auto" is the family's.
        newlines: which newlines stay.
    """

    label: str
    method: Method | Pair
    before: Method | None
    between: Any
    before_budget: Budget | None = None
    between_budget: Budget | None = None
    replay: Replay | None = None
    positions: Positions = "auto"
    newlines: Newlines = "keep_rows_with_tokens"

    def check(self, decoder: Decoder, shape: Shape | None) -> None:
        """Raise OptionError where this does not fit a language model, BudgetError where its cost has to be known."""
        if shape is None and any(b is not None and b.flops_ratio for b in (self.before_budget, self.between_budget)):
            raise BudgetError("the FLOPs of this model are not known; use keep_ratio or keep_tokens")
        if self.between is not None:
            self.between.check(decoder)
        for kept in self.replay.kept if self.replay else ():
            most = decoder.n_layers if self.between is not None else 1
            if any(not 0 <= layer < most for layer in kept):
                raise OptionError(f"replay names layers {sorted(kept)}; {self.label!r} cuts from 0 to {most - 1} here")

    @property
    def attention_bias(self) -> Any:
        """What attention to kept tokens gets, as `Method.attention_bias`."""
        return None if self.before is None else self.before.attention_bias

    @property
    def budget(self) -> Budget | tuple[Budget, Budget] | None:
        """As it was asked for; a pair for two methods that take one each."""
        if self.before_budget and self.between_budget:
            return self.before_budget, self.between_budget
        return self.before_budget or self.between_budget

    @property
    def budget_text(self) -> str:
        """For the report."""
        if self.replay is not None:
            return "replayed"
        budget = self.budget
        return ", then ".join(map(str, budget)) if isinstance(budget, tuple) else str(budget or "")


def request_of(
    method: Spec,
    options: Mapping[str, Any] | None = None,
    *,
    keep_ratio: Any = None,
    keep_tokens: Any = None,
    flops_ratio: Any = None,
    flops_scope: Scope = "llm",
    flops_text: int = REFERENCE_TEXT,
    positions: Positions = "auto",
    newlines: Newlines | Literal["auto"] = "auto",
    replay: Sequence[Any] | None = None,
) -> Request:
    """Methods, budgets and settings as `tokprune.attach` takes them, checked against each other.

    Raises:
        UnknownNameError, OptionError: no such method, option or value; a replay with a budget, or of a method that
            merges.
        TokPruneError: a filter alone, or more methods than one model can carry.
        BudgetError: a budget too many, too few, or for a method that takes none.
    """
    options = dict(options or {})
    if "keep" in options:
        raise OptionError("unknown option 'keep': did you mean keep_ratio=0.25 or keep_tokens=64?")
    if _is_list(method) and (meant := _meant(options)):
        raise UnknownOptionError(f"unknown option {', '.join(options)}{meant}")
    try:
        built, label = build_method(method, options)
    except UnknownOptionError as error:
        raise UnknownOptionError(f"{error}{_meant(options)}") from None
    if isinstance(built, Method) and built.is_filter:
        after = "fastv" if built.stage is Stage.DECODER else "vtc_cls"
        raise TokPruneError(
            f'{label!r} is a filter and needs a method after it: [{label!r}, {after!r}], or the name "{label}+{after}"'
        )
    before, between = built.stages
    given = (keep_ratio, keep_tokens, flops_ratio)
    found = None if replay is None else _checked_replay(replay, (before, between), label, given)
    takers = [m for m in (before, between) if m is not None and m.takes_budget and found is None]
    split = [] if found else _split(given, len(takers), built, label)
    budgets = {id(m): Budget(*values, flops_scope, flops_text) for m, values in zip(takers, split, strict=True)}
    one_of("positions", positions, get_args(Positions))
    one_of("newlines", newlines, ("auto", *get_args(Newlines)))
    if newlines == "auto":
        newlines = before.newlines if before is not None else "keep_rows_with_tokens"
    return Request(
        label=label,
        method=built,
        before=before,
        between=between,
        before_budget=budgets.get(id(before)),
        between_budget=budgets.get(id(between)),
        replay=found,
        positions=positions,
        newlines=newlines,
    )


def _is_list(method: Spec) -> bool:
    """Whether several methods are asked for, to which keyword options cannot belong."""
    return "+" in method if isinstance(method, str) else isinstance(method, Sequence)


def _meant(options: Mapping[str, Any]) -> str:
    """The argument of attach() that an unknown keyword probably is, for a message."""
    near = [name for name in (nearest(key, set(ARGUMENTS) - {key}) for key in options) if name]
    return f". Did you mean {near[0]}, an argument of attach()?" if near else ""


def _split(given: Given, n: int, built: Any, label: str) -> list[Given]:
    """One budget a method."""
    if not n:
        if given == (None, None, None):
            return []
        instead = f", or type {label}:{built.if_budget}" if built.if_budget else ""
        raise BudgetError(f"{label!r} takes no budget; leave keep_ratio, keep_tokens and flops_ratio out{instead}")
    lists = [list(v) if isinstance(v, (list, tuple)) else v for v in given]
    if n == 1 and any(isinstance(v, list) and len(v) != 1 for v in lists):
        raise BudgetError(f"{label!r} takes one budget; type keep_ratio=0.25")
    if n == 1:
        return [tuple(v[0] if isinstance(v, list) and len(v) == 1 else v for v in lists)]  # type: ignore[list-item]
    if lists[2] is not None:
        raise BudgetError(f"{label!r} takes {n} budgets; flops_ratio is for one, type keep_ratio=[0.5, 0.5]")
    if lists[0] is not None and not isinstance(lists[0], list) and lists[1] is None:
        each = float(Budget(lists[0]).keep_ratio or 0) ** (1 / n)
        return [(each, None, None)] * n
    return _split_lists(lists, n, label)


def _split_lists(lists: Sequence[Any], n: int, label: str) -> list[Given]:
    """One entry of a list for each of several methods."""
    for i, name in enumerate(("keep_ratio", "keep_tokens")):
        values, other = lists[i], lists[1 - i]
        falls = name == "keep_ratio" or not isinstance(values, list) or list(values) == sorted(values, reverse=True)
        if not falls:
            raise BudgetError(f"{name}={values} rises, and a method cannot keep more than it is given; type [72, 36]")
        if isinstance(values, list) and len(values) == n and other is None:
            return [tuple(v if k == i else None for k in range(3)) for v in values]  # type: ignore[misc]
        if values is not None and other is None:
            raise BudgetError(
                f"{label!r} takes {n} budgets, of what each method is given; type "
                f"{name}={[0.5, 0.5] if name == 'keep_ratio' else [72, 36]}"
            )
        if values is not None:
            raise BudgetError("give exactly one budget: keep_ratio=[0.5, 0.5] or keep_tokens=[72, 36]")
    raise BudgetError(
        f"{label!r} takes {n} budgets; type keep_ratio=[0.5, 0.5], of what each method is given, or keep_ratio=0.25 "
        "for what both leave together"
    )


def _checked_replay(replay: Sequence[Any], methods: tuple[Any, ...], label: str, given: Given) -> Replay:
    if given != (None, None, None):
        raise BudgetError("replay takes no budget, it says what is kept; leave the budget out")
    for method in methods:
        if method is not None and not method.keeps_features:
            raise OptionError(f"{label!r} changes the tokens that it keeps, so that indices alone cannot replay it")
    entries = [kept if isinstance(kept, Mapping) else {0: kept} for kept in replay]
    if isinstance(replay, torch.Tensor) or not all(map(_is_kept, entries)):
        raise OptionError(
            "replay is attachment.kept of an earlier call: a list of index tensors, or of {layer: tensor}"
        )
    return Replay(entries)


def _is_kept(kept: Mapping) -> bool:
    """Whether this is {layer: indices}, ascending and each a part of the one before."""
    if not all(isinstance(layer, int) and isinstance(t, torch.Tensor) for layer, t in kept.items()):
        return False
    rows = [kept[layer] for layer in sorted(kept)]
    if not all(t.ndim == 1 and t.dtype == torch.int64 and bool((t.diff() > 0).all()) for t in rows):
        return False
    sets = [set(t.tolist()) for t in rows]
    return all(min(s, default=0) >= 0 for s in sets) and all(b <= a for a, b in itertools.pairwise(sets))


def one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise OptionError unless the value is allowed."""
    if value not in allowed:
        raise OptionError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
