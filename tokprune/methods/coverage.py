"""Greedy coverage: one token after the other, each what adds most to the best that every row has got so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..core import ops
from ..core.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

HELD = 4096  # tokens whose cosines are always held
# Bytes of the cosines of more tokens: 1 GiB, of 16,384. A greedy choice reads some 20 N rows of them, so rows made when
# they are needed cost some 20 products of all pairs in place of half a one. Beyond, no N x N matrix is held.
MOST = 2**30
BLOCK = 1024  # rows of a held matrix at a time
CHUNK = 256  # rows at a time


class Cosines:
    """Cosines of every two tokens of (G, N, D), float32."""

    def __init__(self, x: Tensor):
        self._unit = F.normalize(x.float(), dim=-1)
        self._all: Tensor | None = None
        if x.shape[1] <= HELD:
            self._all = self._unit @ self._unit.transpose(1, 2)
        elif is_held(x.shape[1], len(x)):
            self._all = _all_pairs(self._unit)

    def rows(self, index: Tensor) -> Tensor:
        """(G, c, N) of the tokens at (G, c)."""
        if self._all is not None and len(index) == 1:
            return self._all[0].index_select(0, index[0])[None]  # much faster than to gather
        if self._all is not None:
            return ops.take(self._all, index)
        return ops.take(self._unit, index) @ self._unit.transpose(1, 2)

    def nearest(self, first: Tensor, second: Tensor) -> Tensor:
        """(G, a): the largest cosine of every token at (G, a) to those at (G, b)."""
        if self._all is not None:
            columns = second[:, None].expand(-1, first.shape[1], -1)
            return ops.take(self._all, first).gather(2, columns).amax(2)
        others = ops.take(self._unit, second).transpose(1, 2)
        return torch.cat([(ops.take(self._unit, part) @ others).amax(2) for part in first.split(CHUNK, 1)], 1)


def _all_pairs(unit: Tensor) -> Tensor:
    """(G, N, N), the products of all rows of (G, N, D), those of a pair once."""
    found = unit.new_empty(*unit.shape[:2], unit.shape[1])
    for first in range(0, unit.shape[1], BLOCK):
        rows = unit[:, first : first + BLOCK] @ unit[:, first:].transpose(1, 2)
        found[:, first : first + BLOCK, first:] = rows
        found[:, first:, first : first + BLOCK] = rows.transpose(1, 2)
    return found


def is_held(n: int, n_images: int = 1) -> bool:
    """Whether the cosines of n tokens are held."""
    return n <= HELD or 4 * n_images * n * n <= MOST


def n_updated(n_rows: int, step: int) -> int:
    """Rows that are brought up to date after choice number `step`, 1, 2, ..."""
    return min(n_rows, max(32, 2 * n_rows // step))


def n_cosine_rows(n: int, n_keep: int) -> int:
    """Rows of cosines that `greedy` makes of n tokens."""
    if n <= HELD:
        return n
    if is_held(n):
        return (n + min(n, BLOCK)) // 2  # those of a pair once
    return n + sum(1 + n_updated(n, step) for step in range(1, n_keep))


def greedy(
    rows: Callable[[Tensor], Tensor],
    column: Callable[[Tensor], Tensor],
    allowed: Tensor,
    n_keep: int,
    rank: Callable[[Tensor], Tensor],
    others: Tensor | None = None,
) -> Tensor:
    """Indices in the order they are chosen, (G, n_keep).

    What a candidate adds is the sum over all rows of what it gives beyond the row's best so far. A choice changes the
    best of few rows, about N / k after k choices, and the sums are corrected for these alone: `n_updated` rows, those
    that changed most. Where more have changed, the rest waits for the next choice.

    Args:
        rows: (G, c) tokens to what every candidate gives them, (G, c, N).
        column: (G,) candidates to what each gives every token, (G, N).
        allowed: (G, N) bool, the candidates; others come last.
        n_keep: 1..N.
        rank: what candidates add, (G, N) float64, to what decides, from 0.
        others: (G, T, N), what every candidate gives to rows that are no tokens; all of these are always up to date.
    """
    n_images, n = allowed.shape
    places = torch.arange(n, device=allowed.device).expand(n_images, n)
    best = torch.zeros(n_images, n, device=allowed.device)
    counted = best  # the best that the sums know of
    adds = _lost(rows, places, best, torch.full_like(best, torch.inf))
    others = adds.new_zeros(n_images, 0, n) if others is None else others
    best_of_others = others.new_zeros(others.shape[:2])
    free, chosen = torch.ones_like(allowed), []
    for step in range(1, n_keep + 1):
        more = (others - best_of_others[..., None]).clamp(min=0).double().sum(1)
        score = rank(adds + more).masked_fill(~allowed, -1.0).masked_fill(~free, -torch.inf)
        newest = ops.first_highest(score)[:, None]
        chosen.append(newest)
        if step == n_keep:
            break
        free = free.scatter(1, newest, False)
        best = best.maximum(column(newest[:, 0]))
        best_of_others = best_of_others.maximum(others.gather(2, newest[:, None].expand_as(others[..., :1]))[..., 0])
        changed = (best - counted).topk(n_updated(n, step), dim=1).indices
        adds = adds - _lost(rows, changed, counted.gather(1, changed), best.gather(1, changed))
        counted = counted.scatter(1, changed, best.gather(1, changed))
    return torch.cat(chosen, 1)


def _lost(rows: Callable[[Tensor], Tensor], index: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(G, N) float64: what candidates give to the rows at (G, c) between two bounds (G, c)."""
    total = torch.zeros_like(low[:, :1], dtype=torch.float64)
    for at, least, most in zip(*(x.split(CHUNK, 1) for x in (index, low, high)), strict=True):
        given = torch.minimum(rows(at).maximum(least[..., None]), most[..., None]) - least[..., None]
        total = total + given.double().sum(1)  # three times as fast on a CPU as a sum in another type
    return total
