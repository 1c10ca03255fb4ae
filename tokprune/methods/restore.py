"""RESTORE: what merging and distance take from visual tokens, given back by a bias of attention; for any method."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from ..core import ops
from ..core.errors import OptionError, shown
from ..core.layout import Layout
from ..core.lazy import F, torch
from ..core.signals import Signal, Tower
from ..core.tokens import Count, Stage, VisualTokens
from ..cost.flops import Ops
from ..cost.selection import Widths
from .base import Method

if TYPE_CHECKING:
    from torch import Tensor

Calibrate = Literal["positions", "sizes", "bias", "bias_all", "merge", "restore"]
OPTION, OFF = "calibrate", ("off", "false")
USE = f"use {OPTION}=true, off, {', '.join(get_args(Calibrate))}"


@dataclass(frozen=True)
class Bias:
    """What is added to the attention scores of query m and key n: log(s_n (2 - D)), D from the distance of m and n.

    s_n is how many tokens key n stands for, D the mean cosine of the angles by which rotary positions turn m and n
    apart: 1 at the same place, towards 0 far away.

    Args:
        distance: with D; otherwise log(s_n) alone.
        all_keys: also for keys that are text, as the paper's formula is written; otherwise for visual ones.
    """

    distance: bool = True
    all_keys: bool = False


@dataclass(frozen=True)
class Calibrated(Method):
    """A method before the language model with the calibration of RESTORE: the option `calibrate` of every such method.

    With "restore" (or true) half of the budget is the method's, the other half are anchors, to which all other tokens
    are merged: tokens that many are like (R, the sum of cosines) and no token with a larger R is. An anchor and what
    goes to it become their mean, at the place of the median of them. Kept tokens keep their positions, and attention
    to a visual key n from a query m gets log(s_n (2 - D(m, n))), see `Bias`.

    Source:   "RESTORE", equations 3 to 8. Written from the formula.
    Faithful: to the formula; there are no golden cases.
    Differs:  the method has the larger half of an odd budget; of equal R the lower index counts as larger; the median
              of an even number is the lower one; under M-RoPE D is the mean cosine over all axes, and where only a part
              of a head is turned, the mean over that part.
    Needs:    what the method needs, and attention that takes a mask of numbers (sdpa, eager). Cost: O(N^2 D) for
              anchors; the bias is one product of the width of a head a pass, less than one head of one layer, and is
              not counted.

    Args:
        method: selects before the language model.
        calibrate: "restore" as above; "bias" without anchors; "bias_all" with the bias for all keys, text too; "sizes"
            with log(s_n) alone; "merge" the anchors without bias; "positions" kept positions alone.
    """

    method: Method
    calibrate: Calibrate = "restore"

    keeps_positions: ClassVar[bool] = True
    source: ClassVar[str] = "RESTORE"

    def __post_init__(self):
        super().__post_init__()
        named = f"calibrate={self.calibrate}"
        if self.method.stage is Stage.DECODER or self.method.is_filter:
            where = "is a filter" if self.method.is_filter else "cuts between decoder layers"
            raise OptionError(
                f"{self.method} {where}, and {named} is for methods before the language model: leave it out"
            )
        if not self.merges:
            return
        if not self.method.keeps_features:
            raise OptionError(f"{self.method} merges tokens itself, so {named} cannot; use calibrate=bias")
        if self.method.count is not Count.EXACT or self.method.space == "pixels":
            raise OptionError(
                f"{self.method} does not keep an exact number of tokens after the vision tower, which {named} needs; "
                "use calibrate=bias"
            )

    @property
    def merges(self) -> bool:
        """Whether half of the budget are anchors."""
        return self.calibrate in ("merge", "restore")

    @property
    def attention_bias(self) -> Bias | None:
        """What attention gets; None for nothing."""
        if self.calibrate in ("merge", "positions"):
            return None
        return Bias(self.calibrate != "sizes", self.calibrate == "bias_all")

    @property
    def members(self) -> tuple[Method, ...]:
        """The filters of a chain, and what follows them calibrated."""
        *filters, last = self.method.members
        return *filters, replace(self, method=last)

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return self.method.needs(tower)

    def min_keep(self, layout: Layout) -> int:
        least = self.method.min_keep(layout)
        return 2 * least - 1 if self.merges else least

    def cost(self, layout: Layout, n_keep: int, widths: Widths) -> Ops:
        """The method's, and cosines among the rest and to the anchors."""
        if not self.merges:
            return self.method.cost(layout, n_keep, widths)
        n_anchors = n_keep // 2
        n_rest = layout.n_visual - (n_keep - n_anchors)
        return self.method.cost(layout, n_keep - n_anchors, widths) + Ops(
            n_rest * (n_rest + n_anchors) * widths.rows if n_anchors else 0
        )

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        n_anchors = n_keep // 2 if self.merges else 0
        chosen = self.method.select(tokens, n_keep - n_anchors)
        if not n_anchors:
            return chosen
        rest = ops.keep_top((~chosen.keep).float(), tokens.n_visual - (n_keep - n_anchors))
        rows, places, sizes = merged_anchors(ops.take(tokens.features, rest), n_anchors)
        at = rest.gather(1, places)
        ones = torch.ones_like(chosen.keep, dtype=torch.float32)
        return replace(
            chosen,
            keep=chosen.keep.scatter(1, at, True),
            features=ops.put(tokens.features, at, rows),
            sizes=ones.scatter(1, at, sizes),
        )

    def __str__(self):
        return f"{self.method}:{OPTION}={self.calibrate}"


# Of a calibrated method, these are the method's.
for _name in ("takes_budget", "newlines", "count", "space", "needs_file", "if_missing", "if_budget"):
    setattr(Calibrated, _name, property(operator.attrgetter(f"method.{_name}")))
Calibrated.keeps_features = property(lambda self: not self.merges and self.method.keeps_features)  # type: ignore


def calibrated(method: Method, value: Any) -> Method:
    """The method with a value of `calibrate`, as typed or as given; itself where that says off.

    Raises:
        OptionError: no such value, or a method that cannot be calibrated.
    """
    text = str(value).lower()
    if text in OFF or value is None:
        return method
    text = "restore" if text == "true" else text
    if text not in get_args(Calibrate):
        raise OptionError(f"{OPTION}={shown(value)} is not one of its values; {USE}")
    return Calibrated(method, text)  # type: ignore[arg-type]


def merged_anchors(x: Tensor, n_anchors: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge all rows to a few of them.

    Args:
        x: (G, M, D).
        n_anchors: A, 1..M.

    Returns:
        The means (G, A, D) float32, the place of the median of each among the M (G, A), and how many rows each is of
        (G, A) float32.
    """
    unit = F.normalize(x.float(), dim=-1)
    anchors = ops.keep_top(_unlike_larger(unit), n_anchors)
    owner = _nearest(unit, ops.take(unit, anchors))
    owner = owner.scatter(1, anchors, torch.arange(n_anchors, device=x.device).expand_as(anchors))
    sizes = torch.zeros_like(anchors).scatter_add(1, owner, torch.ones_like(owner))
    sums = torch.zeros(len(x), n_anchors, x.shape[2], device=x.device)
    sums = sums.scatter_add(1, owner[..., None].expand_as(x), x.float())
    by_owner = owner.argsort(dim=1, stable=True)
    places = by_owner.gather(1, sizes.cumsum(1) - sizes + (sizes - 1) // 2)
    return sums / sizes[..., None], places, sizes.float()


def _unlike_larger(unit: Tensor) -> Tensor:
    """(G, M): R (1 - the largest cosine to a row with a larger R), R the sum of a row's cosines."""
    total = (unit @ unit.sum(1)[..., None])[..., 0]
    index = torch.arange(unit.shape[1], device=unit.device)
    found = []
    n = _at_once(unit)
    for rows, own, at in zip(unit.split(n, 1), total.split(n, 1), index.split(n), strict=True):
        larger = (total[:, None] > own[..., None]) | ((total[:, None] == own[..., None]) & (index < at[:, None]))
        near = (rows @ unit.transpose(1, 2)).masked_fill(~larger, -torch.inf).amax(2)
        found.append(own * (1 - torch.where(larger.any(2), near, 0.0)))
    return torch.cat(found, 1)


def _nearest(unit: Tensor, anchors: Tensor) -> Tensor:
    """(G, M): which anchor (G, A, D) every row is most like; the lowest of equals."""
    found = []
    for rows in unit.split(_at_once(unit), 1):
        near = rows @ anchors.transpose(1, 2)
        found.append(ops.first_highest(near.flatten(0, 1)).view(near.shape[:2]))
    return torch.cat(found, 1)


def _at_once(unit: Tensor) -> int:
    """Rows of which all cosines are held at a time."""
    return max(1, ops.LARGEST // unit.shape[:2].numel())
