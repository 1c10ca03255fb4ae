"""At which output lengths pruning gains or loses time, from times that are paired by round.

Every round runs all configurations in turn, so ratios and differences are taken within a round. The interval of their
median lies between two of the sorted values (order statistics, as in the sign test). If it includes no difference, or
if there are fewer than six rounds, the difference is called noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from statistics import median

GAIN, NOISE, LOSS = "gain", "noise", "loss"
LEVEL = 0.95
FEWEST = 6  # rounds: with five, the lowest and the highest value have a coverage of 94 %
Ranges = list[list[int | None]]


def rank(n: int) -> tuple[int, float]:
    """Where the 95 % interval of the median of n values begins, counted from either end, and its coverage.

    1 is the outermost value. With fewer than six values even the outermost cover less than 95 %.
    """
    covered = [1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(1, n // 2 + 1)]
    best = max(1, sum(c >= LEVEL for c in covered))
    return best, covered[best - 1] if covered else 0.0


def interval(values: Sequence[float]) -> list[float]:
    """Low end, median and high end of the 95 % interval, or of the widest possible one."""
    k, _ = rank(len(values))
    ordered = sorted(values)
    return [ordered[k - 1], median(ordered), ordered[-k]]


def ratio(pruned: Sequence[float], bare: Sequence[float]) -> list[float]:
    """The interval of times relative to those of the unpruned model in the same round."""
    return interval([p / b for p, b in zip(pruned, bare, strict=True)])


def state(found: Sequence[float], rounds: int, even: float = 1.0) -> str:
    """What an interval of so many rounds says: a gain if it lies below `even`, a loss if above, else noise."""
    low, _, high = found
    if rounds < FEWEST:
        return NOISE
    return GAIN if high < even else LOSS if low > even else NOISE


def by_output_length(more_s: Sequence[tuple[float, float]], longest: int) -> dict[str, Ranges]:
    """Output lengths at which pruning gains or loses time, among those that were measured.

    Args:
        more_s: by round, seconds that the pruned run takes more than the unpruned one: to the first token, and for
            each token after it (the mean, which may be 0 for a run of one token).
        longest: the longest output measured.

    Returns:
        "gains" and "losses", each as ranges [first, last] of lengths; last is None if the range is not at its end at
        the longest.
    """
    found: dict[str, Ranges] = {GAIN: [], LOSS: [], NOISE: []}
    states = (
        (state(interval([first + (n - 1) * token for first, token in more_s]), len(more_s), 0.0), n)
        for n in range(1, longest + 1)
    )
    for says, group in groupby(states, key=lambda pair: pair[0]):
        lengths = [n for _, n in group]
        found[says].append([lengths[0], None if lengths[-1] == longest else lengths[-1]])
    return {"gains": found[GAIN], "losses": found[LOSS]}


def length_of_saving(pruned: tuple[float, float], bare: tuple[float, float], share: float) -> int | None:
    """The output length from which less than a share of the time is saved.

    Args:
        pruned: time to the first token, and for each token after it.
        bare: the same of the unpruned model.
        share: such as 0.05.

    Returns:
        1 where even the first token saves less; None where every length saves it.
    """
    first, token = ((1 - share) * b - p for p, b in zip(pruned, bare, strict=True))
    if first <= 0:
        return 1
    return None if token >= 0 else math.floor(first / -token) + 2
