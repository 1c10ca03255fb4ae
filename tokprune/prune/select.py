"""Selecting visual tokens of encoded pictures: plain tensors in, kept rows out; independent of any model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from ..core import ops
from ..core.budget import Budget
from ..core.errors import BudgetError, OptionError
from ..core.layout import NEWLINE, Layout
from ..core.lazy import torch
from ..core.signals import Signal
from ..core.tokens import Count, VisualTokens
from ..cost.selection import SelectionCost
from ..methods import Spec
from ..methods.base import Method, checked_selection, mistake, mistaken
from .copies import salts_of
from .request import Newlines, request_of
from .slow import warn_if_slow

if TYPE_CHECKING:
    from torch import Tensor

Project: TypeAlias = "Callable[[Tensor], Tensor]"


@dataclass(frozen=True)
class Picture:
    """An encoded picture or video.

    Args:
        features: (N, D), one row for each placeholder in the prompt.
        layout: where the rows lie; `tokprune.core.layout.grid_layout(24, 24)` for one crop of 24 x 24 tokens.
        signals: what the method `needs`: (l, N_visual, ...) of the tokens that show a patch, for l layers; (C, D) of
            crops or (T, D) of text for kinds that are not about tokens.
        states: (N_visual, D_tower), the tower's states that `project` makes rows of, one to one; None where it cannot.
        is_video: what it is called in the report.
    """

    features: Tensor
    layout: Layout
    signals: dict[Signal, Tensor] = field(default_factory=dict)
    states: Tensor | None = None
    is_video: bool = False


@dataclass(frozen=True)
class Kept:
    """What is left of a picture.

    Args:
        index: (K,) int64, ascending: the kept rows among the N.
        features: (K, D): those rows, changed where the method merges.
    """

    index: Tensor
    features: Tensor


@dataclass(frozen=True)
class Group:
    """Pictures of one layout from which tokens were dropped.

    Args:
        members: their places among all pictures.
        given: (G, N, D), their rows as they were.
        features: (G, N, D), changed where the method merges.
        keep: (G, N) bool.
        mistake: scalar on the device, as `tokprune.methods.base.mistake`: whether the method broke its promises.
        sizes: (G, N), how many tokens every kept row stands for; None for one each.
    """

    members: list[int]
    given: Tensor
    features: Tensor
    keep: Tensor
    mistake: Tensor
    sizes: Tensor | None = None


class Selector:
    """A method with its budget.

    Args:
        method: selects before the language model.
        budget: None for a method that decides by itself.
        label: the method as it was asked for, for messages.
        newlines: which newlines stay.
        flops: (layout, n_keep) to FLOPs, for a budget of them.
        project: from states of the tower to rows, for methods that merge states.
    """

    def __init__(
        self,
        method: Method,
        budget: Budget | None,
        label: str,
        newlines: Newlines,
        flops: Callable[[Layout, int], int] | None = None,
        project: Project | None = None,
    ):
        self.method, self.budget, self.label, self.newlines = method, budget, label, newlines
        self._flops, self._project = flops, project
        self.n_keep = functools.lru_cache(maxsize=64)(self._n_keep)  # a FLOPs budget is searched for

    def _n_keep(self, layout: Layout) -> int:
        """Visual tokens to keep of a picture; 0 where the method decides by itself."""
        if self.budget is None:
            return 0
        least = min(self.method.min_keep(layout), layout.n_visual)
        flops = None if self._flops is None else functools.partial(self._flops, layout)
        return checked_least(self.budget.n_keep(layout.n_visual, flops, least), least, layout.n_visual, self.label)

    def groups(self, pictures: Sequence[Picture], salts: Sequence[int]) -> Iterator[Group]:
        """Select, group by group of pictures with one layout; pictures of which all is kept are in no group."""
        for layout in dict.fromkeys(p.layout for p in pictures):
            n_keep = self.n_keep(layout)
            if n_keep >= layout.n_visual:
                continue  # before any method code: the model stays bit-identical
            members = [i for i, p in enumerate(pictures) if p.layout == layout]
            group = [pictures[i] for i in members]
            rows = stacked([p.features for p in group])
            yield Group(members, rows, *self._select(group, rows, tuple(salts[i] for i in members), n_keep))

    def _select(
        self, group: Sequence[Picture], rows: Tensor, salts: tuple[int, ...], n_keep: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Features, keep, the mistake and sizes, of pictures of one layout.

        Special tokens (newlines, [CLS]) never reach the method.
        """
        first = group[0]
        layout = first.layout
        visual = ops.on_device(layout.visual, rows.device)
        own = rows if layout.n_visual == len(layout.crop) else rows[:, visual]
        states = None if first.states is None or self._project is None else stacked([p.states for p in group])
        signals = {s: stacked([p.signals[s] for p in group]) for s in first.signals}
        tokens = VisualTokens.of(own if states is None else states, layout.without_specials, signals, salts)
        warn_if_slow(self.method, self.label, tokens, n_keep)
        with torch.autocast(rows.device.type, enabled=False):  # it would compare tokens in half precision
            selected = checked_selection(self.method, self.method.select(tokens, n_keep), tokens)
        wrong = mistake(selected, None if self.budget is None else n_keep, self.method.count)
        features = selected.features if states is None else self._projected(selected, own, n_keep)
        sizes = selected.sizes
        if own is rows:
            return features, selected.keep, wrong, sizes
        keep = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        keep = with_newlines(keep.index_copy(1, visual, selected.keep), layout, self.newlines)
        if sizes is not None:
            sizes = torch.ones(rows.shape[:2], device=rows.device).index_copy(1, visual, sizes)
        return rows if features is own else rows.index_copy(1, visual, features), keep, wrong, sizes

    def _projected(self, selected: VisualTokens, own: Tensor, n_keep: int) -> Tensor:
        """Tower states through the model's own projector: the kept ones, where their number is known."""
        project: Any = self._project
        if self.method.count is not Count.EXACT:
            return project(selected.features).to(own.dtype)
        kept = ops.keep_top(selected.keep.float(), n_keep)
        return ops.put(own, kept, project(ops.take(selected.features, kept)))


def select(
    pictures: Sequence[Picture],
    method: Spec,
    *,
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    salts: Sequence[int] = (0,),
    newlines: Newlines | Any = "auto",
    project: Project | None = None,
    **options: Any,
) -> list[Kept]:
    """Select the visual tokens of encoded pictures, without a model.

    Args:
        pictures: what was encoded.
        method: as `tokprune.attach` takes it; it acts before the language model.
        keep_ratio: fraction of each picture's visual tokens to keep, in (0, 1].
        keep_tokens: number of them to keep, instead of a fraction.
        salts: for seeded methods, one a picture or one for all.
        newlines: which newlines stay, as `tokprune.attach` takes it.
        project: the model's projector, (..., D_tower) to (..., D), for methods that merge states of the tower.
        **options: options of the method.

    Returns:
        One entry a picture. Reading `index`, and once whether scores are finite, are the only device synchronisations.

    Raises:
        TokPruneError: as `tokprune.attach`.
        MissingSignalError: a picture lacks a signal that the method needs.
        MethodError: the method's class does not return what it has to.
    """
    request = request_of(method, options, keep_ratio=keep_ratio, keep_tokens=keep_tokens, newlines=newlines)
    if request.before is None or request.between is not None:
        raise OptionError(f"{request.label!r} acts between decoder layers; select() takes methods such as 'vtc_cls'")
    if len(salts) not in (1, len(pictures)):
        raise OptionError(f"{len(salts)} salts for {len(pictures)} pictures; use one a picture, or one for all")
    selector = Selector(request.before, request.before_budget, request.label, request.newlines, project=project)
    rows = [p.features for p in pictures]
    keeps = [torch.ones(len(r), dtype=torch.bool, device=r.device) for r in rows]
    mistakes: list[Tensor] = []
    for group in selector.groups(pictures, salts_of(salts, len(pictures))):
        mistakes.append(group.mistake)
        for place, i in enumerate(group.members):
            rows[i], keeps[i] = group.features[place], group.keep[place]
    if mistakes and (code := int(torch.stack(mistakes).amax())):
        raise mistaken(selector.method, code)
    index = [keep.nonzero()[:, 0] for keep in keeps]
    return [Kept(i, r[i]) for i, r in zip(index, rows, strict=True)]


def visual_rows(packed: Sequence[Tensor], layouts: Sequence[Layout], shape: Sequence[int]) -> list[Tensor]:
    """Values of patches after a model's packing: (N_visual, *shape) a picture.

    Args:
        packed: (N, C) each, together in the order of the pictures; special tokens may be among them.
        layouts: of the pictures.
        shape: of the C values of a patch.
    """
    rows, n_visual = torch.cat(list(packed)), [layout.n_visual for layout in layouts]
    if len(rows) == sum(n_visual):  # special tokens were not packed
        visual = list(rows.split(n_visual))
    else:
        pairs = zip(rows.split([len(layout.crop) for layout in layouts]), layouts, strict=True)
        visual = [r[ops.on_device(layout.visual, rows.device)] for r, layout in pairs]
    return [v.unflatten(1, tuple(shape)) for v in visual]


def stacked(rows: Sequence[Any]) -> Tensor:
    """(G, ...) from G tensors of one shape; one alone is not copied."""
    return torch.stack(list(rows)) if len(rows) > 1 else rows[0][None]


def checked_least(n_keep: int, least: int, n_visual: int, label: str) -> int:
    """The number of tokens to keep.

    Raises:
        BudgetError: it is below what the method can meet.
    """
    if n_keep < least:
        raise BudgetError(
            f"{label!r} cannot keep {n_keep} of {n_visual} tokens, its minimum here is {least}; "
            f"use keep_tokens={least} or more"
        )
    return n_keep


def most_specials(layout: Layout, n_keep: int, newlines: str) -> int:
    """Special tokens (newlines, [CLS]) that stay at most; a visual token keeps the newline of one row at most."""
    n_newlines = layout.n_newlines
    others = len(layout.crop) - layout.n_visual - n_newlines
    if newlines == "drop":
        return others if n_keep < layout.n_visual else others + n_newlines
    return others + (n_newlines if newlines == "keep" else min(n_newlines, n_keep))


def flops_of(
    cost: SelectionCost, budget: Budget, newlines: str, layout: Layout, n_keep: int, n_patches: int | None = None
) -> int:
    """FLOPs in the budget's scope of keeping a number of tokens of an image, with the reference text.

    Args:
        cost: of the selection, on the model.
        budget: says the scope and the text.
        newlines: which stay.
        layout: of the image.
        n_keep: its visual tokens that stay.
        n_patches: of a crop, where the picture's size decides.
    """
    n_text = budget.flops_text + most_specials(layout, n_keep, newlines)
    return getattr(cost.prefill(layout, n_keep, n_text, n_patches), budget.flops_scope).flops


def with_newlines(keep: Tensor, layout: Layout, newlines: str) -> Tensor:
    """(G, N) bool with newlines kept by the policy: those of rows that keep a token, all, or none.

    A newline that ends a whole picture counts as one of a row with all its tokens.
    """
    ends = [i for i, crop in enumerate(layout.crop) if crop == NEWLINE]
    if not ends or newlines == "keep":
        return keep
    at = ops.on_device(ends, keep.device)
    if newlines == "drop":
        return keep.index_fill(1, at, False)
    n_rows = 1 + max(layout.row)
    mosaic = [i for i in layout.visual if layout.crop[i] > 0]
    rows = ops.on_device([layout.row[i] for i in mosaic], keep.device)
    used = keep.new_zeros(len(keep), n_rows, dtype=torch.int32)
    used = used.index_add(1, rows, keep[:, ops.on_device(mosaic, keep.device)].int()) if mosaic else used
    whole = keep[:, ops.on_device(layout.visual, keep.device)].any(1, keepdim=True)
    used = torch.cat([used > 0, whole], 1)  # the last one is the whole picture
    return keep.index_copy(1, at, used[:, ops.on_device([layout.row[i] for i in ends], keep.device)])
