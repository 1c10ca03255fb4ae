"""One comparison under several prompts: what is asked, and the rankings, against figures worked out by hand."""

from __future__ import annotations

import pytest
from commands import jsonl, refusal, tokprune_cli
from folders import write_folder
from tokprune.eval.compare import question_only
from tokprune.eval.report.exports import markdown_tables
from tokprune.eval.report.rankings import rankings
from tokprune.eval.run.rows import Costs, Row
from tokprune.eval.tasks import load_task
from tokprune.eval.tasks.prompted import Prompted, embedded_task

import tokprune
from tokprune.core.errors import RunError

BRIEF = " Answer with one word."


def test_a_task_under_a_prompt_asks_the_same_with_more_text(folder):
    plain = load_task(str(folder))
    asked = Prompted(plain, BRIEF)
    assert asked.name == f"{plain.name} (suffix ' Answer with one word.')"
    assert Prompted(plain, "").name == f"{plain.name} (no suffix)"
    assert [s.question for s in asked.samples()] == [s.question + BRIEF for s in plain.samples()]
    assert [(s.id, s.answer) for s in asked.samples()] == [(s.id, s.answer) for s in plain.samples()]
    assert asked.checksum("1.png") == plain.checksum("1.png")
    assert asked.train_samples() is None


def test_the_question_alone_is_worth_the_same_under_every_prompt():
    plain = load_task("findit")
    floors = [question_only(t, t.samples()[:200]) for t in (plain, Prompted(plain, BRIEF))]
    assert floors[0] == floors[1] > 0


def test_embedded_tasks_are_found_by_their_names_under_prompts():
    assert embedded_task("findit").name == "findit"
    found = embedded_task(f"findit (suffix {BRIEF!r})", ["", BRIEF])
    assert (found.suffix, found.task.name) == (BRIEF, "findit")
    assert embedded_task("findit (no suffix)", [BRIEF]) is None


# ---- rankings


def row(suffix: str, method: str, value: float, keep: float | None = 0.5) -> Row:
    empty = dict.fromkeys(Row.__dataclass_fields__) | {"by_kind": {}, "model": "m", "n_samples": 10, "costs": Costs()}
    name = Prompted(load_task("findit"), suffix).name
    return Row(**{**empty, "task": name, "method": method, "value": value, "keep_ratio": keep, "suffix": suffix})


VALUES = {
    "": {"none": 0.9, "a": 0.8, "b": 0.7, "c": 0.7, "prumerge": 0.6},
    BRIEF: {"none": 0.8, "a": 0.5, "b": 0.6, "c": 0.7, "prumerge": 0.6},
}
WHOLE = ("none", "prumerge")  # without a budget
ROWS = [row(s, m, v, None if m in WHOLE else 0.5) for s, values in VALUES.items() for m, v in values.items()]


def test_ranks_by_hand():
    (grid,) = rankings(ROWS)
    assert grid.title == "findit: accuracy (rank) by prompt"
    assert grid.header == ["method", "keep", "prompt 1", "prompt 2"]
    assert {line[0]: line[1:] for line in grid.lines} == {
        "none": ["", "0.900", "0.800"],
        "a": ["0.5", "0.800 (1)", "0.500 (3)"],
        "b": ["0.5", "0.700 (2)", "0.600 (2)"],
        "c": ["0.5", "0.700 (2)", "0.700 (1)"],
        "prumerge": ["", "0.600", "0.600"],
    }
    # a was above b and c and is below both; b and c were even, which is no change of places
    assert grid.notes[0] == "Prompt 1: no suffix; prompt 2: suffix ' Answer with one word.'."
    assert grid.notes[1].startswith("2 of 3 pairs of methods")


def test_one_prompt_has_no_ranking():
    assert rankings([r for r in ROWS if r.suffix == ""]) == []
    assert rankings([Row(**{**vars(r), "suffix": None}) for r in ROWS]) == []  # of an earlier run


# ---- the command

RUN = ("compare", "--task", "findit", "--methods", "uniform,vtc_cls", "--keep", "0.25", "--limit", "6", "--no-controls")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    out = tmp_path_factory.mktemp("both")
    done = tokprune_cli(*RUN, "--suffix", "", "--suffix", BRIEF, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def answers(out, task):
    return {(r["config"], r["sample"]): r["answer"] for r in jsonl(out / "samples.jsonl") if r["task"] == task}


def test_answers_are_those_of_one_run_a_prompt(both, tmp_path):
    out, _ = both
    for i, (suffix, task) in enumerate((("", "findit (no suffix)"), (BRIEF, f"findit (suffix {BRIEF!r})"))):
        done = tokprune_cli(*RUN, "--suffix", suffix, "--out", str(tmp_path / str(i)))
        assert done.returncode == 0, done.stderr
        assert answers(out, task) == answers(tmp_path / str(i), "findit") != {}
    assert "suffix ' Answer with one word.'" in " ".join(done.stdout.split())  # of one prompt, the table says it, too


def test_every_form_says_which_prompt_and_ranks_them(both):
    out, said = both
    rows = [Row.read(line) for line in jsonl(out / "rows.jsonl") if "config" in line]
    assert {r.suffix for r in rows} == {"", BRIEF}
    shown = " ".join(said.split())
    page = (out / "report.html").read_text()
    table = (out / "table.md").read_text()
    for text in (shown, page, table):
        assert "accuracy (rank) by prompt" in text.replace("\\", "")
        assert "no suffix" in text
    assert "prompt 2" in markdown_tables(rows, {}, text=str)


def test_prompts_are_added_to_a_folder_and_its_pictures_are_drawn(both):
    out, _ = both
    n = len(jsonl(out / "samples.jsonl"))
    done = tokprune_cli(*RUN, "--suffix", "", "--suffix", BRIEF, "--suffix", " Why?", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert f"{n} answers are in" in done.stdout
    assert len(jsonl(out / "samples.jsonl")) == n * 3 // 2
    (out / "pictures.jsonl").unlink()
    done = tokprune_cli("report", str(out), "--pictures")
    assert done.returncode == 0, done.stderr


def test_a_run_of_one_prompt_is_not_mixed_with_several(both, tmp_path):
    out, _ = both
    assert "--out" in refusal(tokprune_cli(*RUN, "--out", str(out)))


def test_several_prompts_from_python(tmp_path):
    asked = dict(task="findit", methods=["uniform"], keep=[0.25], limit=2, controls=False)
    done = tokprune.compare("tiny-llava", suffixes=["", BRIEF, BRIEF], **asked)
    assert set(done.floors) == {"findit (no suffix)", f"findit (suffix {BRIEF!r})"}
    assert "prompt 2" in done.to_markdown()
    assert "prompt 2" in done._repr_html_()
    one = tokprune.compare("tiny-llava", suffixes=[BRIEF], **asked)
    assert {r.task for r in one.rows} == {"findit"}
    assert {r.suffix for r in one.rows} == {BRIEF}
    with pytest.raises(RunError, match="suffixes"):
        tokprune.compare("tiny-llava", suffix="a", suffixes=["b"], **asked)


def test_questions_of_a_folder_are_asked_under_both(tmp_path):
    write_folder(tmp_path)
    run = ["compare", "--task", str(tmp_path), "--methods", "none", "--suffix", "", "--suffix", " [red]"]
    done = tokprune_cli(*run, "--out", str(tmp_path / "out"), "--no-controls")
    assert done.returncode == 0, done.stderr
    assert "(suffix ' [red]')" in " ".join(done.stdout.split())  # brackets are no markup


def test_a_suite_takes_no_suffix(tmp_path):
    run = ["compare", "--task", "findit", "--suite", "lmms-eval", "--suffix", " x", "--out", str(tmp_path / "a")]
    assert "--suffix" in refusal(tokprune_cli(*run))
