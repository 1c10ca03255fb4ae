"""Hard questions, changed answers and alarms, against figures worked out by hand."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import pytest
import tokprune.eval.report.findings as findings
from commands import refusal, tokprune_cli
from rich.console import Console
from tokprune.eval.report import tables
from tokprune.eval.report.exports import csv_table, markdown_tables
from tokprune.eval.report.latex import latex_table
from tokprune.eval.report.render import read_rows
from tokprune.eval.run import checks
from tokprune.eval.run.rows import BatchTime, Config, Costs, Row, SampleRow, Summariser, conditions, pooled
from tokprune.eval.run.runner import Runner
from tokprune.eval.stats import wilson

import tokprune
from tokprune.core.errors import AlarmError


@dataclass
class Said:
    sample: str
    right: bool
    value: float | None = None

    @property
    def score(self):
        return self.right if self.value is None else self.value


def said(text: str) -> list[Said]:
    """Answers to questions a, b, c ...: + right, - wrong."""
    return [Said(name, mark == "+") for name, mark in zip("abcdefgh", text, strict=False)]


def test_hard_questions_are_those_that_a_small_picture_loses():
    found = checks.hard(said("++-+-+"), small=said("+---++"))  # b, c and d are lost; two of them are answered
    assert found["hard_n"] == 3
    assert found["hard_value"] == pytest.approx(2 / 3)
    assert (found["hard_low"], found["hard_high"]) == pytest.approx(wilson(2, 3))
    assert checks.hard(said("+-"), small=said("++")) == {"hard_n": 0}


def test_values_between_right_and_wrong_are_averaged():
    graded = [Said("a", True, 0.6), Said("b", False, 0.3), Said("c", True, 1.0)]
    assert checks.hard(graded, small=said("--+"))["hard_value"] == pytest.approx(0.45)


def test_changed_answers_and_the_commonest_by_hand():
    bare = {"a": "red", "b": "blue", "c": "red", "d": "two"}
    found = checks.changed({"a": "red", "b": "red", "c": "red", "d": "red"}, bare)
    assert found == {"n_changed": 2, "commonest": 1.0, "commonest_bare": 0.5}
    assert checks.changed({"a": "Red"}, bare)["n_changed"] == 1  # another text is another answer
    assert checks.changed({"x": "red"}, bare) == {}


# ---- rows


def answered(config: Config, texts: str, n_after: int = 144) -> list[SampleRow]:
    """Answers to questions that all expect "y"."""
    return [
        SampleRow(
            *("t", config.label, 0, config.method, config.keep_ratio, f"q{i}", "all", "y", text),
            right=text == "y",
            words_right=text == "y",
            stopped=True,
            n_visual_before=144,
            n_visual_after=n_after,
            n_visual_mean=n_after,
            llm_columns_before=150,
            llm_columns_after=6 + n_after,
            costs=Costs(),
            keep_tokens=config.keep_tokens,
        )
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def model():
    return Runner.load("tiny-llava").model


def summed(model, *given: tuple[Config, str, int]) -> dict[str, Row]:
    answers = {config: answered(config, texts, n) for config, texts, n in given}
    times = {c: [BatchTime("t", c.label, 0, len(rows), 0.1, None, None)] for c, rows in answers.items()}
    return {row.config: row for row in Summariser("m", conditions(model), "t", "test").rows(answers, times)}


HALF, FEW = Config("downsample", 0.5), Config("downsample", keep_tokens=9)


def test_rows_have_the_questions_of_the_control_at_their_own_budget(model):
    rows = summed(
        model,
        (Config("none"), "yyyn", 144),
        (HALF, "yynn", 72),
        (FEW, "nnny", 9),
        (Config("uniform", 0.5), "ynyn", 72),
        (Config("uniform", keep_tokens=9), "yyxx", 9),
        (Config("uniform", flops_ratio=0.5), "yyyy", 60),
        (Config("prumerge"), "yyyy", 30),
    )
    hard = {label: (row.hard_n, row.hard_value) for label, row in rows.items()}
    assert hard == {
        "none": (None, None),
        "downsample@0.5": (None, None),
        "downsample@9tokens": (None, None),
        "uniform@0.5": (2, 0.5),
        "uniform@9tokens": (3, pytest.approx(2 / 3)),
        "uniform@flops0.5": (2, 1.0),
        "prumerge": (None, None),
    }
    assert {label: row.n_changed for label, row in rows.items()} == {
        "none": None,
        "downsample@0.5": 1,
        "downsample@9tokens": 4,
        "uniform@0.5": 1,
        "uniform@9tokens": 2,
        "uniform@flops0.5": 1,
        "prumerge": 1,
    }
    assert (rows["uniform@9tokens"].commonest, rows["uniform@9tokens"].commonest_bare) == (0.5, 0.75)


def test_a_control_without_a_budget_is_no_control_of_a_budget(model):
    rows = summed(
        model, (Config("none"), "yy", 144), (Config("downsample"), "ny", 36), (Config("uniform", 0.5), "yy", 72)
    )
    assert {row.hard_n for row in rows.values()} == {None}


def test_seeds_are_averaged(model):
    one, two = (Config(f"random:seed={i}", 0.5) for i in range(2))
    rows = summed(model, (Config("none"), "yyyy", 144), (HALF, "yynn", 72), (one, "yyyn", 72), (two, "xynn", 72))
    (row,) = [r for r in pooled(list(rows.values())) if r.method.startswith("random")]
    assert (row.hard_n, row.hard_value, row.n_changed) == (2, 0.25, 2)
    assert row.commonest == pytest.approx((0.75 + 0.5) / 2)


# ---- alarms


def alarming(model, texts: str, bare: str, method: str = "uniform", n_after: int = 72) -> list[str]:
    config = Config(method) if method == "blind" else Config(method, 0.5)
    return findings.alarms(list(summed(model, (Config("none"), bare, 144), (config, texts, n_after)).values()))


def test_no_answer_changed_although_tokens_left(model):
    (text,) = alarming(model, "yynx", "yynx")
    assert text.startswith("uniform at 0.5 changed none of 4 answers, although 144 -> 72 visual tokens")
    assert alarming(model, "yynn", "yynx") == []
    assert alarming(model, "yynx", "yynx", n_after=144) == []  # no token left
    assert alarming(model, "yynx", "yynx", "downsample", 144) == []
    assert len(alarming(model, "yynx", "yynx", "blind", 0)) == 1


@pytest.mark.parametrize(
    ("texts", "bare", "has"),
    [
        ("y" * 19 + "n", "yn" * 10, True),  # 95 % of one answer where it was half
        ("y" * 14 + "n" * 6, "yn" * 10, False),  # 70 % closes less than half of the distance to all
        ("y" * 20, "y" * 18 + "xn", False),  # 20 of 20 are within chance of 90 %
        ("yyn", "yxn", False),  # too few to tell
    ],
)
def test_answers_that_became_one(model, texts, bare, has):
    found = alarming(model, texts, bare)
    assert [f"{100 * texts.count('y') / len(texts):.0f} % of its answers are one" in text for text in found] == [
        True
    ] * has


def test_without_a_picture_one_answer_is_no_alarm(model):
    assert alarming(model, "y" * 20, "yn" * 10, "blind", 0) == []


# ---- every form of a report


@pytest.fixture(scope="module")
def rows(model):
    made = summed(
        model,
        (Config("none"), "yyyn" * 5, 144),
        (HALF, "yynn" * 5, 144),
        (Config("uniform", 0.5), "yyyn" * 5, 72),
        (Config("pool", 0.5), "yynn" + "y" * 16, 72),
    )
    return list(made.values())


def test_markdown_warns_below_its_table(rows):
    lines = markdown_tables(rows, {}, text=str).splitlines()
    assert any(line.startswith("Alarm: uniform at 0.5 changed none") for line in lines)
    assert "Not at equal tokens: downsample at 0.5 has 144 visual tokens, not 72." in lines


CELLS = ("0.500 [0.237, 0.763] n = 10", "0 of 20 !", "0.75 (0.75)")


def test_the_columns_are_in_every_form_but_a_papers_table(rows):
    forms = (markdown_tables(rows, {}, text=str), "".join(map(str, tables.body(rows, None)[1])))
    for form in forms:
        assert all(cell in form for cell in CELLS), form
    assert not [cell for cell in CELLS if cell in latex_table(rows, {})]
    line = next(line for line in csv_table(rows, {}).splitlines() if ",uniform@0.5," in line)
    assert ",0.5,0.236" in line


def test_alarms_and_unequal_controls_stand_below_the_table_at_every_width(rows):
    for width in (60, 80, 120):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(findings.task_table("t", rows, None))
        shown = " ".join(console.export_text().split())
        assert "Alarm: uniform at 0.5 changed none of 20 answers" in shown
        assert "Not at equal tokens: downsample at 0.5 has 144 visual tokens, not 72." in shown


def test_a_page_warns_of_them(rows):
    found = {f.label: f for f in findings.findings(rows, None)}
    assert found["Alarm"].is_warning
    assert found["Alarm"].text.startswith("Uniform at 0.5 changed none")
    assert found["Costs"].text.startswith("Not at equal tokens")


def test_a_control_at_its_budget_is_not_told(rows):
    assert findings.not_equal([replace(r, n_visual_after=75) for r in rows if r.method == "downsample"]) == ""


def test_rows_of_earlier_runs_have_no_such_columns():
    old = [Row.read(line) for line in read_rows("compare-tiny-llava.jsonl") if "config" in line]
    assert not {*tables.CHECKS} & {*tables.columns(old)}
    assert findings.alarms(old) == []


# ---- strict


QUIET = ("--task", "findit", "--methods", "uniform", "--keep", "0.99", "--no-controls", "--limit", "2")


def test_strict_ends_with_one_for_an_alarm(tmp_path):
    run = ["compare", *QUIET, "--out", str(tmp_path / "a")]
    assert tokprune_cli(*run).returncode == 0
    done = tokprune_cli(*run, "--strict")
    assert done.returncode == 1
    assert (tmp_path / "a" / "report.html").exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith("tokprune: findit: uniform at 0.99 changed none of 2 answers")


def test_strict_from_python(tmp_path):
    asked = dict(task="findit", methods=["uniform"], keep=[0.99], limit=2, controls=False, out=tmp_path / "a")
    done = tokprune.compare("tiny-llava", **asked)
    assert len(done.alarms) == 1
    with pytest.raises(AlarmError, match=r"findit: uniform at 0\.99 changed none of 2 answers"):
        tokprune.compare("tiny-llava", **asked, strict=True)
    calm = tokprune.compare("tiny-llava", **{**asked, "keep": [0.01], "limit": 12, "out": None}, strict=True)
    assert calm.alarms == []


def test_strict_is_refused_where_it_says_nothing(tmp_path):
    line = refusal(tokprune_cli("compare", *QUIET, "--no-baseline", "--strict", "--out", str(tmp_path / "a")))
    assert "--no-baseline" in line
