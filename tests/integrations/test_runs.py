"""lmms-eval as its own process and its own evaluator: runs that fail, several processes, kinds of tasks."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from commands import jsonl, tokprune_cli
from folders import write_model
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_requests import MODEL, asked, lmms_eval
from tokprune.eval.run.rows import Config
from tokprune.eval.suites import lmms
from tokprune.eval.suites import scores as lmms_scores
from tokprune.eval.suites.export import export
from tokprune.eval.tasks import load_task

from tokprune.core.errors import RunError


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--model", "/no/such/model"), 1, "cannot load pretrained=/no/such/model"),
        (("--tasks", "no_such_task"), 0, "Tasks not found: no_such_task"),  # lmms-eval ends with 0 all the same
    ],
)
def test_a_run_that_fails_is_one_clear_error(tmp_path, arguments, status, message):
    done = tokprune_cli(*asked(tmp_path, *arguments, methods="none"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"tokprune: lmms-eval did not finish none (it ended with {status}): ")
    assert message in line
    assert str(tmp_path / "lmms-eval") in line
    assert not (tmp_path / "rows.jsonl").exists()


def test_code_of_a_model_is_never_run(tmp_path):
    """lmms-eval is a process of its own, which reads what is typed."""
    model = write_model(tmp_path / "foreign", ["config.json", "processor_config.json"], model_type="mine")
    command = [sys.executable, "-m", "tokprune.cli", *asked(tmp_path / "out", "--model", str(model), methods="none")]
    done = subprocess.run(command, input="y\n" * 100, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    assert "remote code, which tokprune never runs" in done.stderr
    assert not (model / "marker").exists()


def test_wrong_options_end_before_a_run(tmp_path):
    for arguments, message in (
        (("--suite", "vlmevalkit"), "use lmms-eval"),
        (("--methods", "vtc"), "Did you mean 'vtc_cls'"),
        (("--methods", "downsample"), "leave it out"),
        (("--limit", "0"), "whole number of at least 1"),
        (("--tasks", "findit,findit"), "named alike"),
        (("--include-path", str(tmp_path)), "beside tasks that tokprune writes"),
        (("--tasks", "pope", "--include-path", "/no/such"), "is no folder"),
    ):
        done = tokprune_cli(*asked(tmp_path, *arguments))
        assert done.returncode == 2
        assert message in done.stderr
    assert not (tmp_path / "lmms-eval").exists()


# ---- two processes


def test_two_processes_share_the_documents(findit, tmp_path, load):
    """Every document once, by two ranks, with the answers of one process."""
    name = export(*findit, tmp_path / "tasks")
    drawn = {"method": "random:seed=1", "keep_ratio": "0.25"}
    arguments = ",".join(f"{key}={value}" for key, value in {"pretrained": MODEL, **drawn}.items())
    done = lmms_eval(
        *("--model_args", f"{arguments},record={tmp_path / 'record.jsonl'}", "--batch_size", "5", "--log_samples"),
        *("--tasks", name, "--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out")),
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
    )
    assert done.returncode == 0, done.stderr
    ranks = [jsonl(path) for path in sorted(tmp_path.glob("record.rank*.jsonl"))]
    n = len(findit[1])
    assert [len(rank) for rank in ranks] == [n // 2, n // 2]
    assert {line["world_size"] for rank in ranks for line in rank} == {2}
    assert sorted(line["doc_id"] for rank in ranks for line in rank) == list(range(n))
    (result,) = lmms_scores.read(tmp_path)
    manager = TaskManager("ERROR", include_path=str(tmp_path / "tasks"))
    alone = simple_evaluate(model=load(batch_size=8, **drawn), tasks=[name], task_manager=manager, bootstrap_iters=0)
    answers = {s["doc_id"]: s["filtered_resps"][0] for s in alone["samples"][name]}
    assert {doc: answer for doc, (_, answer) in result.answers.items()} == answers
    assert result.scores["exact_match"].value == alone["results"][name]["exact_match,none"]


# ---- tasks


def test_an_exported_folder_is_answered_like_the_folder(folder, tmp_path, load, runner):
    """Pictures of several sizes, through parquet and back."""
    task = load_task(str(folder))
    name = export(task, task.samples(), tmp_path / "tasks")
    lm = load(batch_size=2)
    found = simple_evaluate(
        model=lm,
        tasks=[name],
        task_manager=TaskManager("ERROR", include_path=str(tmp_path / "tasks")),
        bootstrap_iters=0,
    )
    own = [r for _, rows, _ in runner.run(task, task.samples(), [Config("none")]) for r in rows]
    assert [s["filtered_resps"] for s in found["samples"][name]] == [[r.answer] for r in own]
    assert found["results"][name]["exact_match,none"] == sum(r.right for r in own) / len(own)


def test_exported_questions_are_graded_by_their_metrics(folder, tmp_path, load, runner):
    """Expected answers are made of what the model says, so that none of the values is 0 for all."""
    task = load_task(str(folder))
    said = [r.answer for _, rows, _ in runner.run(task, task.samples(), [Config("none")]) for r in rows]
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines() if line]
    lines[0] |= {"answer": [said[0]] * 3 + ["other"] * 7, "metric": "vqa"}
    lines[1] |= {"answer": f"{said[1]}x", "metric": "anls"}
    lines[2] |= {"answer": f"the {said[2]}", "metric": "normalized"}
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = load_task(str(folder))
    name = export(task, task.samples(), tmp_path / "tasks")
    found = simple_evaluate(
        model=load(batch_size=2),
        tasks=[name],
        task_manager=TaskManager("ERROR", include_path=str(tmp_path / "tasks")),
        bootstrap_iters=0,
    )
    by_hand = 0.9, 1 - 1 / (len(said[1]) + 1), 1
    assert found["results"][name]["score,none"] == pytest.approx(sum(by_hand) / 3)


CHOICES = """\
task: choices
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {parquet}
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_choice: !function utils.choices
doc_to_target: !function utils.target
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
CHOICES_UTILS = """
def visual(doc):
    return [doc["image"]]

def choices(doc):
    return ["cross cross ring", doc["answer"], "how many"]

def target(doc):
    return 1
"""


def test_multiple_choice_takes_the_likeliest_answer(findit, tmp_path, load):
    """Through lmms-eval's own evaluator, which takes the least of what `loglikelihood` returns."""
    task, samples = findit
    name = export(task, samples[:6], tmp_path)
    (tmp_path / name / f"{name}.yaml").write_text(CHOICES.format(parquet=tmp_path / name / "test.parquet"))
    (tmp_path / name / "utils.py").write_text(CHOICES_UTILS)
    lm = load(method="vtc_cls", keep_ratio="0.5", record=str(tmp_path / "record.jsonl"))
    manager = TaskManager("ERROR", include_path=str(tmp_path))
    found = simple_evaluate(model=lm, tasks=["choices"], task_manager=manager, bootstrap_iters=0)
    assert found["results"]["choices"]["acc,none"] == 1
    assert found["results"]["choices"]["exact_match,none"] > 0.8
    recorded = jsonl(tmp_path / "record.jsonl")
    assert len(recorded) == 6 * 3
    for doc in range(6):
        losses = {r["answer"]: r["loss"] for r in recorded if r["doc_id"] == doc}
        assert min(losses, key=losses.get) == samples[doc].answer


# ---- what the environment lacks


def test_a_checkout_that_is_not_installed_is_no_plug_in(monkeypatch):
    monkeypatch.setattr(lmms, "entry_points", lambda group: SimpleNamespace(names=set()))
    with pytest.raises(RunError, match=r"type pip install -e \. in it"):
        lmms.check_installed()
