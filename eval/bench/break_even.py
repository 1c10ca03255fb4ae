"""When pruning pays: paired times of rounds, their intervals, and the output length from or up to which it gains.

All rounds run every configuration in turn, so a difference is taken within a round. The median of so many paired
differences lies between two of them (order statistics, as in the sign test); what that interval does not tell from
nothing is called noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median

GAIN, NOISE, LOSS = "gain", "noise", "loss"
MIXED = "mixed"  # noise at some output lengths and a loss at others
FOREVER = math.inf
LEVEL = 0.95
FEWEST = 6  # rounds of which the outermost two cover that


@dataclass(frozen=True)
class Interval:
    """A median, the order statistics around it, and the probability that they hold the true one."""

    median: float
    low: float
    high: float
    coverage: float

    @property
    def state(self) -> str:
        """Of a ratio to the bare model: a gain below 1, a loss above, or noise, as is all of too few rounds."""
        if self.coverage < LEVEL:
            return NOISE
        return GAIN if self.high < 1 else LOSS if self.low > 1 else NOISE


def rank(n: int, level: float = LEVEL) -> tuple[int, float]:
    """How many values from either end the interval of a median begins, 1 for the outermost, and its coverage.

    With fewer than six values even the outermost cover less than 95 %.
    """
    covered = [1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(1, n // 2 + 1)]
    enough = [k for k, c in enumerate(covered, 1) if c >= level]
    best = enough[-1] if enough else 1
    return best, covered[best - 1] if covered else 0.0


def interval(values: Sequence[float]) -> Interval:
    """The median of paired ratios or differences with its 95 % interval, or the widest that there is."""
    k, coverage = rank(len(values))
    ordered = sorted(values)
    return Interval(median(ordered), ordered[k - 1], ordered[-k], coverage)


def ratio(pruned: Sequence[float], bare: Sequence[float]) -> Interval:
    """Times relative to the bare model's of the same round."""
    return interval([p / b for p, b in zip(pruned, bare, strict=True)])


@dataclass(frozen=True)
class Times:
    """Seconds of every round: to the first token, and for each behind it."""

    first: Sequence[float]
    token: Sequence[float]

    def saved_of(self, bare: Times) -> list[tuple[float, float]]:
        """Seconds saved to the first token and with each behind it, by round."""
        first = (b - p for p, b in zip(self.first, bare.first, strict=True))
        return list(zip(first, (b - p for p, b in zip(self.token, bare.token, strict=True)), strict=True))


@dataclass(frozen=True)
class Verdict:
    """From which output length to which pruning gains.

    Args:
        low: fewest tokens at which it gains; None where it never does.
        high: most tokens, `FOREVER` without end.
        beyond: what it is outside of that range, or everywhere: `NOISE`, `LOSS`, or `MIXED` where it never gains.
        again: further ranges; nine rounds or more, of which one may say otherwise, can leave a gap.
    """

    low: int | None
    high: float
    beyond: str
    again: tuple[tuple[int, float], ...] = ()

    def in_words(self, longest: int) -> str:
        """The verdict; lengths above the longest that was measured are marked."""
        found = (self.low, self.high, *(n for pair in self.again for n in pair))
        edges = [n for n in found if n is not None and n != FOREVER]
        beyond = max(edges, default=0) > longest
        return str(self) + (f" (extrapolated: the longest measured is {longest})" if beyond else "")

    def __str__(self) -> str:
        if self.low is None:
            why = {
                LOSS: "it costs time at every output length",
                MIXED: "it costs time at some output lengths, at others no difference is measurable",
            }
            return f"nothing is gained: {why.get(self.beyond, 'no difference measurable')}"
        outside = "it costs time" if self.beyond == LOSS else "no difference is measurable"
        if self.again:
            ranges = [f"from {low} " + ("on" if high == FOREVER else f"to {high:.0f}") for low, high in self.again]
            return f"gains from {self.low} to {self.high:.0f} tokens, {' and '.join(ranges)}; elsewhere, {outside}"
        if self.low == 1 and self.high == FOREVER:
            return "gains at every output length"
        if self.high == FOREVER:
            return f"gains from {self.low} tokens on; below, {outside}"
        if self.low == 1:
            return f"gains up to {self.high:.0f} token{'s' * (self.high > 1)}; beyond, {outside}"
        return f"gains from {self.low} to {self.high:.0f} tokens; outside, {outside}"


def by_output_length(pruned: Times, bare: Times) -> Verdict:
    """Break-even in output length: total time is the first token's and as many steps as tokens follow it."""
    saved = pruned.saved_of(bare)
    state = _state_of(saved)
    lengths = _lengths(saved)
    states = [state(n) for n in lengths]
    if GAIN not in states:
        some = MIXED if LOSS in states else NOISE
        return Verdict(None, FOREVER, LOSS if set(states) == {LOSS} else some)
    groups = groupby(zip(lengths, states, strict=True), lambda pair: pair[1])
    runs = [[n for n, _ in group] for s, group in groups if s == GAIN]
    (low, high), *again = ((int(run[0]), run[-1]) for run in runs)
    return Verdict(low, high, LOSS if LOSS in states else NOISE, tuple(again))


def _state_of(saved: Sequence[tuple[float, float]]) -> Callable[[float], str]:
    k, coverage = rank(len(saved))

    def state(n: float) -> str:
        """Whether the interval of what `n` tokens save lies above nothing, below, or around it."""
        if coverage < LEVEL:
            return NOISE
        each = sorted(token or first if n == FOREVER else first + (n - 1) * token for first, token in saved)
        return GAIN if each[k - 1] > 0 else LOSS if each[-k] < 0 else NOISE

    return state


def _lengths(saved: Sequence[tuple[float, float]]) -> list[float]:
    """Output lengths among which every change of state lies: around those at which a round breaks even."""
    found: set[float] = {1, FOREVER}
    for first, token in saved:
        crossing = 1 - first / token if token else 0
        if 1 <= crossing < 1e9:
            found |= {max(1, math.floor(crossing) + step) for step in (-1, 0, 1, 2)}
    return sorted(found)


def by_size(states: dict[int, str], what: str) -> str:
    """Break-even over measured sizes, of batches or pictures: where a gain was measured and where not."""
    gains = [n for n, s in states.items() if s == GAIN]
    sizes = ", ".join(map(str, states))
    others = [f"at {n} {'it costs time' if s == LOSS else 'no difference measurable'}" for n, s in states.items()]
    if not gains:
        alike = {LOSS: "it costs time", NOISE: "no difference measurable"}
        why = alike[min(states.values())] if len(set(states.values())) == 1 else ", ".join(others)
        return f"nothing is gained at any {what} measured ({sizes}): {why}"
    if len(gains) == len(states):
        return f"gains from {what} {min(gains)} on, the smallest measured ({sizes})"
    kept = [text for text, s in zip(others, states.values(), strict=True) if s != GAIN]
    above = all(states[n] == GAIN for n in states if n >= min(gains))
    span = f"gains from {what} {min(gains)} on" if above else f"gains at {what} {', '.join(map(str, gains))}"
    return f"{span} (measured: {sizes}); {', '.join(kept)}"
