"""Schedule files, and the search for them; with the embedded model where it matters."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import optuna
import pytest
import torch
from commands import changed, refusal, tokprune_cli
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from PIL import Image
from tokprune.eval.run.runner import EMBEDDED_MODEL, Runner
from tokprune.eval.search import algorithms as schedules
from tokprune.eval.search.search import Wanted, calibration_task
from tokprune.eval.search.trials import NAME, Point, Trials, key_of, opened
from tokprune.eval.tasks.findit import FindIt

import tokprune
from tokprune.core.errors import OptionError, RunError
from tokprune.core.schedules import ScheduleFile, read_schedule, write_schedule
from tokprune.core.signals import Decoder

N, LAYERS = 144, 8
DECODER = Decoder(LAYERS, 160, "abc")


@pytest.fixture(scope="module")
def runner():
    return Runner.load(str(EMBEDDED_MODEL))


@pytest.fixture(scope="module")
def fingerprint(runner):
    with tokprune.attach(runner.model, "uniform", keep_ratio=1) as attachment:
        return attachment._family.decoder.fingerprint


# ---- the searches, on functions whose optimum is known


class Fake:
    """Accuracy as a function of the schedule; remembers what it was asked."""

    def __init__(self, accuracy):
        self.accuracy, self.asked = accuracy, []

    def __call__(self, counts, trial=None) -> Point:
        self.asked.append(dict(counts))
        assert list(counts.values()) == sorted(counts.values(), reverse=True), "tokens came back"
        point = Point(key_of(counts), round(1000 * self.accuracy(by_layer(counts))), 1000, ())
        if trial is not None:
            trial.study.tell(trial, point.accuracy)
        return point


def sigmoid_of(fake: Fake, budget: float, trials: int, study=None):
    study = study or optuna.create_study(direction="maximize")
    return schedules.p_sigmoid(fake, study, DECODER, N, budget, trials, seed=0)


def by_layer(counts) -> list[int]:
    left, found = N, []
    for layer in range(LAYERS):
        left = counts.get(layer, left)
        found.append(left)
    return found


def test_best_single_cut_has_the_fewest_tokens_over_all_layers():
    """Layer 1 needs 100 tokens, layer 2 needs 20, later ones 15."""
    fake = Fake(lambda n: 0.9 if n[1] >= 100 and n[2] >= 20 and min(n) >= 15 else 0.5)
    assert schedules.best_single(fake, LAYERS, N, 0.01, 9) == {2: 20}
    assert all(len(counts) <= 1 for counts in fake.asked)
    assert schedules.best_single(Fake(lambda n: 0.9 if min(n) == N else 0.5), LAYERS, N, 0.01, 9) == {}
    assert sum(schedules.g_search(fake, LAYERS, N, 0.01, 9).values()) > 0


def test_single_is_the_control_of_tolerance():
    with pytest.raises(RunError, match="--tolerance 0.01 --single"):
        Wanted(budget=0.25, single=True)


@pytest.mark.parametrize("needed", [[144, 100, 41, 41, 7, 1, 0, 0], [144] * 8, [144, 0, 0, 0, 0, 0, 0, 0]], ids=str)
def test_g_search_finds_the_fewest_that_hold(needed):
    def accuracy(left):
        return 0.9 if all(n >= need for n, need in zip(left, needed, strict=True)) else 0.5

    fake = Fake(accuracy)
    assert by_layer(schedules.g_search(fake, LAYERS, N, 0.01, evaluations=20)) == needed
    assert max(len(counts) for counts in fake.asked) <= LAYERS - 1
    few = Fake(accuracy)
    found = by_layer(schedules.g_search(few, LAYERS, N, 0.01, evaluations=4))
    assert accuracy(found) == 0.9
    assert len({key_of(counts) for counts in few.asked}) <= 1 + 4 * (LAYERS - 1)


def test_g_search_spends_the_tolerance_and_no_more():
    fake = Fake(lambda left: 0.5 + 0.4 * left[1] / N)  # every token of layer 1 is worth something
    (n, *_) = schedules.g_search(fake, LAYERS, N, 0.1, evaluations=20).values()
    assert 0.4 * (N - n) / N <= 0.1 + 0.0005 < 0.4 * (N - n + 1) / N + 0.001


@pytest.mark.parametrize(("steepness", "middle"), [(0.25, 0.0), (1.0, 1.5), (32.0, 2.5), (3.0, 3.0)])
@pytest.mark.parametrize("budget", [0.45, 0.7])
def test_sigmoid_has_the_mean_of_the_budget(steepness, middle, budget):
    ratios = schedules.sigmoid_ratios(budget, LAYERS, steepness, middle)
    assert mean(ratios) == pytest.approx(budget, abs=1e-12)
    assert ratios[0] == 1
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] >= 0
    counts = schedules.counts_of(ratios, N)
    assert abs(mean(by_layer(counts)) - budget * N) <= 0.5
    lo = (ratios[-1] - 1) / (1 - (s := 1 / (1 + math.exp(steepness * (7 - middle))))) + 1
    assert ratios[1] == pytest.approx(lo + (1 - lo) / (1 + math.exp(steepness * (1 - middle))))
    assert 0 <= s < 1


def test_sigmoid_out_of_reach_is_none():
    assert schedules.sigmoid_ratios(0.3, LAYERS, 32.0, 6.0) is None
    with pytest.raises(RunError, match=r"the first layer keeps all tokens; type --budget 0\.25"):
        sigmoid_of(Fake(lambda left: 0.0), 0.1, trials=2)


def test_p_sigmoid_begins_with_one_cut_and_finds_better():
    fake = Fake(lambda left: 0.9 - abs(left[2] - 120) / 200)
    counts, parameters = sigmoid_of(fake, 0.5, trials=30)
    assert fake.asked[0] == {1: 62}  # (0.5 * 8 - 1) / 7 of 144
    assert len(fake.asked) == 30
    assert abs(by_layer(counts)[2] - 120) < 10
    assert set(parameters) == {"steepness", "middle"}
    again = Fake(fake.accuracy)
    study = optuna.create_study(direction="maximize")
    sigmoid_of(again, 0.5, 13, study)  # resumes in the same study
    assert sigmoid_of(again, 0.5, 30, study) == (counts, parameters)
    assert again.asked == fake.asked
    assert sigmoid_of(again, 0.5, 30, study) == (counts, parameters)
    assert len(again.asked) == 30


# ---- files


def written(path, **changes):
    values = {"score": "fastv", "layers": {2: 0.5, 5: 0.25}, "n_layers": 8, "fingerprint": "abc", "found": {"seed": 0}}
    write_schedule(path, ScheduleFile(**{**values, **changes}))
    return path


def test_file_is_read_as_written(tmp_path):
    path = written(tmp_path / "a.json")
    assert read_schedule(path) == ScheduleFile("fastv", {2: 0.5, 5: 0.25}, 8, "abc", {"seed": 0})
    assert os.listdir(tmp_path) == ["a.json"]


def spoilt(**changes):
    good = {
        "format": "tokprune-schedule",
        "version": 1,
        "score": "fastv",
        "layers": {"2": 0.5},
        "n_layers": 8,
        "fingerprint": "abc",
        "found": {},
    }
    return json.dumps({**good, **changes})


BAD_FILES = {
    "truncated": (spoilt()[:60], "is not a schedule: "),
    "empty": ("", "is not a schedule: "),
    "not UTF-8": (b"\xff\xfe\xff", "is not a schedule: "),
    "a list": ("[1, 2]", "format 'tokprune-schedule'"),
    "a deep list": ("[" * 100_000, "is not a schedule: "),
    "another format": (spoilt(format="safetensors"), "format 'tokprune-schedule'"),
    "a newer version": (spoilt(version=2), "its format is 2"),
    "rising": (spoilt(layers={"2": 0.25, "5": 0.5}), "rise with the layer"),
    "no layers": (spoilt(layers={}), "'layers' is not an object"),
    "layers as a list": (spoilt(layers=[0.5]), "'layers' is not an object"),
    "a layer that is no number": (spoilt(layers={"two": 0.5}), "'layers' is not an object"),
    "a layer twice": (spoilt(layers={"2": 0.5, "02": 0.5}), "a layer twice"),
    "layer 0": (spoilt(layers={"0": 0.5}), "'0', which is not a layer from 1 to 7"),
    "a layer too deep": (spoilt(layers={"8": 0.5}), "'8', which is not a layer from 1 to 7"),
    "a huge layer": (spoilt(layers={"9" * 5000: 0.5}), "'layers' is not an object"),
    "a huge ratio": (spoilt(layers={"2": 1e300}), "not a number from 0 to 1"),
    "a huge whole number": (spoilt().replace("0.5", "9" * 6000), "is not a schedule: "),
    "an infinite ratio": (spoilt().replace("0.5", "1e999"), "not a number from 0 to 1"),
    "no number": (spoilt().replace("0.5", "NaN"), "not a number from 0 to 1"),
    "a negative ratio": (spoilt(layers={"2": -0.5}), "not a number from 0 to 1"),
    "a truth value": (spoilt(layers={"2": True}), "not a number from 0 to 1"),
    "a huge depth": (spoilt(n_layers=10**30), "'n_layers' is not a whole number"),
    "a depth that is text": (spoilt(n_layers="8"), "'n_layers' is not a whole number"),
    "no score": (spoilt(score=None), "'score' is not text"),
    "no fingerprint": (spoilt(fingerprint=""), "'fingerprint' is not text"),
    "found as text": (spoilt(found="there"), "'found' is not an object"),
    "an unknown score": (spoilt(score="fastw"), "Did you mean 'fastv'"),
    "a score before the language model": (spoilt(score="vtc_cls"), "use a method between decoder layers"),
    "a score with a schedule": (spoilt(score="fastv:schedule=cosine"), "without a schedule"),
    "a score that is itself": (spoilt(score="schedule:file=x.json"), "use a method between decoder layers"),
    "an exit": (spoilt(score="visual_exit:layer=2"), "use a method between decoder layers"),
    "a score with a layer": (spoilt(score="fastv:layer=2"), "both say where to cut"),
    "too large": (spoilt(found={"x": "y" * 2**22}), "at most 4194304 bytes"),
    "another model": (spoilt(), "was found for a language model of 8 layers"),
    "another depth": (spoilt(n_layers=32), "was found for a language model of 32 layers"),
    "missing": (None, "there is no such file"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_file_is_one_clear_error(what, runner, fingerprint, tmp_path):
    text, message = BAD_FILES[what]
    path = tmp_path / "a.json"
    if text is not None:
        text = text if isinstance(text, bytes) else text.encode()
        path.write_bytes(text if what == "another model" else text.replace(b'"abc"', f'"{fingerprint}"'.encode()))
    with pytest.raises(OptionError, match="(?s)" + message.replace("(", r"\(")) as raised:
        tokprune.attach(runner.model, f"schedule:file={path}")
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 900
    assert not runner.model._forward_pre_hooks


def test_schedule_without_a_file_says_what_to_type(runner, tmp_path):
    with pytest.raises(OptionError, match=r"schedule:file=schedule\.json; make one with: tokprune search"):
        tokprune.attach(runner.model, "schedule")
    with pytest.raises(OptionError, match="not a file"):
        tokprune.attach(runner.model, f"schedule:file={tmp_path}")
    for option in ("schedule=cosine", "uniform=0.5"):
        with pytest.raises(OptionError, match="takes only file"):
            tokprune.get_method(f"schedule:file=a.json:{option}")
    with pytest.raises(tokprune.TokPruneError, match="takes no budget"):
        tokprune.attach(runner.model, "schedule:file=a.json", keep_ratio=0.5)
    assert tokprune.get_method("schedule").source


SCORES = ["fastv", "fastv:uniform=0.5", "pyramiddrop", "sparsevlm", "sparsevlm:faithful=true"]


@pytest.mark.parametrize(
    ("score", "before"), [*((s, b) for s in SCORES for b in ("", "vtc_cls+")), ("fastv", "sink_filter+")]
)
def test_file_prunes_what_it_says_to_nothing_at_the_end(score, before, runner, fingerprint, tmp_path):
    layers = {2: 72 / N, 4: 9 / N, 6: 0.0}
    path = written(tmp_path / "a.json", score=score, layers=layers, fingerprint=fingerprint)
    task = FindIt("validation", 3)
    samples = task.samples()[:3]
    inputs = runner.prepare(task, samples, [s.image_id for s in samples])
    budget = {"keep_ratio": 0.75} if before == "vtc_cls+" else {}
    n = 108 if budget else N
    with tokprune.attach(runner.model, f"{before}schedule:file={path}", **budget) as attachment:
        out = runner.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        report = attachment.report
    left = [n, n, n // 2, n // 2, round(n * 9 / N + 0.01), round(n * 9 / N + 0.01), 0, 0]
    if score != "sparsevlm:faithful=true":
        assert [image.n_by_layer(LAYERS) for image in report.encoded] == [left] * 3
    assert [image.n_by_layer(LAYERS)[-2:] for image in report.encoded] == [[0, 0]] * 3
    assert "schedule:file" in str(report)
    if score == "fastv" and not before:
        spec = "fastv:schedule=layers/" + "/".join(f"{layer}x{ratio!r}" for layer, ratio in layers.items())
        with tokprune.attach(runner.model, spec) as attachment:
            assert torch.equal(out, runner.model.generate(**inputs, max_new_tokens=3, do_sample=False))
        assert not tokprune.get_method(f"schedule:file={path}").takes_budget


# ---- the command

SEARCH = ["search", "--samples", "6", "--batch-size", "4", "--trials", "2"]
KINDS = {"g-search": ["--tolerance", "0.2"], "p-sigmoid": ["--budget", "0.4", "--trials", "3"]}


@pytest.fixture
def answered(monkeypatch):
    """Methods that were answered with, in turn."""
    asked, answer = [], Runner.answer

    def counted(self, inputs, config, salts):
        asked.append((config.method, tuple(salts)))
        return answer(self, inputs, config, salts)

    monkeypatch.setattr(Runner, "answer", counted)
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_search_end_to_end_and_after_a_kill(kind, tmp_path, monkeypatch, answered):
    monkeypatch.chdir(tmp_path)
    pictures, image = [], FindIt.image
    monkeypatch.setattr(FindIt, "image", lambda self, i: pictures.append(i) or image(self, i))
    done = tokprune_cli(*changed(SEARCH, *KINDS[kind]), "--out", "whole.json")
    assert done.returncode == 0, done.stderr
    assert pictures
    assert all(i.startswith("validation-") for i in pictures)
    assert len(answered) == len(set(answered))
    whole, evaluated = json.loads((tmp_path / "whole.json").read_text()), points("whole.json")
    assert len(answered) == 2 * len(evaluated)  # two batches a schedule
    assert f"{len(evaluated)} schedules were evaluated" in done.stdout
    assert whole["found"]["search"] == kind
    assert len(whole["found"]["samples"]) == whole["found"]["n_samples"] == 6
    assert 'tokprune.attach(model, "schedule:file=whole.json")' in done.stdout
    assert "questions that are not test questions" in done.stdout

    # Killed in the middle of a line, at several places, while Optuna held its own lock.
    lines = (tmp_path / "whole.json.trials.jsonl").read_text().splitlines(keepends=True)
    for n in (3, len(lines) // 2 + 1, len(lines) - 1):
        cut = tmp_path / f"cut{n}.json.trials.jsonl"
        cut.write_text("".join(lines[:n]) + lines[n][:20])
        (tmp_path / f"{cut.name}.lock").write_text("")
        known, before = points(f"cut{n}.json", whole=n), len(answered)
        done = tokprune_cli(*changed(SEARCH, *KINDS[kind]), "--out", f"cut{n}.json")
        assert done.returncode == 0, done.stderr
        assert f"{len(known)} schedules in cut{n}.json.trials.jsonl are evaluated already" in done.stdout
        assert len(answered) - before == 2 * (len(evaluated) - len(known))
        assert points(f"cut{n}.json") == evaluated
        assert json.loads((tmp_path / f"cut{n}.json").read_text()) == whole

    before = len(answered)
    assert tokprune_cli(*changed(SEARCH, *KINDS[kind]), "--out", "whole.json").returncode == 0
    assert len(answered) == before
    assert json.loads((tmp_path / "whole.json").read_text()) == whole


def points(out, whole=None) -> dict[str, Point]:
    """What Optuna reads in a journal, or in the whole lines at its beginning."""
    path = Path(f"{out}.trials.jsonl")
    if whole is not None:
        begun = path.with_suffix(".begun")
        begun.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:whole]))
        path = begun
    study = optuna.load_study(study_name=NAME, storage=JournalStorage(JournalFileBackend(str(path))))
    return Trials(study, path).points


@pytest.mark.slow
def test_search_killed_goes_on(tmp_path, answered):
    run, path = [*changed(SEARCH, "--tolerance", "0.1", "--trials", "4"), "--out"], tmp_path / "a.json.trials.jsonl"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "tokprune.cli", *run, str(tmp_path / "a.json")]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 5):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "a.json").exists()
    there = len(points(tmp_path / "a.json", whole=path.read_bytes().count(b"\n")))
    assert there
    done = tokprune_cli(*run, str(tmp_path / "a.json"))
    assert done.returncode == 0, done.stderr
    assert len(answered) == 2 * (len(points(tmp_path / "a.json")) - there)
    assert tokprune_cli(*run, str(tmp_path / "b.json")).returncode == 0
    assert points(tmp_path / "a.json") == points(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()


def test_found_file_prunes_exactly_what_was_measured(tmp_path, runner):
    out = tmp_path / "a.json"
    assert tokprune_cli(*SEARCH, "--tolerance", "0.2", "--out", str(out)).returncode == 0
    found = read_schedule(out).found
    task = FindIt("validation")
    samples = [s for s in task.samples() if s.id in found["samples"]]
    assert len(samples) == 6
    inputs = runner.prepare(task, samples, [s.image_id for s in samples])
    with tokprune.attach(runner.model, f"schedule:file={out}") as attachment:
        tokens = runner.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        left = [image.n_by_layer(LAYERS) for image in attachment.report.encoded]
    assert left == [[int(n) for n in found["tokens"]]] * 6
    assert left[0][-1] < N
    texts = runner.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert mean(t.strip() == s.answer for t, s in zip(texts, samples, strict=True)) == found["value"]


BAD_SEARCHES = {
    "neither": (["--seed", "1"], "type --tolerance 0.01"),
    "both": (["--tolerance", "0.1", "--budget", "0.5"], "not both"),
    "tolerance": (["--tolerance", "1"], "type --tolerance 0.01"),
    "budget": (["--budget", "25"], "--budget 0.25"),
    "not a number": (["--tolerance", "nan"], "type --tolerance 0.01"),
    "samples": (["--tolerance", "0.1", "--samples", "0"], "at least 1"),
    "score": (["--tolerance", "0.1", "--score", "fastw"], "Did you mean 'fastv'"),
    "a score before the model": (["--tolerance", "0.1", "--score", "vtc_cls"], "type --score fastv"),
    "a score with a schedule": (["--tolerance", "0.1", "--score", "fastv:schedule=cosine"], "type --score fastv"),
    "a list": (["--tolerance", "0.1", "--score", "vtc_cls+fastv"], "type --score fastv"),
    "a filter before it": (["--tolerance", "0.1", "--score", "sink_filter+fastv"], "type --score fastv"),
    "a colon": (["--tolerance", "0.1", "--out", "a:b.json"], "without one"),
    "a place": (["--tolerance", "0.1", "--samples", "1", "--out", "/proc/no/a.json"], "name another with --out"),
    "too little": (["--budget", "0.1", "--samples", "1", "--out", "OUT"], "type --budget 0.25"),
}


@pytest.mark.parametrize("what", BAD_SEARCHES)
def test_search_answers_bad_input_in_one_line(what, tmp_path):
    arguments, fix = BAD_SEARCHES[what]
    arguments = [str(tmp_path / "a.json") if a == "OUT" else a for a in arguments]
    assert fix in refusal(tokprune_cli("search", *arguments))


def test_search_refuses_other_settings_and_foreign_files(tmp_path):
    out = tmp_path / "a.json"
    run = changed(SEARCH, "--trials", "1", "--samples", "2", "--out", str(out))
    out.write_text("mine")
    assert "exists already" in refusal(tokprune_cli(*run, "--tolerance", "0.9"))
    assert tokprune_cli(*run, "--tolerance", "0.9", "--overwrite").returncode == 0
    before = out.read_bytes()
    for change, named in (("--tolerance", "0.8"), ("--score", "pyramiddrop"), ("--seed", "1"), ("--suffix", " now")):
        line = refusal(tokprune_cli(*run, *(() if change == "--tolerance" else ("--tolerance", "0.9")), change, named))
        assert "a search with other settings" in line
        assert "--overwrite" in line
    assert out.read_bytes() == before
    path = tmp_path / "a.json.trials.jsonl"
    for spoil in ("{oops\n", '{"settings": 3}\n', "[1]\n"):
        path.write_text(spoil)
        assert "cannot read" in refusal(tokprune_cli(*run, "--tolerance", "0.9"))
    assert tokprune_cli(*run, "--tolerance", "0.8", "--overwrite").returncode == 0
    assert read_schedule(out).found["tolerance"] == 0.8


def test_two_searches_do_not_write_to_one_file(tmp_path):
    out = tmp_path / "a.json"
    with opened(out, {}), pytest.raises(RunError, match="another process writes"), opened(out, {}):
        pass
    with opened(out, {}):
        pass


@pytest.mark.parametrize("room", [0, 20], ids=["nothing", "half a line"])
def test_full_disk_keeps_what_was_evaluated(room, tmp_path):
    out, limits = tmp_path / "a.json", resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(out, {"a": 1}) as trials:
        trials.add(Point("1x2", 1, 2, (1.0,)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (trials.path.stat().st_size + room, limits[1]))
        try:
            with pytest.raises(RunError, match="type the same command again"):
                trials.add(Point("1x1", 1, 2, (1.0,)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for key in ("1x2", "1x1"):
        with opened(out, {"a": 1}) as trials:
            assert list(trials.points)[-1] == key
            trials.add(Point("1x1", 1, 2, (1.0,)))


def test_questions_are_apart_from_those_of_the_test(folder, tmp_path):
    for name in ("findit", "findit_hd", "easyvqa"):
        assert calibration_task(name).split != "test"
    task = calibration_task("easyvqa")
    assert task.image(task.samples()[0].image_id).size == (64, 64)
    with pytest.raises(RunError, match="type --calibration FOLDER"):
        calibration_task(str(folder))
    with pytest.raises(RunError, match="is the task itself"):
        calibration_task(str(folder), f"{folder}/.")
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (50, 40), "red").save(other / "0.png")
    (other / "metadata.jsonl").write_text('{"file_name": "0.png", "question": "what color?", "answer": "red"}\n')
    assert calibration_task(str(folder), str(other)).name == "other"
    out = tmp_path / "a.json"
    arguments = ["--task", str(folder), "--calibration", str(other), "--budget", "0.5", "--trials", "1"]
    done = tokprune_cli("search", *arguments, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert read_schedule(out).found["samples"] == ["1"]


def test_specification_of_a_schedule_is_the_files():
    wanted = Wanted(tolerance=0.1, score="fastv:uniform=0.5")
    spec = wanted.spec({2: 36, 5: 0}, N)
    assert spec == "fastv:uniform=0.5:schedule=layers/2x0.25/5x0.0"
    assert tokprune.get_method(spec).cuts(DECODER, N, 0) == {2: 36, 5: 0}
    assert all(tokprune.get_method(wanted.spec({1: n}, N)).cuts(DECODER, N, 0) == {1: n} for n in range(N))
