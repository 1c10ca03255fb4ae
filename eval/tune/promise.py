"""What answers to the same questions promise about a loss of accuracy: exact one-sided bounds, by scipy.

The loss is the share of questions that pruning loses less the share that it wins. Its upper bound is the exact
(Clopper-Pearson) upper bound of the first less the exact lower bound of the second, which divide the error between
them; both are quantiles of beta distributions. That is valid for few questions, and where nothing was lost.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from scipy.special import bdtr, betaincinv
from scipy.stats import betabinom

SHARES = (1.0, 0.8, 0.5)  # of the error, for the questions that are lost; the rest is for those that are won


@dataclass(frozen=True)
class Outcome:
    """Questions that both runs answered, those that pruning loses, and those that it wins.

    An answer that is worth something in between counts against pruning: as lost where it is worth less than the
    unpruned one, and as won only where it is worth 1 and the unpruned one 0.
    """

    n: int = 0
    lost: int = 0
    won: int = 0

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]]) -> Outcome:
        """Of what answers are worth, 0..1: unpruned and pruned."""
        both = list(pairs)
        return cls(len(both), sum(p < b for b, p in both), sum(b <= 0 and p >= 1 for b, p in both))

    @property
    def loss(self) -> float:
        """Share of the questions, -1..1; 0 without any."""
        return (self.lost - self.won) / max(self.n, 1)


def most_share(k: int, n: int, error: float) -> float:
    """The exact upper bound of a share of which k in n were seen; 1 without any error to spend."""
    if error <= 0 or not n:
        return 1.0
    return 1.0 if k >= n else float(betaincinv(k + 1, n - k, 1 - error))


def least_share(k: int, n: int, error: float) -> float:
    """The exact lower bound; 0 without any error to spend."""
    if error <= 0 or not n:
        return 0.0
    return 0.0 if k <= 0 else float(betaincinv(k, n - k + 1, error))


def most_loss(seen: Outcome, error: float, share: float = 1.0) -> float:
    """The loss that is not exceeded, but for `error` (0.05: of twenty such statements one may be wrong).

    Args:
        seen: the answers.
        error: 0..1.
        share: of the error for the lost questions, decided before these answers are seen.
    """
    return most_share(seen.lost, seen.n, error * share) - least_share(seen.won, seen.n, error * (1 - share))


def least_loss(seen: Outcome, error: float) -> float:
    """The loss that is reached at least, but for `error`, half of which each side gets."""
    return least_share(seen.lost, seen.n, error / 2) - most_share(seen.won, seen.n, error / 2)


def questions_needed(tolerance: float, error: float) -> int:
    """The fewest questions that can promise a tolerance, if none of them is lost."""
    return math.ceil(math.log(error) / math.log1p(-tolerance))


def least_tolerance(n: int, error: float) -> float:
    """The smallest loss that n questions can promise, if none of them is lost."""
    return most_share(0, n, error)


def best_share(seen: Outcome, n: int, error: float) -> float:
    """The share of the error for lost questions with which n other questions, answered alike, promise most."""
    alike = Outcome(n, *(round(k * n / max(seen.n, 1)) for k in (seen.lost, seen.won)))
    return min(SHARES, key=lambda share: most_loss(alike, error, share))


@functools.lru_cache(maxsize=4096)
def chance(seen: Outcome, n: int, tolerance: float, error: float) -> float:
    """How probably n other questions promise the tolerance, given those that were seen (Jeffreys' prior)."""
    share = best_share(seen, n, error)
    won = least_share(round(seen.won * n / max(seen.n, 1)), n, error * (1 - share))
    return float(betabinom.cdf(_most_lost(n, min(tolerance + won, 1.0), error * share), n, *_posterior(seen)))


def _posterior(seen: Outcome) -> tuple[float, float]:
    return seen.lost + 0.5, seen.n - seen.lost + 0.5


def _most_lost(n: int, limit: float, error: float) -> int:
    """The most lost questions of n whose upper bound is within a limit; -1 where even none is not."""
    k = -1
    while k + 1 < n and bdtr(k + 1, n, limit) <= error:
        k += 1
    return k


def questions_at(seen: Outcome, tolerance: float, error: float, most: int = 10**6) -> int | None:
    """About how many questions would promise the tolerance, if they are lost and won as those that were seen.

    None where that rate is not within the tolerance, or `most` are not enough.
    """
    n = max(questions_needed(tolerance, error), 1)
    while seen.loss < tolerance and n <= most:
        alike = Outcome(n, *(round(k * n / max(seen.n, 1)) for k in (seen.lost, seen.won)))
        if most_loss(alike, error, best_share(seen, n, error)) <= tolerance:
            return n
        n = math.ceil(n * 1.1)
    return None
