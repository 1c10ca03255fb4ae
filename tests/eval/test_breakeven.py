"""Break-even on times written by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tokprune.eval.bench.break_even import GAIN, LOSS, NOISE, by_output_length, interval, rank, ratio, state

ROUNDS = 6
JITTER = (0.98, 0.99, 1.0, 1.01, 1.02, 1.03)
FLAT = [1.0] * ROUNDS, [0.1] * ROUNDS
Times = tuple[Sequence[float], Sequence[float]]


def times(first: float, token: float) -> Times:
    """Six rounds, slow and fast ones; a slow round is slow for all."""
    return [first * j for j in JITTER], [token * j for j in JITTER]


def lengths(pruned: Times, bare: Times, longest: int = 400) -> tuple[list, list]:
    """Ranges of gains and of losses."""
    more = [[p - b for p, b in zip(*each, strict=True)] for each in zip(pruned, bare, strict=True)]
    found = by_output_length(list(zip(*more, strict=True)), longest)
    return found["gains"], found["losses"]


def states(pruned: Times, bare: Times, n: int) -> str:
    """Of the totals of n tokens."""
    totals = [[f + (n - 1) * t for f, t in zip(*each, strict=True)] for each in (pruned, bare)]
    return state(ratio(*totals), len(pruned[0]))


@pytest.mark.parametrize(
    ("first", "token", "gains", "losses"),
    [
        (0.5, 0.09, [[1, None]], []),
        (0.5, 0.10, [[1, None]], []),  # what is saved is saved once
        # Saves 0.495 s, loses 0.01 s a token: even at 1 + 49.5 tokens.
        (0.505, 0.11, [[1, 50]], [[51, None]]),
        # Loses 0.505 s, saves 0.01 s a token: even at 51.5.
        (1.505, 0.09, [[52, None]], [[1, 51]]),
        (1.5, 0.11, [], [[1, None]]),
        (1.5, 0.10, [], [[1, None]]),
        (1.0, 0.10, [], []),
    ],
)
def test_output_length_at_which_pruning_breaks_even(first, token, gains, losses):
    assert lengths(times(first, token), times(1.0, 0.1)) == (gains, losses)


def test_nothing_is_said_beyond_the_longest_measured():
    """The gain ends at 50 tokens, of which 32 were measured."""
    for longest, last in ((32, None), (50, None), (51, 50)):
        gains, _ = lengths(times(0.505, 0.11), times(1.0, 0.1), longest)
        assert gains == [[1, last]]
    assert lengths(times(1.505, 0.09), times(1.0, 0.1), 32) == ([], [[1, None]])
    assert lengths(times(0.5, 0.0), times(1.0, 0.0), 1) == ([[1, None]], [])


def test_differences_inside_the_noise_are_called_noise():
    noisy = [0.9, 1.1, 0.95, 1.05, 0.9, 1.1], [0.09, 0.11, 0.1, 0.1, 0.11, 0.09]
    assert lengths(noisy, FLAT) == ([], [])
    # One round of six against it is enough: all six are needed for 95 %.
    one_slow = [0.9] * 5 + [1.1], [0.1] * ROUNDS
    assert lengths(one_slow, FLAT) == ([], [])
    assert state(ratio(one_slow[0], FLAT[0]), ROUNDS) == NOISE


def test_a_gain_at_once_that_noise_eats_up_later():
    pruned = [0.505] * ROUNDS, [0.09, 0.11, 0.09, 0.11, 0.09, 0.11]
    assert lengths(pruned, FLAT) == ([[1, 50]], [])


def test_a_noisy_start_and_a_gain_later():
    pruned = [0.9, 1.105, 0.9, 1.1, 0.9, 1.1], [0.09] * ROUNDS
    assert lengths(pruned, FLAT) == ([[12, None]], [])


@pytest.mark.parametrize("first", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("token", [0.08, 0.1, 0.12])
def test_ranges_equal_the_interval_of_totals_at_every_length(first, token):
    pruned = [first * j for j in reversed(JITTER)], [token * j for j in JITTER]
    bare = times(1.0, 0.1)
    for ranges, expected in zip(lengths(pruned, bare), (GAIN, LOSS), strict=True):
        for n in range(1, 400):
            inside = any(low <= n <= (high or n) for low, high in ranges)
            assert inside == (states(pruned, bare, n) == expected), n


def test_interval_of_a_median_by_hand():
    assert rank(5) == (1, 0.9375)  # 1 - 2 / 32
    assert rank(6) == (1, 0.96875)
    assert rank(9)[0] == 2  # 1 - 2 (1 + 9) / 512 = 0.961
    assert rank(9)[1] == pytest.approx(0.9609, abs=1e-4)
    assert rank(1) == (1, 0.0)
    assert interval([5, 1, 2, 9, 3, 4, 8, 6, 7]) == [2, 5, 8]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_few_rounds_say_nothing(n):
    """Of two that chance alone makes, every second pair agrees."""
    assert state(ratio([0.5] * n, [1.0] * n), n) == state(ratio([1.5] * n, [1.0] * n), n) == NOISE
    assert lengths(([0.5] * n, [0.05] * n), ([1.0] * n, [0.1] * n)) == ([], [])
    assert state(ratio([0.5] * 6, [1.0] * 6), 6) == GAIN


@pytest.mark.parametrize(
    ("first", "token", "losses"),
    [([1.5] * 6, [0.09, 0.11] * 3, [[1, 50]]), ([0.9, 1.1] * 3, [0.11] * 6, [[12, None]])],
)
def test_a_loss_at_some_lengths_is_not_hidden_by_noise_at_others(first, token, losses):
    assert lengths((first, token), FLAT) == ([], losses)


def test_gains_with_a_gap():
    """One of nine rounds may say otherwise: another one does for short outputs than for long ones."""
    bare = [1.0] * 9, [0.1] * 9
    pruned = [0.5] * 7 + [0.925, 1.375], [0.09] * 7 + [0.11, 0.09]
    assert lengths(pruned, bare) == ([[1, 8], [39, None]], [])
    for n in range(1, 100):
        assert (states(pruned, bare, n) == GAIN) == (n <= 8 or n >= 39), n
