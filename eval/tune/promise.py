"""What answers to the same questions promise about a loss of accuracy: an exact paired test, by scipy.

The loss is the share of questions that pruning loses less the share that it wins. `p_value` is that of the
unconditional exact test of noninferiority for paired answers (Hsueh, Liu and Chen 2001, Biometrics 57(2):478-483) with
the score of Tango (1998, Statistics in Medicine 17(8):891-908): the probability of outcomes whose score is as good or
better, at the share of won questions where it is largest, since that share is not known. It is valid for few questions,
and where nothing was lost.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, betaincinv, gammaln, xlog1py, xlogy

N_SHARES = 64  # of won questions that are tried, and as many again around the worst
N_RATES = 20  # loss rates that stand for what is not known
STEPS = 24  # of a bisection
NEGLIGIBLE = 1e-15  # as a probability
MANY = 1000  # questions, from which on the score is as good as normal

Floats = NDArray[np.float64]


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


# ---- the test


def holds(seen: Outcome, tolerance: float, error: float) -> bool:
    """Whether these answers promise a loss within the tolerance; wrong with a probability of at most `error`."""
    return p_value(seen, tolerance) <= error


@functools.lru_cache(maxsize=4096)
def p_value(seen: Outcome, tolerance: float) -> float:
    """How probably answers this good or better come from a loss as large as the tolerance or larger."""
    if not seen.n:
        return 1.0
    score = float(_score(np.float64(seen.lost), np.float64(seen.won), seen.n, tolerance))
    return _size(_most_lost(score, seen.n, tolerance), seen.n, tolerance)


@functools.lru_cache(maxsize=4096)
def most_loss(seen: Outcome, error: float) -> float:
    """The loss that is not exceeded, but for `error` (0.05: of twenty such statements one may be wrong)."""
    low, high = max(seen.loss, 0.0), 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(seen, middle, error) else (middle, high)
    return high


def _score(lost: Floats, won: Floats, n: int, tolerance: float) -> Floats:
    """Tango's: by how many standard errors the loss is over the tolerance, with the shares that are likeliest there."""
    b = (2 * n - lost + won) * tolerance - lost - won
    share = (np.sqrt(b * b + 8 * n * won * tolerance * (1 - tolerance)) - b) / (4 * n)
    return (lost - won - n * tolerance) / np.sqrt(n * (2 * share + tolerance * (1 - tolerance)))


def _most_lost(score: float, n: int, tolerance: float) -> NDArray[np.int64]:
    """(n + 1,): for every number of won questions the most lost ones whose score is not above this one, or -1."""
    won = np.arange(n + 1.0)
    low, high = np.full(n + 1, -1.0), n - won
    while (low < high).any():
        middle = np.ceil((low + high) / 2)
        is_in = _score(middle, won, n, tolerance) <= score + 1e-9
        low, high = np.where(is_in, middle, low), np.where(is_in, high, middle - 1)
    low = np.where(low >= n - won, n, low)  # fewer are lost where more are won, but never for that reason alone
    return np.minimum(np.minimum.accumulate(low[::-1])[::-1], n - won).astype(np.int64)


def _size(most: NDArray[np.int64], n: int, tolerance: float, rounds: int = 2) -> float:
    """How probable these outcomes are at most where the loss is the tolerance."""
    ends, sizes = (0.0, 1.0), np.zeros(1)
    for _ in range(rounds):
        at = np.linspace(*ends, N_SHARES)
        won = at**2 * (1 - tolerance) / 2
        sizes = _probability(most, n, won, won + tolerance)
        worst = int(sizes.argmax())
        ends = at[max(worst - 1, 0)], at[min(worst + 1, N_SHARES - 1)]
    return float(sizes.max())


def _probability(most: NDArray[np.int64], n: int, won: Floats, lost: Floats) -> Floats:
    """Of outcomes with at most so many lost questions (by won ones), for shares of won and lost ones."""
    k = np.arange(n + 1)
    ways = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    likely = np.exp(ways + xlogy(k, won[:, None]) + xlog1py(n - k, -won[:, None]))
    share, at = np.nonzero((likely > NEGLIGIBLE) & (most >= 0))
    among_others = np.minimum(lost / np.maximum(1 - won, NEGLIGIBLE), 1)[share]
    return np.bincount(share, likely[share, at] * bdtr(most[at], n - at, among_others), len(won))


# ---- how many questions


@functools.lru_cache(maxsize=256)
def questions_needed(tolerance: float, error: float) -> int:
    """The fewest questions that can promise a tolerance, if none of them is lost and none won."""
    n = math.ceil(math.log(error) / math.log1p(-tolerance))
    while not holds(Outcome(n), tolerance, error):
        n += 1
    return n


def least_tolerance(n: int, error: float) -> float:
    """The smallest loss that n questions can promise, if none of them is lost and none won."""
    return most_loss(Outcome(n), error)


def questions_at(seen: Outcome, tolerance: float, error: float, most: int = 10**6) -> int | None:
    """About how many questions would promise the tolerance, if they are lost and won as those that were seen.

    None where that rate is not within the tolerance, or `most` are not enough.
    """
    if seen.loss >= tolerance or not seen.n:
        return None
    score = float(_score(np.float64(seen.lost), np.float64(seen.won), seen.n, tolerance))
    n = math.ceil(seen.n * (NormalDist().inv_cdf(error) / score) ** 2)  # the score grows with the root of n
    n = max(n, questions_needed(tolerance, error))
    return n if n <= most else None


# ---- before the test


def most_share(k: int, n: int, error: float) -> float:
    """The exact (Clopper-Pearson) upper bound of a share of which k in n were seen."""
    return 1.0 if k >= n else float(betaincinv(k + 1, n - k, 1 - error))


def least_share(k: int, n: int, error: float) -> float:
    """The exact lower bound."""
    return 0.0 if k <= 0 else float(betaincinv(k, n - k + 1, error))


def least_loss(seen: Outcome, error: float) -> float:
    """The loss that is reached at least, but for `error`, half of which each side gets."""
    return least_share(seen.lost, seen.n, error / 2) - most_share(seen.won, seen.n, error / 2)


@functools.lru_cache(maxsize=512)
def passing(n: int, tolerance: float, error: float) -> tuple[int, ...]:
    """For every number of won questions of n the most lost ones with which `holds`, or -1; nearly."""
    normal = NormalDist().inv_cdf(error)
    if n > MANY:
        return tuple(map(int, _most_lost(normal, n, tolerance)))
    low, high = normal - 1, normal + 0.2
    for _ in range(STEPS // 3):
        middle = (low + high) / 2
        size = _size(_most_lost(middle, n, tolerance), n, tolerance, rounds=1)
        low, high = (middle, high) if size <= error else (low, middle)
    return tuple(map(int, _most_lost(low, n, tolerance)))


@functools.lru_cache(maxsize=16384)
def chance(lost: int, won: int, of: int, n: int, tolerance: float, error: float) -> float:
    """How probably n other questions promise the tolerance, where `lost` and `won` were seen (with Jeffreys' prior)."""
    rates = betaincinv(lost + 0.5, max(of - lost, 0) + 0.5, (np.arange(N_RATES) + 0.5) / N_RATES)
    share = np.full(N_RATES, min((won + 0.25) / (of + 1), 0.5))
    return float(_probability(np.array(passing(n, tolerance, error)), n, share, rates).mean())
