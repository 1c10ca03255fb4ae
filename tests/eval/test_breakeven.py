"""Break-even on times written by hand."""

from __future__ import annotations

import math

import pytest
from tokprune.eval.bench.break_even import (
    FOREVER,
    GAIN,
    LOSS,
    MIXED,
    NOISE,
    Times,
    by_output_length,
    by_size,
    interval,
    rank,
    ratio,
)

ROUNDS = 6
JITTER = (0.98, 0.99, 1.0, 1.01, 1.02, 1.03)


def times(first: float, token: float) -> Times:
    """Six rounds, slow and fast ones; a slow round is slow for all."""
    return Times([first * j for j in JITTER], [token * j for j in JITTER])


@pytest.mark.parametrize(
    ("first", "token", "expected", "says"),
    [
        (0.5, 0.09, (1, FOREVER), "gains at every output length"),
        (0.5, 0.10, (1, FOREVER), "gains at every output length"),  # what is saved is saved once
        # Saves 0.495 s, loses 0.01 s a token: even at 1 + 49.5 tokens.
        (0.505, 0.11, (1, 50), "gains up to 50 tokens; beyond, it costs time"),
        # Loses 0.505 s, saves 0.01 s a token: even at 51.5.
        (1.505, 0.09, (52, FOREVER), "gains from 52 tokens on; below, it costs time"),
        (1.5, 0.11, None, "nothing is gained: it costs time at every output length"),
        (1.5, 0.10, None, "nothing is gained: it costs time at every output length"),
        (1.0, 0.10, None, "nothing is gained: no difference measurable"),
    ],
)
def test_output_length_at_which_pruning_breaks_even(first, token, expected, says):
    verdict = by_output_length(times(first, token), times(1.0, 0.1))
    assert (None if verdict.low is None else (verdict.low, verdict.high)) == expected
    assert str(verdict) == says


def test_differences_inside_the_noise_are_called_noise():
    bare = Times([1.0] * ROUNDS, [0.1] * ROUNDS)
    noisy = Times([0.9, 1.1, 0.95, 1.05, 0.9, 1.1], [0.09, 0.11, 0.1, 0.1, 0.11, 0.09])
    assert str(by_output_length(noisy, bare)) == "nothing is gained: no difference measurable"
    # One round of six against it is enough: all six are needed for 95 %.
    one_slow = Times([0.9] * 5 + [1.1], [0.1] * ROUNDS)
    assert by_output_length(one_slow, bare).low is None
    assert ratio(one_slow.first, bare.first).state == NOISE


def test_a_gain_at_once_that_noise_eats_up_later():
    bare = Times([1.0] * ROUNDS, [0.1] * ROUNDS)
    pruned = Times([0.505] * ROUNDS, [0.09, 0.11, 0.09, 0.11, 0.09, 0.11])
    verdict = by_output_length(pruned, bare)
    assert (verdict.low, verdict.high, verdict.beyond) == (1, 50, NOISE)
    assert str(verdict) == "gains up to 50 tokens; beyond, no difference is measurable"


def test_a_noisy_start_and_a_gain_later():
    bare = Times([1.0] * ROUNDS, [0.1] * ROUNDS)
    pruned = Times([0.9, 1.105, 0.9, 1.1, 0.9, 1.1], [0.09] * ROUNDS)
    verdict = by_output_length(pruned, bare)
    assert (verdict.low, verdict.high, verdict.beyond) == (12, FOREVER, NOISE)


@pytest.mark.parametrize("first", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("token", [0.08, 0.1, 0.12])
def test_verdict_equals_the_interval_of_totals_at_every_length(first, token):
    """The range is found at its edges; here at every length, from the ratios of totals."""
    pruned = Times([first * j for j in reversed(JITTER)], [token * j for j in JITTER])
    bare = times(1.0, 0.1)
    verdict = by_output_length(pruned, bare)
    low = math.inf if verdict.low is None else verdict.low
    for n in range(1, 400):
        totals = [[f + (n - 1) * t for f, t in zip(x.first, x.token, strict=True)] for x in (pruned, bare)]
        assert (ratio(*totals).state == GAIN) == (low <= n <= verdict.high), n


def test_interval_of_a_median_by_hand():
    assert rank(5) == (1, 0.9375)  # 1 - 2 / 32
    assert rank(6) == (1, 0.96875)
    assert rank(9)[0] == 2  # 1 - 2 (1 + 9) / 512 = 0.961
    assert rank(9)[1] == pytest.approx(0.9609, abs=1e-4)
    assert rank(1) == (1, 0.0)
    found = interval([5, 1, 2, 9, 3, 4, 8, 6, 7])
    assert (found.median, found.low, found.high) == (5, 2, 8)


def test_lengths_above_the_longest_measured_are_marked():
    verdict = by_output_length(times(1.505, 0.09), times(1.0, 0.1))
    assert verdict.in_words(52) == str(verdict)
    assert verdict.in_words(51) == f"{verdict} (extrapolated: the longest measured is 51)"
    everywhere = by_output_length(times(0.5, 0.09), times(1.0, 0.1))
    assert everywhere.in_words(2) == "gains at every output length"


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_few_rounds_say_nothing(n):
    """Of two that chance alone makes, every second pair agrees."""
    assert interval([0.5] * n).coverage == 1 - 2 / 2**n
    assert ratio([0.5] * n, [1.0] * n).state == ratio([1.5] * n, [1.0] * n).state == NOISE
    verdict = by_output_length(Times([0.5] * n, [0.05] * n), Times([1.0] * n, [0.1] * n))
    assert (verdict.low, verdict.beyond) == (None, NOISE)
    assert ratio([0.5] * 6, [1.0] * 6).state == GAIN


@pytest.mark.parametrize(("first", "token"), [([1.5] * 6, [0.09, 0.11] * 3), ([0.9, 1.1] * 3, [0.11] * 6)])
def test_a_loss_at_some_lengths_is_not_hidden_by_noise_at_others(first, token):
    verdict = by_output_length(Times(first, token), Times([1.0] * ROUNDS, [0.1] * ROUNDS))
    assert (verdict.low, verdict.beyond) == (None, MIXED)
    assert str(verdict).endswith("it costs time at some output lengths, at others no difference is measurable")


def test_gains_with_a_gap():
    """One of nine rounds may say otherwise: another one does for short outputs than for long ones."""
    bare = Times([1.0] * 9, [0.1] * 9)
    pruned = Times([0.5] * 7 + [0.925, 1.375], [0.09] * 7 + [0.11, 0.09])
    verdict = by_output_length(pruned, bare)
    assert (verdict.low, verdict.high, verdict.again) == (1, 8, ((39, FOREVER),))
    assert str(verdict) == "gains from 1 to 8 tokens, from 39 on; elsewhere, no difference is measurable"
    assert "extrapolated" in verdict.in_words(38)
    assert "extrapolated" not in verdict.in_words(39)
    for n in range(1, 100):
        totals = [[f + (n - 1) * t for f, t in zip(x.first, x.token, strict=True)] for x in (pruned, bare)]
        assert (ratio(*totals).state == GAIN) == (n <= 8 or n >= 39), n


@pytest.mark.parametrize(
    ("states", "says"),
    [
        ({1: GAIN, 8: GAIN}, "gains from batch size 1 on, the smallest measured (1, 8)"),
        ({1: NOISE, 8: GAIN}, "gains from batch size 8 on (measured: 1, 8); at 1 no difference measurable"),
        ({1: LOSS, 2: GAIN, 8: NOISE}, "gains at batch size 2 (measured: 1, 2, 8); at 1 it costs time, at 8 no diff"),
        ({1: LOSS, 8: LOSS}, "nothing is gained at any batch size measured (1, 8): it costs time"),
        ({1: NOISE, 8: NOISE}, "nothing is gained at any batch size measured (1, 8): no difference measurable"),
        ({1: LOSS, 8: NOISE}, "nothing is gained at any batch size measured (1, 8): at 1 it costs time, at 8 no diff"),
    ],
)
def test_sizes_at_which_pruning_gains(states, says):
    assert by_size(states, "batch size").startswith(says)
