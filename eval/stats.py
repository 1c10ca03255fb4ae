"""What a number of answers can tell: 95 % intervals, and tests of differences on the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, mean, pstdev, stdev

Z95 = NormalDist().inv_cdf(0.975)


def wilson(right: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, Z95 * Z95
    middle, half = p + z2 / (2 * n), Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)


def percentile(ordered: Sequence[float], q: float) -> float:
    """The nearest-rank percentile of an ascending list."""
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else math.nan


@dataclass(frozen=True)
class Paired:
    """How much more of the same questions one configuration answers than another.

    Args:
        n: questions.
        only_first, only_second: questions that one alone answers.
    """

    n: int
    only_first: int
    only_second: int

    @property
    def difference(self) -> float:
        """Share of the questions, -1..1."""
        return (self.only_first - self.only_second) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference: Bonett and Price (2012), one answer added to both disagreements."""
        more, less = self.only_first + 1, self.only_second + 1
        middle = (more - less) / (self.n + 2)
        half = Z95 * math.sqrt((more + less) - (more - less) ** 2 / (self.n + 2)) / (self.n + 2)
        return max(-1.0, middle - half), min(1.0, middle + half)

    @property
    def p_value(self) -> float:
        """McNemar's exact test (two-sided): how often chance alone splits the disagreements so unevenly."""
        n, least = self.only_first + self.only_second, min(self.only_first, self.only_second)
        return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Of answers to the same questions in the same order, right or wrong."""
    both = list(zip(first, second, strict=True))
    return Paired(len(both), sum(a and not b for a, b in both), sum(b and not a for a, b in both))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Low and high end of the 95 % interval of a mean of values in 0..1, and its standard error.

    Wilson's where every value is 0 or 1. Else the normal interval, mean and standard deviation over the questions, cut
    off at 0 and 1; where all values are alike, which says nothing of their spread, Wilson's again: no values in 0..1
    with that mean spread more than zeros and ones.
    """
    n, middle = len(values), sum(values) / len(values)
    is_share = set(values) <= {0, 1}
    error = math.sqrt(middle * (1 - middle) / n) if is_share or n < 2 else stdev(values) / math.sqrt(n)
    if is_share or error == 0 or n < 2:
        return *wilson(sum(values), n), error
    return max(0.0, middle - Z95 * error), min(1.0, middle + Z95 * error), error


@dataclass(frozen=True)
class Difference:
    """By how much one mean is above another on the same questions, with its 95 % interval.

    `p_value` is of McNemar's exact test; None unless all answers are right or wrong.
    """

    value: float
    low: float
    high: float
    p_value: float | None = None


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Of values in 0..1 of the same questions in the same order.

    The interval is the normal one over the differences, with a gain of 1 and a loss of 1 added to them. For zeros and
    ones that is Bonett and Price's (`Paired.interval`); it has a width also where all differences are alike.
    """
    both = list(zip(first, second, strict=True))
    if {value for pair in both for value in pair} <= {0, 1}:
        pair = paired([bool(a) for a, _ in both], [bool(b) for _, b in both])
        return Difference(pair.difference, *pair.interval, pair.p_value)
    apart = [a - b for a, b in both]
    more = [*apart, 1.0, -1.0]
    half = Z95 * pstdev(more) / math.sqrt(len(more))
    return Difference(mean(apart), max(-1.0, mean(more) - half), min(1.0, mean(more) + half))


def sign(low: float, high: float, n: int = 1) -> int:
    """1 or -1 where a difference is above or below zero, 0 where it may be noise.

    Args:
        low: end of its 95 % interval.
        high: the other end.
        n: how many differences are looked at. The interval is widened so that with 95 % confidence none of them is
            mistaken (Bonferroni, normal).
    """
    middle, widened = (low + high) / 2, NormalDist().inv_cdf(1 - 0.025 / n) / Z95
    half = widened * (high - low) / 2
    return (middle > half) - (middle < -half)
