"""What a number of answers can tell: 95 % intervals, and tests of differences on the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

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
