"""`tokprune eval --suite lmms-eval`, end to end: lmms-eval as its own process, scores as rows of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import jsonl, tokprune_cli
from lmms_requests import N_SAMPLES as N
from lmms_requests import asked
from tokprune.eval.run.rows import Config, Row
from tokprune.eval.suites import lmms
from tokprune.eval.suites import scores as lmms_scores

from tokprune.core.errors import RunError

LABELS = ["none", "vtc_cls@0.25", "fastv@0.25", "random:seed=1@0.25", "visionzip@0.25"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One run of every kind of method, and what the command printed."""
    out = tmp_path_factory.mktemp("suite") / "out"
    return out, tokprune_cli(*asked(out))


@pytest.fixture
def again(ran, tmp_path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(ran[0], tmp_path / "again"))


def results_of(out: Path, label: str) -> dict:
    (path,) = (out / "lmms-eval").glob(f"{lmms.folder_name(config_of(label))}/out/**/*_results.json")
    return json.loads(path.read_text())


def config_of(label: str) -> Config:
    method, _, keep = label.partition("@")
    return Config(method, float(keep) if keep else None)


# ---- the same answers


def test_rows_are_what_lmms_eval_says(ran):
    out, done = ran
    assert (done.returncode, done.stderr) == (0, "")
    rows = [Row.read(line) for line in jsonl(out / "rows.jsonl")]
    assert [r.config for r in rows] == LABELS
    for row in rows:
        theirs = results_of(out, row.config)["results"]["tokprune_findit"]
        assert row.value == theirs["exact_match,none"]
        assert (row.task, row.metric, row.split, row.n_samples) == ("findit", "exact_match", "test", N)
        assert row.low < row.value < row.high <= 1
        assert sum(k["n_samples"] for k in row.by_kind.values()) == N
        kept = {"none": 144}.get(row.config, 36)
        assert (row.n_visual_before, row.n_visual_after) == (144, kept)
        assert (row.n_visual_mean > 36) is (row.config in ("none", "fastv@0.25"))
        assert (row.costs.llm_flops_after < row.costs.llm_flops_before) is (kept == 36)
        assert row.prefill_ms_p50 > 0
        assert row.stop_rate == 1
    assert rows[0].difference is None
    assert all(r.difference == pytest.approx(r.value - rows[0].value) for r in rows[1:])
    assert len({r.value for r in rows}) > 1


def test_the_table_and_lmms_evals_own_are_shown(ran):
    _, done = ran
    assert done.stdout.count("|tokprune_findit|none  |     0|exact_match|") == len(LABELS)
    assert "144 -> 36" in done.stdout
    assert "findit, exact_match: 24 questions of the test split, tiny-llava" in " ".join(done.stdout.split())


def test_every_answer_and_count_is_that_of_our_own_harness(ran, runner, findit):
    """Runner answers the same questions; only the salts of the seeded method are others, and so its answers."""
    out, _ = ran
    task, samples = findit
    theirs = {(r["config"], r["sample"]): r for r in jsonl(out / "samples.jsonl")}
    assert len(theirs) == len(LABELS) * N
    compared = ("answer", "right", "expected", "kind", "stopped", "n_visual_before", "n_visual_after", "n_visual_mean")
    compared += ("llm_columns_before", "llm_columns_after")
    configs = [config_of(label) for label in LABELS]
    for config, rows, _ in runner.run(task, samples, configs, batch_size=8):
        for row in rows:
            other = theirs[config.label, row.sample]
            assert vars(row.costs) == other["costs"]
            names = compared if "random" not in config.method else compared[5:]
            assert {n: getattr(row, n) for n in names} == {n: other[n] for n in names}, (config.label, row.sample)
    drawn = [theirs["random:seed=1@0.25", s.id]["answer"] for s in samples]
    assert drawn != [theirs["none", s.id]["answer"] for s in samples]


# ---- going on


def test_what_is_there_is_not_run_again(ran):
    out, _ = ran
    before = {path: path.stat().st_mtime_ns for path in (out / "lmms-eval").rglob("*") if path.is_file()}
    rows = (out / "rows.jsonl").read_text()
    done = tokprune_cli(*asked(out))
    assert done.returncode == 0, done.stderr
    assert " ".join(done.stdout.split()).count("is not run again") == len(LABELS)
    assert {path: path.stat().st_mtime_ns for path in (out / "lmms-eval").rglob("*") if path.is_file()} == before
    assert (out / "rows.jsonl").read_text() == rows


def test_a_configuration_that_was_cut_off_is_run_again_and_no_other(again):
    out = again
    fastv, vtc = (out / "lmms-eval" / lmms.folder_name(config_of(label)) for label in ("fastv@0.25", "vtc_cls@0.25"))
    (record,) = fastv.glob("record*.jsonl")
    record.write_text("".join(f"{line}\n" for line in record.read_text().splitlines()[:-1]))
    log, other = (fastv / "log.txt").stat().st_mtime_ns, (vtc / "log.txt").stat().st_mtime_ns
    rows = jsonl(out / "rows.jsonl")
    done = tokprune_cli(*asked(out))
    assert done.returncode == 0, done.stderr
    assert (fastv / "log.txt").stat().st_mtime_ns > log
    assert (vtc / "log.txt").stat().st_mtime_ns == other
    assert [r["value"] for r in jsonl(out / "rows.jsonl")] == [r["value"] for r in rows]


def test_other_settings_are_refused(ran):
    out, _ = ran
    done = tokprune_cli(*asked(out, "--batch-size", "4"))
    assert done.returncode == 2
    assert "holds a run with other settings (batch_size: 8 there, 4 now)" in done.stderr


def test_overwrite_starts_over(again):
    arguments = asked(again, "--limit", "2", "--batch-size", "2", methods="none")
    (log,) = (again / "lmms-eval").glob("none*/log.txt")
    before = log.read_text()
    assert tokprune_cli(*arguments).returncode == 2
    assert log.read_text() == before
    done = tokprune_cli(*arguments, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert log.read_text() != before
    (row,) = jsonl(again / "rows.jsonl")
    assert (row["config"], row["n_samples"], row["batch_size"]) == ("none", 2, 2)
    assert [path.name for path in (again / "lmms-eval").iterdir()] == [log.parent.name]


# ---- runs that fail


def test_a_bad_option_is_one_clear_error_and_what_ran_before_is_kept(again):
    """An option that only the model can refuse; the plug-in ends lmms-eval with one line."""
    done = tokprune_cli(*asked(again, methods="fastv:layer=99"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "lmms-eval did not finish fastv:layer=99@0.25 (it ended with 1): " in line
    assert "layer" in line.split("ended with 1)")[1]
    assert "none is in" in " ".join(done.stdout.split())
    assert [r["config"] for r in jsonl(again / "rows.jsonl")] == ["none"]
    (log,) = (again / "lmms-eval").glob("fastv-layer*/log.txt")
    said = log.read_text().splitlines()
    assert "Traceback (most recent call last):" not in said
    assert said[-1].startswith("tokprune: ")


def test_incomplete_results_are_none(tmp_path, ran):
    out, _ = ran
    source = out / "lmms-eval" / lmms.folder_name(Config("none"))
    for what, spoil in SPOILED.items():
        folder = tmp_path / what
        shutil.copytree(source, folder)
        assert lmms._there(folder) is not None
        spoil(folder)
        with pytest.raises(RunError, match=what):
            lmms_scores.read(folder)


def _cut(pattern: str):
    def cut(folder: Path) -> None:
        (path,) = folder.glob(pattern)
        path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines()[:-1]))

    return cut


def _without_tasks(folder: Path) -> None:
    (path,) = folder.glob("out/**/*_results.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "configs": {}}))


SPOILED = {
    "no results of lmms-eval": lambda folder: next(folder.glob("out/**/*_results.json")).unlink(),
    "is cut off": _cut("out/**/*_results.json"),
    "no tasks in": _without_tasks,
    "tokprune_findit: 23 of 24 answers": _cut("out/**/*_samples_*.jsonl"),
    "23 of 24 answers are there": _cut("record*.jsonl"),
}
