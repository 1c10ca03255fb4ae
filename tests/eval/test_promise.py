"""What answers promise about a loss: exact bounds, the race, and how often a promise is false."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokprune.eval.tune.race as racing
from scipy.stats import binom, binomtest
from tokprune.eval.tune import simulate
from tokprune.eval.tune.promise import (
    Outcome,
    best_share,
    chance,
    least_loss,
    least_share,
    least_tolerance,
    most_loss,
    most_share,
    questions_at,
    questions_needed,
)
from tokprune.eval.tune.race import Entry, Rule, fewest, parts_of, race, smallest

ROWS = Path(racing.__file__).parents[1] / "results" / "promises.jsonl"


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 299), (1, 1), (3, 50), (400, 400)])
def test_bounds_of_a_share_are_the_exact_ones_of_scipy(k, n):
    low = binomtest(k, n, alternative="greater").proportion_ci(0.95, "exact").low
    high = binomtest(k, n, alternative="less").proportion_ci(0.95, "exact").high
    assert (least_share(k, n, 0.05), most_share(k, n, 0.05)) == pytest.approx((low, high), abs=1e-9)


def test_a_loss_is_what_is_lost_less_what_is_won():
    seen = Outcome.of([(1, 1), (1, 0), (0, 1), (1, 0), (0, 0)])
    assert (seen, seen.loss) == (Outcome(5, 2, 1), 0.2)
    # Answers worth something in between never make pruning look better than it is.
    assert Outcome.of([(0.6, 0.3), (0.3, 0.6), (0, 0.9), (0, 1)]) == Outcome(4, 1, 1)
    assert least_loss(seen, 0.05) < seen.loss < most_loss(seen, 0.05, 0.8)
    assert most_loss(Outcome(400, 12, 12), 0.05, 0.5) < most_loss(Outcome(400, 12, 12), 0.05)


def test_how_many_questions_a_tolerance_needs():
    assert questions_needed(0.01, 0.05) == 299
    assert least_tolerance(299, 0.05) <= 0.01 < least_tolerance(298, 0.05)
    n = fewest(Rule(0.01))
    assert parts_of(n).test == 299
    assert smallest(n, 0.05) <= 0.01 < smallest(n - 1, 0.05)
    assert questions_at(Outcome(100, 2, 0), 0.01, 0.05) is None
    more = questions_at(Outcome(1000, 5, 0), 0.01, 0.05)
    assert more is not None
    assert 299 < more < 3000


def test_the_chance_is_that_of_the_test():
    """Over draws from the prior's posterior, how often the test that is announced succeeds."""
    seen, n, rule = Outcome(40, 1, 0), 120, Rule(0.1)
    draw, share = random.Random(0), best_share(seen, 120, 0.05)
    wins = 0
    for _ in range(2000):
        p = draw.betavariate(1.5, 39.5)
        lost = sum(draw.random() < p for _ in range(n))
        wins += racing.holds(Outcome(n, lost, 0), rule, share)
    assert chance(seen, n, 0.1, 0.05) == pytest.approx(wins / 2000, abs=0.03)


@pytest.mark.parametrize(("tolerance", "n"), [(0.01, 300), (0.02, 200), (0.05, 120), (0.1, 50)])
@pytest.mark.parametrize("share", [1.0, 0.8, 0.5])
def test_a_configuration_just_beyond_passes_no_more_often_than_stated(tolerance, n, share):
    passes = [k for k in range(n + 1) if racing.holds(Outcome(n, k, 0), Rule(tolerance), share)]
    assert sum(binom.pmf(k, n, tolerance + 1e-6) for k in passes) <= 0.05


# ---- the race


def raced(rates: dict[str, tuple[float, float]], rule: Rule, n: int = 1000):
    """A race of configurations by name: (cost, share lost)."""
    draw, parts = random.Random(1), parts_of(n)
    lost = {name: [draw.random() < p for _ in range(n)] for name, (_, p) in rates.items()}
    asked: list[list[str]] = []

    def ask(look: int, names: list[str]) -> dict[str, Entry]:
        asked.append(names)
        end = sum(parts.looks[: look + 1])
        return {name: Entry(Outcome(end, sum(lost[name][:end])), rates[name][0]) for name in names}

    return race(list(rates), parts, rule, ask), asked


def test_the_cheapest_within_the_tolerance_wins_and_few_are_asked():
    rates = {f"bad{i}": (0.2, 0.3) for i in range(8)} | {f"good{i}": (0.5 + 0.05 * i, 0.0) for i in range(8)}
    found, asked = raced(rates, Rule(0.05))
    assert found.winner == "good0"
    assert found.chance > 0.9
    assert [len(names) for names in asked] == [16, 8, 4]
    assert found.left == asked


def test_nothing_wins_that_is_surely_beyond_or_saves_nothing():
    assert raced({"a": (0.2, 0.5), "b": (0.3, 0.4)}, Rule(0.05))[0].winner is None
    assert raced({"a": (1.1, 0.0)}, Rule(0.05))[0].winner is None


# ---- promises


def test_committed_rows_keep_to_the_stated_level():
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    assert {(r["tasks"], r["tolerance"]) for r in rows} == {
        (k, t) for k in simulate.WORLDS for t in simulate.TOLERANCES
    }
    for row in rows:
        assert row["n_tasks"] == 200
        assert row["false_promises"] <= (1 - row["confidence"]) * row["n_tasks"]
        assert row["questions_of_grid_most"] <= 0.25
        assert row["tasks"] == "mixed" or row["best_seen_false"] > 100  # reading a table is wrong there


def test_the_simulation_gives_the_committed_figures():
    again = simulate.simulated("just beyond", 0.05, 20, 0.05, 0)
    assert again["false_promises"] <= 1
    assert simulate.simulated("just beyond", 0.05, 20, 0.05, 0) == again
