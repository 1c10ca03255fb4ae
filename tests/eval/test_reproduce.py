"""Published scores: the form of the file, how a cell is made, and what `tokprune reproduce` makes of measured rows."""

from __future__ import annotations

import io

import pandas as pd
import pytest
from commands import refusal, tokprune_cli
from rich.console import Console
from tokprune.eval import reproduce
from tokprune.eval.report import reported
from tokprune.eval.report.reported import Reported, Reproduced
from tokprune.eval.run.rows import Row

from tokprune.core.errors import RunError
from tokprune.cost.shapes import known_shape

CSV = reported.RESULTS / "reported.csv"


def score(value: float, source: str = "a", **more) -> Reported:
    given = {"benchmark": "GQA", "method": "fastv", "budget": "64", "kind": "re-run", **more}
    return Reported(model="llava-1.5-7b", score=value, metric="", source=source, date="2026", **given)


def test_the_committed_file_keeps_its_form():
    rows = reported.read_reported()
    assert len(rows) == 1043
    assert {r.kind for r in rows} == set(reported.KINDS)
    copied = [r for r in rows if r.kind == "copied" and r.method == "fastv"]
    assert copied
    assert all(r.wrong for r in copied)  # they are not FastV


FAULTS = {
    "method": ("fastvv", "no method 'fastvv'"),
    "budget": ("a quarter", "neither a number of tokens nor a percentage"),
    "kind": ("seen", "is not one of re-run"),
    "date": ("Feb 2026", "not a year"),
    "score": ("101", "not between 0 and 100"),
    "source": ("", "source, model and benchmark are needed"),
}


@pytest.mark.parametrize("column", FAULTS)
def test_a_row_that_breaks_the_form_is_named(column, tmp_path):
    value, message = FAULTS[column]
    frame = pd.read_csv(CSV, dtype=str, keep_default_na=False).head(5)
    frame.loc[3, column] = value
    frame.to_csv(tmp_path / "r.csv", index=False)
    with pytest.raises(RunError, match=f"line 5 of .*{message}"):
        reported.read_reported(tmp_path / "r.csv")


def test_a_score_may_not_be_there_twice(tmp_path):
    frame = pd.read_csv(CSV, dtype=str, keep_default_na=False).head(2)
    pd.concat([frame, frame]).to_csv(tmp_path / "r.csv", index=False)
    with pytest.raises(RunError, match="twice; leave one out"):
        reported.read_reported(tmp_path / "r.csv")


def test_a_cell_is_the_range_of_what_is_not_known_to_be_wrong():
    rows = [score(46.0), score(46.4, "b"), score(46.1, "c", wrong="copied")]
    assert reported._cell(rows) == "46 to 46.4 (2) ~~46.1~~"
    assert reported._cell(rows[:1]) == "46"
    assert reported._cell(rows[2:]) == "~~46.1~~"


def row(**more) -> Row:
    """A row of lmms-eval, as the suite writes it."""
    words = dict.fromkeys(
        ("revision", "low", "high", "stderr", "words_value", "stop_rate", "prefill_ratio", "peak_gib", "gpu", "commit")
    )
    numbers = dict.fromkeys(
        ("n_visual_after", "n_visual_mean", "llm_columns_before", "llm_columns_after", "prefill_ms_p20")
        + ("prefill_ms_p50", "prefill_ms_p80"),
        1.0,
    )
    given = {"method": "none", "config": "none", "keep_ratio": None, "decode_ms_per_token_p50": None, "seed": None}
    given |= {"task": "pope", "metric": "pope_f1_score", "value": 0.5, "n_visual_before": 576.0, "n_samples": 9000}
    given |= {"attn_implementation": "sdpa", "positions": "contiguous", "torch": "2", "transformers": "5"}
    given |= {"device": "cpu", "dtype": "float32", "tokprune": "1", "date": "2026-11-26T10:00:00", "batch_size": 8}
    costs = {"costs": reproduce_costs(), "params": {}, "by_kind": {}, "model": "m", "split": "test"}
    return Row(**{**words, **numbers, **given, **costs, **more})


def reproduce_costs():
    from tokprune.eval.run.rows import Costs

    return Costs()


def wanted(**more) -> reproduce.Wanted:
    given = {"methods": ["divprune"], "tasks": ["pope", "mme"], "budgets": [64], **more}
    return reproduce.Wanted("llava-1.5-7b", **given)


def test_scores_are_made_as_they_are_published():
    rows = [
        row(metric="pope_accuracy", value=0.9),
        row(task="pope, pope_f1_score", value=0.858, low=0.85, high=0.866),
        row(task="mme", metric="mme_perception_score", value=1500.0, n_samples=2374),
        row(task="mme, mme_cognition_score", metric="mme_cognition_score", value=360.0, n_samples=2374),
        row(task="mme", metric="mme_perception_score", value=1300.0, config="divprune@64tokens", method="divprune"),
    ]
    pope, mme = reproduce.measured(wanted(), rows)  # without a cognition score divprune has no MME
    assert (pope.benchmark, pope.method, pope.budget, pope.n) == ("POPE", "none", "576", 9000)
    assert (pope.score, pope.low, pope.high) == pytest.approx((85.8, 85.0, 86.6))
    assert (mme.score, mme.low, mme.checkpoint) == (1860.0, None, "llava-hf/llava-1.5-7b-hf")


def shown(grid) -> str:
    out = io.StringIO()
    Console(file=out, width=150).print(grid)
    return out.getvalue()


@pytest.mark.parametrize(("value", "verdict"), [(46.2, "inside"), (46.9, "0.5 (accepted)"), (44.0, "2.0")])
def test_ours_is_shown_beside_the_published_range(value, verdict):
    own = Reproduced(
        "llava-1.5-7b", "GQA", "fastv", "64", value, 12578, None, None, "gqa", "x", {"torch": "2"}, "2026-11-26"
    )
    published = [score(46.0), score(46.4, "b"), score(60.0, "c", wrong="copied"), score(70.0, "d", budget="128")]
    last = shown(reproduce.beside([own], published)).splitlines()[-1]
    assert "46 to 46.4 (2)" in last
    assert last.strip().endswith(verdict)


def test_the_plan_counts_what_the_ledger_counts():
    out = io.StringIO()
    reproduce.plan(wanted(), Console(file=out, width=150))
    (line,) = [text for text in out.getvalue().splitlines() if "POPE" in text and "none" in text]
    shape = known_shape("llava-1.5-7b")
    prefill = (shape.picture(576) + shape.read(576 + reproduce.N_TEXT)).prefill.flops
    assert line.split()[-1] == f"{9000 * prefill / 1e15:,.1f}"


def test_measured_files_are_read_back(tmp_path):
    rows = reproduce.measured(wanted(), [row(task="pope", value=0.858)])
    (tmp_path / "a.jsonl").write_text(reported.lines_of(rows))
    assert reported.read_reproduced(tmp_path) == rows
    (tmp_path / "b.jsonl").write_text('{"model": "x"}\n')
    with pytest.raises(RunError, match=r"line 1 of .*b\.jsonl: lacks .*; write it with tokprune reproduce"):
        reported.read_reproduced(tmp_path)


def test_a_model_without_published_scores_is_one_line():
    assert "no published scores of 'llava-2'" in refusal(tokprune_cli("reproduce", "llava-2", "--dry-run"))
