"""Intervals and tests by hand: proportions, and differences on the same questions."""

from __future__ import annotations

import pytest
from tokprune.eval.run import rows
from tokprune.eval.stats import Paired, paired, percentile, wilson


def test_wilson_interval_by_hand():
    low, high = wilson(8, 10)  # from the formula, worked with z = 1.959964
    assert low == pytest.approx(0.490162, abs=1e-6)
    assert high == pytest.approx(0.943318, abs=1e-6)
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)


def test_paired_interval_is_the_published_one():
    """Bonett and Price 2012, by hand: (b - c) / (n + 2) with one added to both; half of one is Agresti and Min's."""
    middle, half = 8 / 102, 1.959964 * ((18 - 64 / 102) ** 0.5) / 102
    assert Paired(100, 12, 4).interval == pytest.approx((middle - half, middle + half), abs=1e-6)
    # Bentur et al. 2009, the example of Fagerland, Lydersen and Laake's comparison (2014): 1 and 7 of 21.
    assert Paired(21, 1, 7).interval == pytest.approx((-0.508359, -0.013380), abs=1e-6)
    assert Paired(3, 3, 0).interval[1] == 1  # cut off where no difference is
    low, high = Paired(10, 0, 0).interval
    assert low < 0 < high


def test_mcnemar_by_hand():
    """Two of eight disagreements one way: 2 (1 + 8 + 28) / 256."""
    assert Paired(100, 2, 6).p_value == Paired(100, 6, 2).p_value == pytest.approx(74 / 256)
    assert Paired(100, 0, 10).p_value == pytest.approx(2 / 1024)
    assert Paired(100, 3, 3).p_value == Paired(100, 0, 0).p_value == 1


def test_pairs_go_by_the_question():
    pair = paired([True, True, False, True], [True, False, True, False])
    assert (pair.n, pair.only_first, pair.only_second, pair.difference) == (4, 2, 1, 0.25)
    with pytest.raises(ValueError, match="zip"):
        paired([True], [True, False])


def sample(name: str, right: bool) -> rows.SampleRow:
    row = dict.fromkeys(rows.SampleRow.__dataclass_fields__, 0)
    return rows.SampleRow(**{**row, "sample": name, "right": right, "value": None})


@pytest.mark.parametrize(("lost", "noise"), [(0, True), (2, True), (12, False)])
def test_a_row_knows_its_difference_from_the_unpruned_run(lost, noise):
    bare = [sample(str(i), True) for i in range(40)]
    pruned = [sample(str(i), i >= lost) for i in reversed(range(40))]  # in another order
    row = rows.Row(**dict.fromkeys(rows.Row.__dataclass_fields__))
    found = rows.compared(row, pruned, bare)
    assert found.difference == pytest.approx(-lost / 40)
    assert (found.difference_low, found.difference_high) == pytest.approx(Paired(40, 0, lost).interval)
    assert found.p_value == Paired(40, 0, lost).p_value
    assert found.is_noise is noise
    assert not row.is_noise


def test_seeds_have_the_mean_difference():
    names = rows.Row.__dataclass_fields__
    empty = {**dict.fromkeys(names, 0), "by_kind": {}, "costs": rows.Costs(), "task": "t", "stderr": None}
    seeds = [
        rows.Row(**empty | {"method": f"random:seed={i}", "difference": d, "difference_low": d - 1, "p_value": 0.5})
        for i, d in enumerate((-0.1, -0.3))
    ]
    (row,) = rows.pooled(seeds)
    assert (row.difference, row.difference_low) == pytest.approx((-0.2, -1.2))
    assert row.p_value is None


def test_percentiles_by_nearest_rank():
    assert [percentile([1, 2, 3, 4, 5], q) for q in (0.0, 0.2, 0.21, 0.5, 0.8, 1.0)] == [1, 1, 2, 3, 4, 5]
    assert percentile([7], 0.2) == percentile([7], 0.8) == 7
