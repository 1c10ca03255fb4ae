"""`tokprune reproduce` end to end: real lmms-eval, an embedded model for a large one, a task of ours for POPE."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from commands import jsonl, tokprune_cli
from lmms_eval.tasks.mme import utils as mme
from lmms_eval.tasks.pope import utils as pope
from lmms_eval.utils import load_yaml_config
from tokprune.eval.report import reported
from tokprune.eval.suites import export, units

from tokprune.core.errors import RunError

N = 12


def asked(out) -> list[str]:
    return [
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
        *("--budgets", "36", "--limit", str(N), "--out", str(out)),
    ]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run that was killed in its second configuration, with what was there then, and the same command again."""
    out = tmp_path_factory.mktemp("reproduce") / "out"
    command = [sys.executable, "-m", "tokprune.cli", *asked(out)]
    first = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ, start_new_session=True
    )
    while first.poll() is None and len(list(out.glob("lmms-eval/*/log.txt"))) < 2:
        time.sleep(0.05)
    assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    there = {path: path.read_bytes() for path in out.glob("lmms-eval/*/record.jsonl")}
    return out, there, tokprune_cli(*asked(out))


def test_a_killed_run_resumes_and_every_score_is_that_of_lmms_eval(ran):
    out, there, done = ran
    assert not done.returncode, done.stderr
    assert " ".join(done.stdout.split()).count("is not run again") == len(there) == 1
    assert all(path.read_bytes() == before for path, before in there.items())
    rows = reported.read_reproduced(out_of(out, "reproduced.jsonl"))
    assert [(r.method, r.budget, r.n) for r in rows] == [("none", "144", N), ("fastv", "36", N), ("divprune", "36", N)]
    theirs = [json.loads(path.read_text()) for path in sorted((out / "lmms-eval").glob("*/out/**/*_results.json"))]
    values = sorted(100 * found["results"]["tokprune_findit"]["exact_match,none"] for found in theirs)
    assert sorted(r.score for r in rows) == pytest.approx(values)
    assert all(r.low <= r.score <= r.high for r in rows)
    # What the comparison counts itself.
    ours = {r["method"]: r for r in jsonl(out / "rows.jsonl")}
    for row in rows[1:]:
        own = [ours[row.method][name] for name in ("difference", "difference_low", "difference_high")]
        assert row.paired["none"] == pytest.approx([100 * value for value in own])
    assert rows[1].paired["divprune"] == pytest.approx([-v for v in [rows[2].paired["fastv"][i] for i in (0, 2, 1)]])
    assert not rows[0].paired  # its rivals are of other budgets


def out_of(out, name: str):
    """A folder with that file of a run alone, as the folder of files that were sent."""
    folder = out / "sent"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes((out / name).read_bytes())
    return folder


def test_ours_is_shown_beside_what_is_published(ran):
    said = " ".join(ran[2].stdout.split())
    assert "questions ours [95 %] published away" in said
    assert "Nobody published scores of these benchmarks and budgets." in said
    assert "do not send them back" in said
    rows = reported.read_reproduced(out_of(ran[0], "reproduced.jsonl"))
    assert all("nobody published scores of 'findit'" in reported.unfit_to_share(r) for r in rows)


def test_the_page_of_a_run_is_that_of_its_file(ran):
    out, _, _ = ran
    sent = out_of(out, "reproduced.jsonl")
    assert not tokprune_cli("report", str(sent)).returncode
    page = (sent / "leaderboard.html").read_text()
    assert page == (out / "leaderboard.html").read_text()
    assert "findit, 36 visual tokens" in page


def test_a_finished_run_asks_nothing_again(ran):
    out = ran[0]
    before = (out / "reproduced.jsonl").read_text()
    again = tokprune_cli(*asked(out))
    assert " ".join(again.stdout.split()).count("is not run again") == 3
    assert (out / "reproduced.jsonl").read_text() == before


# ---- what lmms-eval itself makes of documents


def test_the_prompt_with_words_of_an_ocr_system_is_that_of_lmms_eval(tmp_path):
    export.export_prompt("textvqa_val", "tokprune_textvqa_val", {"ocr": True}, tmp_path)
    config = load_yaml_config(str(tmp_path / "tokprune_textvqa_val.yaml"))
    document = {"question": "what is written?", "ocr_tokens": ["STOP", "5"]}
    text = config["doc_to_text"](document, config["lmms_eval_specific_kwargs"]["default"])
    assert text == (
        "What is written?\nReference OCR token: STOP, 5\nAnswer the question using a single word or phrase."
    )
    assert (config["task"], config["test_split"]) == ("tokprune_textvqa_val", "validation")
    for task, options, word in (("textvqa_valley", {"ocr": True}, "no task"), ("gqa", {"ocr": True}, "no option ocr")):
        with pytest.raises(RunError, match=word):
            export.export_prompt(task, "x", options, tmp_path)


def answers(seed: int, n: int = 400) -> list[tuple[str, str]]:
    """What is right, and what was answered: mostly right, at times neither yes nor no."""
    draw = random.Random(seed)
    right = ["yes" if i % 2 else "no" for i in range(n)]
    return [(r, r if draw.random() < 0.7 else draw.choice(["yes", "no", "maybe"])) for r in right]


def test_f1_of_pope_is_that_of_lmms_eval():
    lines = {
        i: pope.pope_process_results({"answer": right, "question_id": str(i)}, [said])
        for i, (right, said) in enumerate(answers(0))
    }
    rule = units.rule_of(("pope_f1_score",))
    own = rule.read(lines)
    assert rule.of(own) == pytest.approx(
        pope.pope_aggregate_f1_score([line["pope_f1_score"] for line in lines.values()])
    )
    low, high = rule.interval(own)
    assert low < rule.of(own) < high < low + 0.2
    assert rule.difference(own, own) == (0, 0, 0)


def test_points_of_mme_are_those_of_lmms_eval():
    categories = ["existence", "OCR", "code_reasoning"]
    lines = {
        i: mme.mme_process_results(
            {"answer": r, "category": categories[i // 2 % 3], "question_id": str(i // 2)}, [said]
        )
        for i, (r, said) in enumerate(answers(1))
    }
    names = ("mme_perception_score", "mme_cognition_score")
    theirs = [mme.mme_aggregate_results([line[name] for line in lines.values() if name in line]) for name in names]
    rule = units.rule_of(names)
    own = rule.read(lines)
    assert rule.of(own) == pytest.approx(sum(theirs))
    assert len(own) == 200
    low, high = rule.interval(own)
    assert low < rule.of(own) < high < low + 100
