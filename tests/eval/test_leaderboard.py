"""The leaderboard: methods are ranked as far as differences are not noise, and the page says so."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from commands import refusal, tokprune_cli
from tokprune.eval.report import leaderboard, reported
from tokprune.eval.report.reported import Reproduced
from tokprune.eval.stats import Z95, sign
from tokprune.eval.suites.units import rule_of


def measured(method: str, score: float, half: float | None = 1.0, **more) -> Reproduced:
    ends = {"low": None, "high": None} if half is None else {"low": score - half, "high": score + half}
    given = {"model": "llava-1.5-7b", "benchmark": "GQA", "budget": "64", "n": 12578, "task": "gqa", "checkpoint": "x"}
    versions = {"tokprune": "1", "device": "cpu", "dtype": "float32"}
    return Reproduced(
        **{"method": method, "score": score, "versions": versions, "date": "2026-11-27", **ends, **given, **more}
    )


def ranks(rows) -> dict[str, str]:
    (board,) = leaderboard.boards(rows)
    return {place.row.method: place.rank for place in board.places}


def test_what_cannot_be_told_apart_shares_ranks():
    assert ranks([measured("a", 60), measured("b", 59.5), measured("c", 50)]) == {
        "a": "1 to 2",
        "b": "1 to 2",
        "c": "3",
    }
    # Not transitive: the one between is apart from neither.
    found = ranks([measured("a", 60), measured("b", 58.5), measured("c", 57)])
    assert found == {"a": "1 to 2", "b": "1 to 3", "c": "2 to 3"}


def test_the_same_questions_tell_more_than_two_intervals():
    a, b = measured("a", 60, 2), measured("b", 59, 2)
    assert set(ranks([a, b]).values()) == {"1 to 2"}
    both = [replace(a, paired={"b": [1.0, 0.5, 1.5]}), b]
    assert ranks(both) == ranks(both[::-1]) == {"a": "1", "b": "2"}


def test_errors_of_two_runs_add_by_their_squares():
    # Apart by 1.5, where each may be off by 1: less than the sum of both, more than the root of 2.
    assert ranks([measured("a", 51.5), measured("b", 50)]) == {"a": "1", "b": "2"}
    assert set(ranks([measured("a", 51.3), measured("b", 50)]).values()) == {"1 to 2"}


def test_scores_without_an_interval_are_never_apart():
    assert set(ranks([measured("a", 90, None), measured("b", 10)]).values()) == {"1 to 2"}


def test_more_pairs_need_wider_intervals():
    """Ten methods that are alike: the more are compared, the more differ by chance, but for the correction."""
    assert (sign(0.01, 1.0), sign(-1.0, -0.01), sign(-0.01, 1.0)) == (1, -1, 0)
    assert sign(0.01, 1.0, 45) == 0
    draw, wrong, uncorrected = random.Random(0), 0, 0
    for _ in range(300):
        errors = [draw.gauss(0, 1) for _ in range(10)]
        rows = [measured(str(i), 50 + e, Z95) for i, e in enumerate(errors)]
        (board,) = leaderboard.boards(rows)
        wrong += board.n_apart > 0
        uncorrected += any(leaderboard.compared(a, b) for a in rows for b in rows if a is not b)
    assert wrong / 300 <= 0.05 < uncorrected / 300


def test_only_the_same_questions_are_compared_and_the_newest_score_counts():
    rows = [
        measured("a", 40, date="2026-01-01"),
        measured("a", 60, date="2026-03-01"),
        measured("b", 58, date="2026-01-01"),
        measured("b", 50, date="2026-02-01"),
        measured("c", 55, n=100),
        measured("d", 55, budget="128"),
        measured("none", 62, budget="576"),
    ]
    found = leaderboard.boards(rows)
    assert [(b.budget, b.n, [p.row.method for p in b.places]) for b in found] == [
        ("128", 12578, ["d"]),
        ("64", 12578, ["a", "b"]),
        ("64", 100, ["c"]),
    ]
    assert (found[1].places[0].row.score, found[1].places[0].earlier) == (60, [40])
    assert (found[1].places[1].row.score, found[1].places[1].earlier) == (50, [58])  # newer, though less
    assert found[1].bare.row.score == 62
    assert found[1].questions == "12,578 questions"
    assert found[2].bare is None
    assert found[2].questions == "100 of 12,578 questions, a quick look"


def test_the_page_has_every_score_and_needs_no_network(tmp_path):
    rows = [
        measured("<b>", 60, paired={"none": [-2.0, -2.5, -1.5]}),
        measured("b", 50),
        measured("none", 62, budget="576"),
    ]
    (tmp_path / "one.jsonl").write_text(reported.lines_of(rows[:1]))
    (tmp_path / "two.jsonl").write_text(reported.lines_of(rows[1:]))
    done = tokprune_cli("report", str(tmp_path))
    assert not done.returncode, done.stderr
    page = (tmp_path / "leaderboard.html").read_text()
    for text in (
        "60.0 [59.0, 61.0]",
        "-2.0 [-2.5, -1.5]",
        "62.0 [61.0, 63.0]",
        "&lt;b&gt;",
        "1 of 1 pairs",
        "64 visual tokens",
    ):
        assert text in page
    assert "http" not in page.replace("http-equiv", "")
    assert not tokprune_cli("report", str(tmp_path), "--out", str(tmp_path / "other.html")).returncode
    assert (tmp_path / "other.html").read_text() == page


def test_a_folder_without_scores_or_with_others_is_one_line(tmp_path):
    assert "tokprune reproduce" in refusal(tokprune_cli("report", str(tmp_path)))
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert "line 1 of" in refusal(tokprune_cli("report", str(tmp_path)))
    (tmp_path / "a.jsonl").write_text(reported.lines_of([measured("a", 60)]))
    assert "leave --format and --pictures out" in refusal(tokprune_cli("report", str(tmp_path), "--format", "csv"))


# ---- intervals out of documents


def test_a_bootstrap_of_a_mean_is_the_interval_of_a_mean():
    draw, rule = random.Random(0), rule_of(("exact_match",))
    lines = {i: {"exact_match": float(draw.random() < 0.6)} for i in range(2000)}
    others = {i: {"exact_match": float(draw.random() < 0.5)} for i in range(2000)}
    own, other = rule.read(lines), rule.read(others)
    resampled = replace(rule, is_mean=False)
    assert rule.of(own) == pytest.approx(sum(line["exact_match"] for line in lines.values()) / 2000)
    assert rule.interval(own) == pytest.approx(resampled.interval(own), abs=0.004)
    assert rule.difference(own, other) == pytest.approx(resampled.difference(own, other), abs=0.004)


def test_documents_that_lack_the_metric_have_no_interval():
    assert rule_of(("exact_match",)).read({0: {"anls": 1}}) is None
    assert rule_of(("exact_match",)).read({0: {"exact_match": 55.0}}) is None
    one, other = ({i: {"exact_match": 1.0}} for i in (0, 1))
    rule = rule_of(("exact_match",))
    assert rule.difference(rule.read(one), rule.read(other)) is None
