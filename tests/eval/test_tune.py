"""`tokprune tune` with the embedded model: what it saves, refuses, resumes and says."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokprune.eval
import torch
from commands import changed, jsonl, refusal, tokprune_cli
from PIL import Image
from rich.console import Console
from tokprune.eval.models import OF_VIDEOS, path_of
from tokprune.eval.run.folder import RunFolder
from tokprune.eval.run.rows import Config
from tokprune.eval.run.runner import Runner
from tokprune.eval.tasks.base import Sample
from tokprune.eval.tune import tune as tuning
from tokprune.eval.tune import validate
from tokprune.eval.tune.page import sentences
from tokprune.eval.tune.promise import Outcome
from tokprune.eval.tune.race import Finish, Rule
from tokprune.eval.tune.tune import ordered
from transformers import AutoModelForImageTextToText

import tokprune
from tokprune.core.errors import RunError, UnknownNameError
from tokprune.methods import METHODS

RESULTS = Path(tokprune.eval.__file__).parent / "results"

COLOURS = {"red": "red", "green": "lime", "blue": "blue"}


def questions(folder, n: int, labelled: bool = True):
    """Pictures of one colour, which a method with a quarter of the tokens answers as the unpruned model does."""
    lines = []
    for i in range(n):
        answer, colour = list(COLOURS.items())[i % 3]
        Image.new("RGB", (40 + i, 40), colour).save(folder / f"{i}.png")
        line = {"file_name": f"{i}.png", "question": "what color is the shape?"}
        lines.append({**line, "answer": answer} if labelled else line)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def command(folder, out, *more: str) -> list[str]:
    return [
        *("tune", "--task", str(folder), "--max-loss", "20%", "--for", "flops", "--methods", "uniform", "--keep"),
        *("0.9,0.5", "--max-new-tokens", "2", "--out", str(out), *more),
    ]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A folder of questions, a finished run on it, and what it printed."""
    folder = questions(tmp_path_factory.mktemp("own"), 24, labelled=False)
    out = tmp_path_factory.mktemp("out") / "deploy"
    return folder, out, tokprune_cli(*command(folder, out, "--agree"))


def test_what_is_promised_is_saved_and_attaches(tuned):
    _, out, done = tuned
    assert not done.returncode, done.stdout + done.stderr
    found = json.loads((out / "tune.json").read_text())
    assert found["promised"]
    assert found["test"]["bound"] <= 0.2
    assert "at most 20 %, with 95 % confidence" in done.stdout  # what was asked for, not the bound of one test
    assert f"{found['asked']} answers" in done.stdout
    page = (out / "tune.html").read_text()
    assert found["config"]["method"] in page
    assert "http" not in page.replace("http-equiv", "")
    model = AutoModelForImageTextToText.from_pretrained(path_of("tiny-llava"), dtype=torch.float32)
    with tokprune.attach(model, f"{out}/") as attachment:
        assert "uniform" in repr(attachment)


def test_a_finished_run_asks_nothing_again(tuned):
    folder, out, first = tuned
    before = (out / "run" / "samples.jsonl").read_bytes()
    done = tokprune_cli(*command(folder, out, "--agree"))
    assert (out / "run" / "samples.jsonl").read_bytes() == before
    assert first.stdout.splitlines()[0][:40] in done.stdout or not done.returncode
    # Another tolerance would test the same questions twice.
    line = refusal(tokprune_cli(*changed(command(folder, out, "--agree"), "--max-loss", "30%")))
    assert "other settings" in line
    assert "take other questions" in line


def test_a_killed_run_resumes_with_the_same_choice(tuned, tmp_path, monkeypatch):
    folder, out, _ = tuned
    add, left = RunFolder.add, [3]

    def cut_off(self, key, rows, time):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        add(self, key, rows, time)

    monkeypatch.setattr(RunFolder, "add", cut_off)
    other = tmp_path / "other"
    tokprune_cli(*command(folder, other, "--agree"))
    assert not (other / "tokprune.json").exists()
    assert 0 < len(jsonl(other / "run" / "times.jsonl")) < len(jsonl(out / "run" / "times.jsonl"))
    monkeypatch.undo()
    assert not tokprune_cli(*command(folder, other, "--agree")).returncode
    one, two = (json.loads((place / "tune.json").read_text()) for place in (out, other))
    assert (one["config"], one["tests"]) == (two["config"], two["tests"])


def test_what_too_few_questions_cannot_promise_is_refused_before_anything_is_asked(tuned, tmp_path):
    folder, out = tuned[0], tmp_path / "few"
    line = refusal(tokprune_cli(*changed(command(folder, out, "--agree"), "--max-loss", "1%")))
    assert "24 questions cannot promise a loss of at most 1 %" in line
    assert "that takes 399" in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "value"), [("--max-loss", "x"), ("--max-loss", "0"), ("--confidence", "1"), ("--for", "speed")]
)
def test_what_is_no_share_is_one_line(option, value, tuned, tmp_path):
    assert option in refusal(tokprune_cli(*changed(command(tuned[0], tmp_path / "o", "--agree"), option, value)))


def test_questions_without_answers_need_agree(tuned, tmp_path):
    assert "lacks answer" in refusal(tokprune_cli(*command(tuned[0], tmp_path / "o")))


def test_a_method_that_cannot_be_saved_is_refused(tuned, tmp_path):
    run = changed(command(tuned[0], tmp_path / "o", "--agree"), "--methods", "./mine.py:Mine")
    assert "cannot be saved" in refusal(tokprune_cli(*run))


def test_methods_about_frames_race_on_videos_only():
    about = {spec.partition(":")[0] for spec in OF_VIDEOS}
    assert not about & set(tuning.usual(of_videos=False))
    budgeted = {name for name in about if tokprune.get_method(name).takes_budget}
    assert budgeted
    assert budgeted <= set(tuning.usual(of_videos=True))


def test_methods_that_compare_frames_are_declared_to_be_about_videos():
    """Those whose module uses the helpers for frames."""
    modules = {name: sys.modules[type(tokprune.get_method(name)).__module__] for name in METHODS.own_names()}
    comparing = {name for name, module in modules.items() if "from .frames import" in inspect.getsource(module)}
    assert comparing <= {spec.partition(":")[0] for spec in OF_VIDEOS}
    assert comparing


def test_no_picture_of_the_race_is_in_the_test():
    samples = [Sample(str(i), f"{i // 3}.png", "?", "a") for i in range(300)]
    found, parts = ordered(samples, None, Rule(0.05))
    start = sum(parts.looks)
    assert start + parts.test == 300
    assert not {s.image_id for s in found[:start]} & {s.image_id for s in found[start:]}


def test_a_loaded_model_is_tuned_as_the_command_does_and_left_as_it_was(tuned, tmp_path):
    folder, out, done = tuned
    runner = Runner.load("tiny-llava")
    runner.model.train()
    runner.processor.tokenizer.padding_side = "right"
    given = dict(goal="flops", agree=True, methods=["uniform"], keep=[0.9, 0.5], max_new_tokens=2)
    found = tokprune.tune(runner.model, runner.processor, str(folder), 0.2, **given, out=tmp_path / "deploy")
    assert found.promised
    assert not dataclasses.replace(found, found=dataclasses.replace(found.found, test=None)).promised
    assert (
        json.loads((tmp_path / "deploy/tune.json").read_text())["config"]
        == json.loads((out / "tune.json").read_text())["config"]
    )
    assert all(" ".join(said.split()) in " ".join(done.stdout.split()) for said in found.sentences[:1])
    assert runner.model.training
    assert runner.processor.tokenizer.padding_side == "right"
    with tokprune.attach(runner.model.eval(), str(tmp_path / "deploy")):
        pass


def test_every_argument_of_the_python_function_arrives(tuned, tmp_path, monkeypatch):
    folder, runner = tuned[0], Runner.load("tiny-llava")
    monkeypatch.setattr(tuning.Tuning, "rounds", 1)
    given = dict(confidence=0.9, goal="memory", agree=True, methods=["uniform"], keep_tokens=[100], limit=20)
    given |= dict(suffix=" now", max_new_tokens=3, batch_size=5, out=tmp_path / "o")
    said = io.StringIO()
    found = tokprune.tune(runner.model, runner.processor, str(folder), 0.25, **given, console=Console(file=said))
    facts = json.loads((tmp_path / "o/run/run.json").read_text())
    assert list(facts["configurations"]) == ["none", "uniform@100tokens"]
    assert sum(map(len, facts["tasks"][folder.name])) == 20
    assert max(map(len, facts["tasks"][folder.name])) == 5
    assert (facts["tolerance"], facts["error"]) == (0.25, pytest.approx(0.1))
    assert (facts["goal"], facts["agree"], facts["new_tokens"]) == ("memory", True, 3)
    assert (facts["suffix"], facts["max_new_tokens"]) == (" now", 3)
    assert found.folder == tmp_path / "o"
    assert "with 90 % confidence" in repr(found)
    assert found.promised == (tmp_path / "o/tokprune.json").exists()
    tokprune.tune(runner.model, runner.processor, str(folder), 0.25, **given, console=Console(file=said))
    assert "answers are in" in said.getvalue()
    # Another question is another run.
    with pytest.raises(RunError, match="other settings"):
        tokprune.tune(runner.model, runner.processor, str(folder), 0.25, **{**given, "suffix": ""})
    tokprune.tune(runner.model, runner.processor, str(folder), 0.25, **{**given, "suffix": ""}, overwrite=True)
    with pytest.raises(UnknownNameError, match="metric"):
        tokprune.tune(runner.model, runner.processor, str(folder), 0.25, **given, metric="exakt")
    with pytest.raises(RunError, match="needs its processor"):
        tokprune.tune(runner.model, None, str(folder), 0.25, **given)


def test_the_race_decides_the_order_before_the_test_is_asked(tuned, tmp_path, monkeypatch):
    add, events = RunFolder.add, []
    monkeypatch.setattr(RunFolder, "add", lambda self, key, *more: (events.append(key), add(self, key, *more))[1])

    def in_order(names, rule, ask):
        events.append(list(names))
        return tested(names, rule, ask)

    tested = tuning.in_order
    monkeypatch.setattr(tuning, "in_order", in_order)
    monkeypatch.setattr(tuning.Tuning, "rounds", 1)
    given = dict(goal="flops", agree=True, methods=["uniform"], keep=[0.9, 0.5], max_new_tokens=2, batch_size=6)
    runner = Runner.load("tiny-llava")
    found = tokprune.tune(runner.model, runner.processor, str(tuned[0]), 0.2, **given, out=tmp_path / "o").found
    (at,) = [i for i, event in enumerate(events) if isinstance(event, list)]
    assert events[at] == found.finish.sequence
    race = {batch for _, _, batch in events[:at]}
    test = {batch for _, _, batch in events[at + 1 :]}
    assert max(race) < min(test)
    assert {config for _, config, _ in events[at + 1 :]} == {"none", *(test.config for test in found.tests)}
    passed = {test.cost: test.config for test in found.tests if test.promised}
    assert found.config.label == passed[min(passed)]
    assert {test.seen.n for test in found.tests} == {18}  # of 24: no question of the race counts again


@pytest.mark.parametrize("goal", tuning.GOALS)
def test_time_is_said_once_unless_it_decided(goal):
    """The test's times are minutes apart; those of the choice and the unpruned model in turn are the better ones."""
    saves = {"latency": 0.9, "flops": 0.4, "memory": 0.2}
    seen = tuning.Tested("uniform@0.5", Outcome(20, 1, 1), 0.2, True, 0.4)
    times = dict(first=[0.5, 0.6, 0.7], total=[0.5, 0.6, 0.7])
    found = tuning.Tuned(Finish(), [seen], Config("uniform", 0.5), seen, saves, **times)
    said = " ".join(sentences(tuning.Wanted(Rule(0.1), goal), found))
    assert "60 % of FLOPs of the prefill, 80 % of bytes of the KV cache" in said.replace("It saves ", "")
    assert ("10 % of time of an answer" in said) == (goal == "latency")
    assert "first token x 0.60" in said


TIMED = {"first", "total", "gains", "losses", "saves"}


@pytest.mark.slow
def test_two_processes_find_what_one_does(tuned, tmp_path):
    """The answers to the byte, the same race, test and configuration; times are measured anew."""
    folder, _, _ = tuned
    found = []
    for n in (1, 2):
        out = tmp_path / str(n)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)] if n > 1 else []
        run = [sys.executable, *launcher, "-m", "tokprune", *command(folder, out, "--agree", "--batch-size", "2")]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(run, env=env, capture_output=True, text=True, check=False, timeout=600)
        assert not done.returncode, done.stderr
        assert done.stdout.count("with 95 % confidence") == 1  # process 0 alone says it
        found.append(out)
    one, two = found
    assert (one / "run/samples.jsonl").read_bytes() == (two / "run/samples.jsonl").read_bytes()
    both = [json.loads((out / "tune.json").read_text()) for out in found]
    first, second = ({k: v for k, v in result.items() if k not in TIMED} for result in both)
    assert first == second
    assert both[0]["saves"]["flops"] == both[1]["saves"]["flops"]
    assert (one / "tokprune.json").read_text() == (two / "tokprune.json").read_text()
    assert all("one of 2 processes" in row["device"] for row in jsonl(two / "run/times.jsonl"))


@pytest.mark.parametrize("stored", [True, False])
def test_what_a_choice_loses_is_looked_up_and_without_differences_computed(stored, tmp_path):
    """Rows of earlier releases hold values alone; that must not read as no loss."""
    path = tmp_path / "rows.jsonl"
    source = [json.loads(x) for x in (RESULTS / "compare-tiny-qwen-findit.jsonl").read_text().splitlines()]
    differences = {x["config"]: x["difference"] for x in source if "config" in x and x["task"] == "findit"}
    names = ("difference", "difference_low", "difference_high")
    path.write_text(
        "".join(json.dumps({k: v for k, v in x.items() if stored or k not in names}) + "\n" for x in source)
    )
    rows = {row.config: row for row in validate.compared(path, "findit")}
    assert min(map(validate.loss, rows.values())) < 0.01 < 0.3 < max(map(validate.loss, rows.values()))
    for config, row in rows.items():
        assert validate.loss(row) == pytest.approx(-differences[config])
        assert (validate.interval(row) is not None) == stored
        low, high = validate.interval(row) or (validate.loss(row),) * 2
        assert low <= validate.loss(row) <= high
