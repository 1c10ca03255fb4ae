"""Published scores: the form of the file, how a cell is made, and what `tokprune reproduce` makes of measured rows."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace

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
        ("n_visual_mean", "llm_columns_before", "llm_columns_after", "prefill_ms_p20")
        + ("prefill_ms_p50", "prefill_ms_p80"),
        1.0,
    )
    given = {"method": "none", "config": "none", "keep_ratio": None, "decode_ms_per_token_p50": None, "seed": None}
    given |= {"task": "pope", "metric": "pope_f1_score", "value": 0.5, "n_visual_before": 576.0, "n_samples": 9000}
    given |= {"n_visual_after": 576.0}
    given |= {"attn_implementation": "sdpa", "positions": "contiguous", "torch": "2", "transformers": "5"}
    given |= {"device": "cpu", "dtype": "float32", "tokprune": "1", "date": "2026-11-26T10:00:00", "batch_size": 8}
    costs = {"costs": reproduce_costs(), "params": {}, "by_kind": {}, "model": "m", "split": "test"}
    return Row(**{**words, **numbers, **given, **costs, **more})


def reproduce_costs():
    from tokprune.eval.run.rows import Costs

    return Costs()


def wanted(**more) -> reproduce.Wanted:
    given = {"methods": ["divprune"], "tasks": ["pope", "mme"], "budgets": ["64"], **more}
    return reproduce.Wanted("llava-1.5-7b", **given)


def test_scores_are_made_as_they_are_published():
    rows = [
        row(metric="pope_accuracy", value=0.9),
        row(task="pope, pope_f1_score", value=0.858, low=0.85, high=0.866),
        row(task="mme", metric="mme_perception_score", value=1500.0, n_samples=2374),
        row(task="mme, mme_cognition_score", metric="mme_cognition_score", value=360.0, n_samples=2374),
        row(task="mme", metric="mme_perception_score", value=1300.0, config="divprune@64tokens", method="divprune"),
    ]
    pope, mme = reproduce.measured(wanted(), rows).values()  # without a cognition score divprune has no MME
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


def planned(wanted: reproduce.Wanted) -> str:
    out = io.StringIO()
    reproduce.plan(wanted, Console(file=out, width=150))
    return out.getvalue()


def cells(text: str, *begins: str) -> list[str]:
    """Of the line of a table that begins so."""
    (line,) = [line.split() for line in text.splitlines() if line.split()[: len(begins)] == list(begins)]
    return line[len(begins) :]


@pytest.mark.parametrize(
    ("model", "n", "published"), [("llava-1.5-7b", 576, "85.88 to 85.9 (4)"), ("llava-next-7b", 2880, "86.5")]
)
def test_the_plan_counts_what_the_ledger_counts_and_says_what_is_published(model, n, published):
    """A picture of LLaVA-NeXT has five crops."""
    text = planned(reproduce.Wanted(model, ["divprune"]))
    shape = known_shape(model)
    prefill = (shape.picture(n) + shape.read(n + reproduce.N_TEXT)).prefill.flops
    assert cells(text, "POPE", "none") == [str(n), "9,000", f"{9000 * prefill / 1e15:,.1f}", "P", *published.split()]
    assert f"{n:,} visual and 64 text tokens" in text


def test_questions_of_ours_are_counted_and_unknown_ones_are_said():
    text = planned(wanted(tasks=["findit", "vqav2_val"], limit=None))
    assert cells(text, "findit", "none")[1] == "800"
    assert cells(text, "vqav2_val", "none")[1:] == ["?", "?"]
    assert "Not counted: vqav2_val" in text


def test_budgets_are_those_of_the_tables():
    asked = reproduce.Wanted("qwen2.5-vl-7b", ["scope"])
    assert [asked.budget_of(c, 400, 400) for c in asked.configs] == ["100%", "25%", "10%"]
    assert [c.keep_ratio for c in asked.configs] == [None, 0.25, 0.1]
    published = [r for r in reported.read_reported() if r.model == asked.model and r.method in ("none", "scope")]
    assert {"100%", "25%", "10%"} <= {r.budget for r in published}
    # A method without a budget is told by what it kept.
    adaptive = wanted(methods=["prumerge"])
    assert [adaptive.budget_of(c, 576, 40) for c in adaptive.configs if c.method != "none"] == ["40"]


@pytest.mark.parametrize("budget", ["0", "0%", "101%", "x", "25.5", "-3", "%"])
def test_what_is_no_budget_is_one_line(budget):
    line = refusal(tokprune_cli("reproduce", "llava-1.5-7b", "--dry-run", "--budgets", budget))
    assert "numbers of tokens or percentages" in line


def test_the_prompt_is_that_of_the_tables():
    """LLaVA-1.5's TextVQA names the words that an OCR system read; that of others does not."""
    assert wanted(tasks=["textvqa_val", "gqa"]).prompts == {"textvqa_val": {"ocr": True}}
    assert not reproduce.Wanted("llava-next-7b", ["scope"]).prompts


def test_a_task_that_no_table_has_is_scored_by_its_first_metric():
    rows = [row(task="docs", metric="anls", value=0.4), row(task="docs, f1", metric="f1", value=0.2)]
    (one,) = reproduce.measured(wanted(tasks=["docs"]), rows).values()
    assert (one.benchmark, one.score) == ("docs", 40.0)
    assert "Nobody published scores" in shown(reproduce.beside([one], reported.read_reported()))


def test_measured_files_are_read_back(tmp_path):
    rows = list(reproduce.measured(wanted(), [row(task="pope", value=0.858, low=0.85, high=0.86)]).values())
    rows = [replace(r, paired={"fastv": [1.0, 0.5, 1.5]}) for r in rows]
    (tmp_path / "a.jsonl").write_text(reported.lines_of(rows))
    assert reported.read_reproduced(tmp_path) == rows
    (tmp_path / "b.jsonl").write_text('{"model": "x"}\n')
    with pytest.raises(RunError, match=r"line 1 of .*b\.jsonl lacks .*; write it with tokprune reproduce"):
        reported.read_reproduced(tmp_path)


MISFITS = {
    "budget": ("a quarter", "neither a number of tokens nor a percentage"),
    "low": (87.0, "is no interval"),
    "high": (None, "is no interval"),
    "date": ("yesterday", "is no day"),
    "score": ("many", "has the score"),
    "n": (0, "has the n 0"),
    "paired": ({"fastv": [1.0, 2.0]}, "the difference from 'fastv'"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_measured_line_that_breaks_the_form_is_named(name, tmp_path):
    value, message = MISFITS[name]
    (good,) = reproduce.measured(wanted(), [row(value=0.858, low=0.85, high=0.86)]).values()
    lines = [asdict(good), {**asdict(good), name: value}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RunError, match=f"line 2 of .*{message}"):
        reported.read_reproduced(tmp_path)


UNFIT = {
    "model": ("tiny-llava", "nobody published scores of 'tiny-llava'"),
    "benchmark": ("findit", "nobody published scores of 'findit'"),
    "n": (8999, "8999 of 9000 questions of POPE: run it without --limit"),
    "method": ("fastvv@x", "no method 'fastvv@x'"),
    "score": (101.0, "not between 0 and 100"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_be_added_to_the_repository_is_told(name):
    value, message = UNFIT[name]
    (good,) = reproduce.measured(wanted(), [row(value=0.858)]).values()
    assert not reported.unfit_to_share(good)
    assert message in reported.unfit_to_share(replace(good, **{name: value}))


def test_the_committed_files_can_be_shared():
    assert [r for r in reported.read_reproduced() if reported.unfit_to_share(r)] == []


def test_a_model_without_published_scores_is_one_line():
    assert "no published scores of 'llava-2'" in refusal(tokprune_cli("reproduce", "llava-2", "--dry-run"))
