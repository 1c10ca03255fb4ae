"""What a page says of right and wrong answers, and of those that are worth something in between."""

from __future__ import annotations

import re

import pytest
from commands import jsonl, tokprune_cli
from folders import write_folder
from tokprune.eval.report.latex import latex_table
from tokprune.eval.report.tables import not_seen
from tokprune.eval.run.rows import Row
from tokprune.eval.suites import lmms
from tokprune.eval.suites.export import metric_name

from tokprune.core.errors import RunError, TaskError, UnknownNameError

OWN = "def half(answer, expected):\n    return 0.75 if 'e' in answer else 0.25\n"


@pytest.fixture(scope="module", params=["exact", "contains", "own"])
def told(request, tmp_path_factory):
    """The kind of metric, the text of the page, and the folder."""
    path = tmp_path_factory.mktemp(request.param)
    write_folder(path)
    (path / "own.py").write_text(OWN)
    metric = f"{path / 'own.py'}:half" if request.param == "own" else request.param
    run = ["compare", "--task", str(path), "--methods", "uniform", "--keep", "0.5", "--metric", metric]
    done = tokprune_cli(*run, "--no-controls", "--out", str(path / "out"))
    assert done.returncode == 0, done.stderr
    page = (path / "out" / "report.html").read_text()
    return request.param, " ".join(re.sub("<[^>]+>", " ", page).split()), path / "out"


SAYS = {
    "exact": ["questions right", "with nothing after it", "Bonett and Price, paired", "Share of right answers"],
    "contains": ["questions right", "right by the metric of the task", "Bonett and Price, paired"],
    "own": ["by the metric", "Mean of what the answers are worth", "gain and a loss of 1 added", "at least 0.5"],
}


def test_a_page_says_what_its_values_are(told):
    kind, text, _ = told
    mine = [said for said in SAYS[kind] if said != "Share of right answers"]  # one kind of question has no such table
    assert [said in text for said in mine] == [True] * len(mine)
    if kind == "own":
        assert "questions right" not in text
        assert "Bonett and Price, paired" not in text


def test_a_page_lists_wrong_answers_of_the_unpruned_model(told):
    _, text, out = told
    wrong = [r for r in jsonl(out / "samples.jsonl") if r["config"] == "none" and not r["right"]]
    assert (f"Wrong answers of the unpruned model, {len(wrong)} of {len(wrong)}:" in text) == bool(wrong)
    for row in wrong:
        assert row["question"]
        assert f"{row['question']} {row['expected']} {row['answer']}" in text


def test_latex_says_what_the_tables_say(told):
    rows = [Row.read(line) for line in jsonl(told[2] / "rows.jsonl") if "config" in line]
    assert any(map(not_seen, rows))
    assert "no loss seen" in latex_table(rows, {}).splitlines()[0]


# ---- tokprune eval --metric


def test_a_metric_of_a_suite_grades_its_own_tasks(tmp_path):
    suite = lmms.Suite("tiny-llava", ["findit"], [], limit=3, metric="contains")
    ((_, samples),) = suite.own.values()
    assert {s.rule for s in samples} == {"contains"}
    assert metric_name(samples) == "contains"
    assert {s.rule for s in lmms.Suite("tiny-llava", ["findit"], [], limit=3).own["findit"][1]} == {"exact"}


def test_what_a_suite_cannot_grade_is_refused(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    for tasks, metric, error, said in (
        (["findit", "pope"], "contains", RunError, "pope of lmms-eval"),
        (["findit"], f"{tmp_path / 'own.py'}:half", RunError, "function of your own"),
        (["findit"], "contain", UnknownNameError, "Did you mean 'contains'"),
        (["findit"], "vqa", TaskError, "too few for the metric vqa"),
    ):
        with pytest.raises(error, match=said):
            lmms.Suite("tiny-llava", tasks, [], limit=3, metric=metric)
