"""`tokprune reproduce` end to end: real lmms-eval, an embedded model for a large one, a task of ours for POPE."""

from __future__ import annotations

import json

import pytest
from commands import jsonl, tokprune_cli
from tokprune.eval.report.reported import Reproduced


def asked(out):
    return (
        *(
            "reproduce",
            "llava-1.5-7b",
            "--checkpoint",
            "tiny-llava",
            "--tasks",
            "findit",
            "--methods",
            "fastv,divprune",
        ),
        *("--budgets", "36", "--limit", "12", "--out", str(out)),
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("reproduce") / "out"
    return out, tokprune_cli(*asked(out))


def test_every_score_is_that_of_lmms_eval(ran):
    out, done = ran
    assert not done.returncode, done.stderr
    rows = [Reproduced(**line) for line in jsonl(out / "reproduced.jsonl")]
    assert [(r.method, r.budget, r.n) for r in rows] == [
        ("none", "144", 12),
        ("fastv", "36", 12),
        ("divprune", "36", 12),
    ]
    theirs = [json.loads(path.read_text()) for path in sorted((out / "lmms-eval").glob("*/out/**/*_results.json"))]
    values = sorted(100 * found["results"]["tokprune_findit"]["exact_match,none"] for found in theirs)
    assert sorted(r.score for r in rows) == pytest.approx(values)
    assert "do not send them back" in " ".join(done.stdout.split())


def test_it_goes_on_where_it_was(ran):
    out, _ = ran
    before = (out / "reproduced.jsonl").read_text()
    again = tokprune_cli(*asked(out))
    assert " ".join(again.stdout.split()).count("is not run again") == 3
    assert (out / "reproduced.jsonl").read_text() == before
    assert len(jsonl(out / "reproduced.jsonl")) == 3
