"""Adding to a run: what is there stays, only what is new is asked, and the end is that of one run."""

from __future__ import annotations

import json

import pytest
from commands import jsonl, refusal, tokprune_cli
from tokprune.eval.run.plan import planned
from tokprune.eval.run.rows import Config
from tokprune.eval.tasks import Sample

from tokprune.core.errors import RunError


class Questions:
    """A task with as many questions as are asked for."""

    name = "questions"

    def __init__(self, n: int, answer: str = "a"):
        self._samples = [Sample(str(i), str(i), f"q{i}?", answer) for i in range(n)]

    def samples(self):
        return self._samples


def stored(folder, plan):
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(plan.stored()))


def ids(plan):
    return [[s.id for s in batch] for batch in plan.batches[0][1]]


def test_a_new_run_is_cut_into_batches(tmp_path):
    task = Questions(5)
    plan = planned([(task, task.samples())], [Config("none")], 2, tmp_path)
    assert ids(plan) == [["0", "1"], ["2", "3"], ["4"]]
    assert plan.questions["questions", 2] == {"4"}
    assert planned([(task, task.samples())], [Config("none")], 2, None) == plan


def test_what_is_there_comes_first_and_as_it_was(tmp_path):
    task = Questions(8)
    first = [task.samples()[i] for i in (1, 4, 6)]
    stored(tmp_path, planned([(task, first)], [Config("none"), Config("fopru", 0.5)], 2, None))
    plan = planned([(task, task.samples()[:6])], [Config("fopru", 0.5), Config("fopru", keep_tokens=9)], 2, tmp_path)
    assert ids(plan) == [["1", "4"], ["6"], ["0", "2"], ["3", "5"]]
    assert [c.label for c in plan.configs] == ["none", "fopru@0.5", "fopru@9tokens"]


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (Questions(1), "question 1 of questions is no longer there"),
        (Questions(3, "b"), "question 0 of questions has changed"),
    ],
)
def test_questions_that_changed_are_named(task, said, tmp_path):
    before = Questions(3)
    stored(tmp_path, planned([(before, before.samples())], [Config("none")], 2, None))
    with pytest.raises(RunError, match=said):
        planned([(task, task.samples())], [Config("none")], 2, tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"tasks": {"questions": 12}, "configurations": {}}, "earlier release"),
        ({"tasks": {"questions": [[]]}, "configurations": ["none"]}, "earlier release"),
        ({"tasks": {"others": [[]]}, "configurations": {}}, "holds others, too"),
        ({"tasks": {"questions": [["0"]]}, "configurations": {}}, "cannot be read"),
        ({"tasks": {}, "configurations": {"none": {"method": 3}}}, "cannot be read"),
    ],
)
def test_folders_that_cannot_be_added_to(content, said, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(content))
    task = Questions(2)
    with pytest.raises(RunError, match=said):
        planned([(task, task.samples())], [Config("none")], 2, tmp_path)


# ---- the command

RUN = ("compare", "--task", "findit", "--batch-size", "4", "--no-controls")


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A run that was added to twice, and the same in one go."""
    folder = tmp_path_factory.mktemp("runs")
    steps = (
        ["--methods", "vtc_cls", "--keep", "0.25", "--limit", "6"],
        ["--methods", "uniform", "--keep-tokens", "40", "--limit", "6"],
        ["--methods", "vtc_cls", "--keep", "0.25", "--limit", "12"],
    )
    said = []
    for step in steps:
        done = tokprune_cli(*RUN, *step, "--out", str(folder / "steps"))
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    for methods, budget in (("vtc_cls", ["--keep", "0.25"]), ("uniform", ["--keep-tokens", "40"])):
        done = tokprune_cli(*RUN, "--methods", methods, *budget, "--limit", "12", "--out", str(folder / methods))
        assert done.returncode == 0, done.stderr
    return folder, said


def test_only_what_is_new_is_asked(extended):
    _, said = extended
    assert "18 answers are in" in said[1]  # none, shuffled pictures, vtc_cls
    assert "24 answers are in" in said[2]


def test_all_configurations_have_all_questions(extended):
    folder, _ = extended
    rows = [r for r in jsonl(folder / "steps" / "rows.jsonl") if r["method"] != "question only"]
    assert [r["config"] for r in rows] == ["none", "shuffled pictures", "vtc_cls@0.25", "uniform@40tokens"]
    assert {r["n_samples"] for r in rows} == {12}
    assert {r["n_visual_after"] for r in rows if r["keep_tokens"]} == {40}


def test_answers_are_those_of_one_run(extended):
    folder, _ = extended

    def answers(name):
        return {(r["config"], r["sample"]): r["answer"] for r in jsonl(folder / name / "samples.jsonl")}

    steps = answers("steps")
    for method in ("vtc_cls", "uniform"):
        alone = {key: said for key, said in answers(method).items() if key[0] != "shuffled pictures"}
        assert alone.items() <= steps.items()


def test_without_a_baseline_nothing_is_compared_with_it(tmp_path):
    run = [*RUN, "--methods", "uniform", "--keep", "0.5", "--limit", "4", "--no-baseline", "--out", str(tmp_path / "a")]
    done = tokprune_cli(*run)
    assert done.returncode == 0, done.stderr
    assert {r["method"] for r in jsonl(tmp_path / "a" / "rows.jsonl")} == {"question only", "uniform"}


@pytest.mark.parametrize(("given", "said"), [("half", "--keep-tokens 192,128,64"), ("0", "at least 1")])
def test_numbers_of_tokens_are_checked(given, said, tmp_path):
    line = refusal(tokprune_cli(*RUN, "--keep-tokens", given, "--out", str(tmp_path / "a")))
    assert said in line


# ---- where and how a model runs


@pytest.mark.parametrize(("option", "value"), [("--dtype", "bfloat16"), ("--attn", "eager"), ("--device", "cpu")])
def test_how_a_model_runs_is_an_option(option, value, tmp_path):
    run = [*RUN, "--methods", "uniform", "--keep", "0.5", "--limit", "2", "--out", str(tmp_path / "a"), option, value]
    done = tokprune_cli(*run)
    assert done.returncode == 0, done.stderr
    row = jsonl(tmp_path / "a" / "rows.jsonl")[-1]
    assert value in (row["dtype"], row["attn_implementation"], row["device"].split()[1].rstrip(","))


def test_a_device_that_is_not_there_is_one_line(tmp_path):
    assert "use cpu" in refusal(tokprune_cli(*RUN, "--device", "toaster", "--out", str(tmp_path / "a")))
    assert "use lmms-eval" in refusal(tokprune_cli(*RUN, "--suite", "vlmeval", "--out", str(tmp_path / "a")))
