"""The nearest among changing halves of many tokens, on a CPU: from lists of neighbours, made a few times."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ..core import ops
from ..core.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

LENGTH = 32  # neighbours in a list
ROWS = 256  # at a time


def rounds_with_lists(sizes: Iterable[int]) -> Iterator[int]:
    """Of rounds in which so many tokens are left, those at which lists are made: where half of them are gone."""
    made = None
    for size in sizes:
        if made is None or 2 * size <= made:
            yield size
            made = size


class NearestOfMany:
    """The largest cosine of tokens to others, of (N, D); all that is not asked about any more is gone for good.

    Of a token's list the first that is among the others is the nearest of them. Only for a token with none of them in
    its list are cosines made again.
    """

    def __init__(self, x: Tensor):
        self._unit = F.normalize(x.float(), dim=-1)
        self._made: int | None = None
        self._list = torch.empty(len(x), 0, dtype=torch.int64)
        self._near = torch.empty(len(x), 0)

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """(a,): of the tokens (a,) to the others (b,)."""
        n_left = len(first) + len(second)
        if self._made is None or 2 * n_left <= self._made:
            self._make(torch.cat([first, second]))
        is_other = torch.zeros(len(self._unit), dtype=torch.bool)
        is_other[second] = True
        near = torch.where(is_other[self._list[first]], self._near[first], -torch.inf).amax(1)
        unknown = near.isneginf().nonzero()[:, 0]
        if len(unknown):
            others = self._unit[second].T
            parts = first[unknown].split(max(1, ops.LARGEST // len(second)))
            near[unknown] = torch.cat([(self._unit[part] @ others).amax(1) for part in parts])
        return near

    def _make(self, left: Tensor) -> None:
        """Lists of the tokens that are left, among these."""
        rows, n_most = self._unit[left], min(LENGTH, len(left) - 1)
        self._made = len(left)
        self._list = torch.zeros(len(self._unit), n_most, dtype=torch.int64)
        self._near = torch.zeros(len(self._unit), n_most)
        for at in torch.arange(len(left)).split(ROWS):
            cosines = rows[at] @ rows.T
            cosines[torch.arange(len(at)), at] = -torch.inf  # not itself
            best = cosines.topk(n_most, dim=1)
            self._list[left[at]], self._near[left[at]] = left[best.indices], best.values
