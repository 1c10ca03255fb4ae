"""Comparisons, drawings and benchmarks from Python; the command is a skin over them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
from commands import jsonl, refusal, tokprune_cli
from PIL import Image
from tokprune.eval.report.latex import escaped, latex_table
from tokprune.eval.run.runner import Runner
from tokprune.eval.tasks import Sample

import tokprune
from tokprune.core.errors import RunError, TokPruneError

ASKED = dict(task="findit", methods=["vtc_cls", "uniform"], keep=[0.25], limit=12, controls=False)
TYPED = ["--task", "findit", "--methods", "vtc_cls,uniform", "--keep", "0.25", "--limit", "12", "--no-controls"]


@pytest.fixture(scope="module")
def compared():
    return tokprune.compare("tiny-llava", **ASKED)


def test_a_comparison_is_that_of_the_command(compared, tmp_path):
    run = ["compare", *TYPED]
    done = tokprune_cli(*run, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    rows = [r for r in jsonl(tmp_path / "run" / "rows.jsonl") if r["method"] != "question only"]
    assert [(r["config"], r["value"]) for r in rows] == [(r.config, r.value) for r in compared.rows]


def test_a_loaded_model_is_left_as_it_was(compared):
    runner = Runner.load("tiny-llava")
    runner.processor.tokenizer.padding_side = "right"
    runner.model.train()
    done = tokprune.compare(runner.model, runner.processor, **ASKED)
    assert [r.value for r in done.rows] == [r.value for r in compared.rows]
    assert runner.processor.tokenizer.padding_side == "right"
    assert runner.model.training
    with pytest.raises(RunError, match="processor"):
        tokprune.compare(runner.model, **ASKED)


def test_a_task_object_will_do():
    class Colours:
        name = "colours"

        def samples(self):
            return [Sample("1", "red", "what color is the circle?", "red")]

        def image(self, image_id):
            return Image.new("RGB", (96, 96), image_id)

        def train_samples(self):
            return None

    asked = dict(methods=["uniform"], keep_tokens=[9], baseline=False, controls=False)
    done = tokprune.compare("tiny-llava", task=Colours(), **asked)
    assert [(r.task, r.method, r.n_visual_after) for r in done.rows] == [("colours", "uniform", 9)]


def test_a_comparison_as_a_data_frame(compared):
    frame = compared.to_pandas()
    assert isinstance(frame, pd.DataFrame)
    assert list(frame["method"]) == ["question only", "none", "shuffled pictures", "vtc_cls", "uniform"]
    assert frame.loc[frame["method"] == "vtc_cls", "n_visual_after"].item() == 36
    answers = compared.answers()
    assert len(answers) == 4 * 12
    assert {"sample", "config", "expected", "answer", "right"} <= set(answers)


def test_a_comparison_as_text(compared):
    head, *rows = repr(compared).splitlines()
    assert head == "ComparisonResult(4 rows, findit)"
    assert repr(replace(compared, _kept=None)).startswith(f"ComparisonResult(4 rows, findit, '{compared.folder}')")
    assert len(rows) == 4
    assert rows[2].startswith("  Row(findit, vtc_cls@0.25: exact_match ")
    assert rows[2].endswith("144 -> 36 visual tokens)")
    assert "| vtc_cls " in compared.to_markdown()
    assert "\\" not in compared.to_markdown()
    assert compared.to_csv().startswith("model,")
    html = compared._repr_html_()
    assert html.count("<tr>") == 6
    assert "vtc_cls" in html


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.removesuffix(r"\\").split("&")]


def test_a_comparison_as_latex(compared):
    lines = compared.to_latex().splitlines()
    (columns,) = re.findall(r"\\begin\{tabular\}\{(\w+)\}", lines[1])
    table = [cells(line) for line in lines if line.endswith(r"\\")]
    assert {len(line) for line in table} == {len(columns)}
    assert [line[0] for line in table[1:]] == ["question only", "shuffled pictures", "none", r"vtc\_cls", "uniform"]
    assert lines.count(r"\midrule") == 2
    highest = max(r.value for r in compared.rows if r.keep_ratio)
    best = {escaped(r.method) for r in compared.rows if r.keep_ratio and r.value == highest}
    assert {line[0] for line in table if "textbf" in line[2]} == best
    marked = {line[0] for line in table if line[3].endswith(r"{\circ}$")}
    assert marked == {escaped(r.method) for r in compared.rows if r.difference is not None and r.is_noise}
    assert (lines[2], lines[-2], lines[-1]) == (r"\toprule", r"\bottomrule", r"\end{tabular}")


def test_a_tie_is_bold_twice(compared):
    """Two methods that answer alike are both the best of their budget."""
    rows = [r for r in compared.rows if r.method != "none" and r.keep_ratio]
    tied = [replace(r, value=0.5) for r in rows]
    assert latex_table(tied, {}).count(r"\textbf") == len(rows) > 1


def test_latex_names_are_escaped():
    assert escaped("a_b & 5 % {x}") == r"a\_b \& 5 \% \{x\}"


@pytest.mark.parametrize(("form", "begins"), [("latex", "% findit"), ("markdown", "**findit**"), ("csv", "model,")])
def test_the_command_prints_one_form_alone(form, begins, compared, tmp_path):
    run = ["compare", *TYPED]
    done = tokprune_cli(*run, "--out", str(compared.folder), "--format", form)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(begins)
    if form == "latex":
        assert done.stdout == latex_table(compared.rows, compared.floors)
    again = tokprune_cli("report", str(compared.folder), "--format", form)
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert "use latex, markdown or csv" in refusal(tokprune_cli(*run, "--out", str(tmp_path), "--format", "xml"))


def test_a_figure_has_an_axis_a_cost(compared):
    figure = compared.figure()
    assert figure is not None
    assert len(figure.axes) >= 2
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_drawing_shows_itself():
    drawn = tokprune.explain("tiny-llava", picture=Image.open("docs/scene.png"), methods=["vtc_cls", "pool"])
    assert drawn._repr_png_().startswith(b"\x89PNG")
    assert [len(line) < 100 for line in repr(drawn).splitlines()] == [True] * 3
    assert "vtc_cls 0.25, 144 -> 36" in repr(drawn)
    assert len(drawn.shown) == 2
    with pytest.raises(TokPruneError, match="picture="):
        tokprune.explain("tiny-llava")


def test_a_drawing_of_several_ratios_is_that_of_the_command(tmp_path):
    methods, keep, question = ["vtc_cls", "visual_exit"], [0.5, 0.25, 0.5], "what color is the circle?"
    with Image.open("docs/scene.png") as scene:
        drawn = tokprune.explain("tiny-llava", None, scene, question, methods, keep, scores=True)
    assert [one.name for one in drawn.shown] == ["vtc_cls 0.5", "vtc_cls 0.25", "visual_exit"]
    assert [len(one.scores) for one in drawn.shown] == [144, 144, 0]
    run = ["explain", "docs/scene.png", "--method", "vtc_cls", "--keep", "0.5,0.25", "--scores", "--question", question]
    done = tokprune_cli(*run, "--json", str(tmp_path / "kept.json"))
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "kept.json").read_text())
    assert written["methods"] == [one.to_dict() for one in drawn.shown[:2]]
    assert written["answer"] == drawn.answer
    for wrong, said in (([0.5, 1.5], "1.5"), ([], "nothing to draw")):
        with pytest.raises(TokPruneError, match=said):
            tokprune.explain("tiny-llava", picture=Image.new("RGB", (96, 96)), methods=["uniform"], keep=wrong)


def test_a_benchmark_is_a_table():
    measured = tokprune.bench(model="tiny-llava", methods=["uniform"], rounds=1, warmup=0, new_tokens=[2], n_text=8)
    assert list(measured.to_pandas()["method"]) == ["none", "uniform"]
    assert "uniform" in measured.to_markdown()
    assert measured.to_latex().count("uniform") == 1
    assert repr(measured) == "BenchmarkResult(2 rows, tiny-llava)"


def test_without_its_packages_the_door_says_what_to_install():
    code = "import sys; sys.modules['pandas'] = None\nimport tokprune\ntokprune.compare"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'tokprune[eval]'" in done.stderr.splitlines()[-1]
