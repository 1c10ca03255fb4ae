"""Damaged lines in the folder of a run cost their batch, never the run; a report leaves them out and says so."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import typer
from commands import jsonl, refusal, tokprune_cli
from tokprune.eval.compare import Comparison, configurations
from tokprune.eval.report import html as report
from tokprune.eval.report import losses, paired
from tokprune.eval.run.folder import RunFolder
from tokprune.eval.run.lines import typed
from tokprune.eval.run.plan import Plan
from tokprune.eval.run.rows import BatchTime, Config, Row, SampleRow, pooled
from tokprune.eval.run.runner import Runner
from tokprune.eval.search.trials import Point, opened
from tokprune.eval.suites import lmms
from tokprune.eval.suites import scores as lmms_scores
from tokprune.eval.suites.scores import Source
from tokprune.eval.tasks import load_task
from typer.testing import CliRunner

from tokprune.core.errors import RunError, TokPruneError

pytestmark = pytest.mark.slow  # make check runs them

RUN = ["compare", "--task", "findit", "--limit", "12", "--methods", "none,vtc_cls", "--keep", "0.11"]
RUN += ["--batch-size", "4", "--no-controls"]
N_ANSWERS, N_BATCHES = 3 * 12, 3 * 3
FILES = ("samples.jsonl", "times.jsonl", "rows.jsonl", "pictures.jsonl")
TIMES = ("prefill_ms_p20", "prefill_ms_p50", "prefill_ms_p80", "prefill_ratio", "decode_ms_per_token_p50", "date")
CONFIGS = configurations(["none", "vtc_cls"], [0.11])
OTHERS = [None, True, 0, "", "x", 3.5, -1, 10**30, float("nan"), float("inf"), [], [1], {}, {"a": None}]


def changed(**values: Any) -> Callable[[bytes], bytes]:
    return lambda line: json.dumps({**json.loads(line), **values}).encode()


TINY = functools.cache(lambda: Runner.load("tiny-llava"))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "half a line": lambda line: line[: len(line) // 2],
    "nothing": lambda line: b"",
    "zeros": lambda line: b"\0" * len(line),
    "not UTF-8": lambda line: line.replace(b'"', b'"\xff', 1),
    "UTF-16": lambda line: line.decode().encode("utf-16"),
    "too deep": lambda line: b"[" * 100_000,
    "too deep inside": lambda line: line[:-1] + b', "more": ' + b'{"a":' * 100_000,
    "a list": lambda line: b"[" + line + b"]",
    "a number": lambda line: b"3",
    "null": lambda line: b"null",
    "no field": lambda line: b"{}",
    "a field twice": lambda line: line[:-1] + b', "task": "findit"}',
    "a field more": changed(more=1),
    "a task that is no text": changed(task=None),
    "a number of 5000 digits": lambda line: line[:-1] + b', "more": ' + b"9" * 5000 + b"}",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    done = tokprune_cli(*RUN, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert len(jsonl(out / "samples.jsonl")) == N_ANSWERS
    assert jsonl(out / "pictures.jsonl")
    return out


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def damage(path: Path, how: Callable[[bytes], bytes], every: bool = False) -> int:
    """Damage the last line, or every line; how many there were."""
    lines = path.read_bytes().splitlines()
    lines = [how(line) if every or i == len(lines) - 1 else line for i, line in enumerate(lines)]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return len(lines)


def without_times(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in jsonl(path)]


def assert_mended(run: Path, finished: Path) -> str:
    """By compare, to what the run was, so that nothing is left to say; what compare said."""
    done = tokprune_cli(*RUN, "--out", str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes()
    assert without_times(run / "rows.jsonl") == without_times(finished / "rows.jsonl")
    assert jsonl(run / "pictures.jsonl") == jsonl(finished / "pictures.jsonl")
    assert report.Run.read(run).remarks == []
    return " ".join(done.stdout.split())


def questions(run: Path) -> dict[tuple[str, int], set[str]]:
    found: dict[tuple[str, int], set[str]] = {}
    for row in jsonl(run / "samples.jsonl"):
        found.setdefault((row["task"], row["batch"]), set()).add(row["sample"])
    return found


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_line_costs_its_batch_alone(how, run, finished):
    """The last lines of samples.jsonl and times.jsonl are of one batch."""
    settings = json.loads((run / "run.json").read_text())
    for name in FILES:
        damage(run / name, DAMAGES[how])
    read = report.Run.read(run)
    assert read.damaged == {run / name: 1 for name in ("rows.jsonl", "samples.jsonl", "pictures.jsonl")}
    assert len(read.samples) == N_ANSWERS - 1
    for known in (None, questions(finished)):
        folder = RunFolder(run, settings, questions=known)
        assert folder.damaged == ({run / name: 1 for name in ("samples.jsonl", "times.jsonl")} if not known else {})
        assert len(folder.answers) == len(folder.times) == N_BATCHES - 1
        folder.close()
    lines = (finished / "samples.jsonl").read_bytes().splitlines()
    assert (run / "samples.jsonl").read_bytes().splitlines() == lines[:-4]


@pytest.mark.parametrize("how", ["half a line", "too deep"])
def test_compare_asks_a_damaged_batch_again_and_says_so(how, run, finished):
    for name in FILES:
        damage(run / name, DAMAGES[how])
    times = (run / "times.jsonl").read_bytes().splitlines()
    (run / "times.jsonl").write_bytes(b"\n".join([DAMAGES[how](times[0]), *times[1:]]) + b"\n")
    before = {name: (run / name).read_bytes() for name in FILES}
    shown = tokprune_cli("report", str(run))
    assert shown.returncode == 0, shown.stderr
    assert {name: (run / name).read_bytes() for name in FILES} == before
    for name in ("samples.jsonl", "rows.jsonl", "pictures.jsonl"):
        (line,) = [line for line in shown.stderr.splitlines() if f"1 line of {run / name} is damaged: left out" in line]
        assert f"tokprune compare --out {run} again" in line
    assert "1 line of rows.jsonl is damaged" in (run / "report.html").read_text()
    said = assert_mended(run, finished)
    assert f"1 line of {run / 'samples.jsonl'} is damaged: its batch is asked again" in said
    assert f"2 lines of {run / 'times.jsonl'} are damaged: their batches are asked again" in said
    assert f"1 line of {run / 'pictures.jsonl'} is damaged: its picture is drawn again" in said
    assert f"{N_ANSWERS - 8} answers are in" in said


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_which_nothing_is_left(name, run, finished):
    """Report says which command mends it, and that one does."""
    n = damage(run / name, DAMAGES["too deep"], every=True)
    shown = tokprune_cli("report", str(run))
    if name == "rows.jsonl":
        assert f"type the same tokprune compare --out {run} again" in refusal(shown)
    else:
        assert shown.returncode == 0, shown.stderr
        assert (f"{n} line" in shown.stderr) is (name != "times.jsonl")
    assert_mended(run, finished)


@pytest.mark.parametrize("how", ["half a line", "not UTF-8", "too deep", "a list", "a number", "null"])
def test_settings_that_are_damaged_are_one_line_that_tells_what_mends_them(how, run, finished):
    content = DAMAGES[how](json.dumps(json.loads((run / "run.json").read_text())).encode())
    (run / "run.json").write_bytes(content)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert f"tokprune compare --out {run} --overwrite" in refusal(tokprune_cli("report", str(run)))
    with pytest.raises(RunError, match="--overwrite"):
        RunFolder(run, {})
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    folder = RunFolder(run, {}, overwrite=True)
    assert json.loads((run / "run.json").read_text()) == {}
    assert not folder.answers
    folder.close()


SETTINGS = ("model", "tasks", "configurations", "flops_text", "suffix", "max_new_tokens", "weights", "prompt")


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_other_types_are_never_a_traceback(name, run):
    settings = json.loads((run / "run.json").read_text())
    for value in OTHERS:
        (run / "run.json").write_text(json.dumps({**settings, name: value}))
        with contextlib.suppress(TokPruneError):
            read = report.Run.read(run)
            report.page(read, losses.changes(read.samples), [], {})
            losses.Artist.of_settings(TINY(), read.settings)


def test_an_answer_in_the_wrong_batch_is_asked_again(run, finished):
    """A line that is a row, yet of no question of its batch."""
    damage(run / "samples.jsonl", changed(sample="test-0-nothing"))
    said = assert_mended(run, finished)
    assert f"1 line of {run / 'samples.jsonl'} is damaged: its batch is asked again" in said


def test_the_cut_off_end_of_a_killed_run_is_no_damage(run, finished):
    content = (run / "samples.jsonl").read_bytes()
    (run / "samples.jsonl").write_bytes(content[:-50])
    assert "damaged" not in assert_mended(run, finished)


def test_paired_leaves_damaged_lines_out_and_says_so(run):
    app = typer.Typer()
    app.command()(paired.main)
    for how in DAMAGES.values():
        shutil.copy(run / "samples.jsonl", run / "whole")
        damage(run / "samples.jsonl", how)
        done = CliRunner().invoke(app, [str(run), "none", "vtc_cls@0.11"])
        assert done.exit_code == 0, done.output
        assert "n = 11" in done.output
        assert "1 line of" in done.output
        shutil.copy(run / "whole", run / "samples.jsonl")
    damage(run / "samples.jsonl", DAMAGES["too deep"], every=True)
    done = CliRunner().invoke(app, [str(run), "none", "vtc_cls@0.11"])
    assert done.exit_code == 2
    assert "tokprune compare" in done.output


# ---- every leaf, every cut


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield path
    for key, item in inside:
        yield from leaves(item, (*path, key))


def replaced(value: Any, path: tuple, other: Any) -> Any:
    if not path:
        return other
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], other)
    return copy


def spoilt(line: bytes) -> Iterator[bytes]:
    """The line with every leaf and branch replaced or left out, and cut at many bytes."""
    values = json.loads(line)
    for path in leaves(values):
        for other in OTHERS:
            yield json.dumps(replaced(values, path, other)).encode()
    for name in values:
        yield json.dumps({k: v for k, v in values.items() if k != name}).encode()
    for end in range(0, len(line), max(7, len(line) // 60)):
        yield line[:end]


@pytest.mark.parametrize("name", ["samples.jsonl", "times.jsonl"])
def test_whatever_a_line_became_its_batch_is_whole_or_asked_again(name, run, finished):
    settings, known = json.loads((run / "run.json").read_text()), questions(finished)
    *lines, last = (finished / name).read_bytes().splitlines(keepends=True)
    for spoil in spoilt(last.strip()):
        (run / name).write_bytes(b"".join(lines) + spoil + b"\n")
        folder = RunFolder(run, settings, questions=known)
        folder.close()
        assert len(folder.times) >= N_BATCHES - 1
        for (task, _, batch), rows in folder.answers.items():
            assert {row.sample for row in rows} == known[task, batch]
        if len(folder.times) == N_BATCHES:
            comparison = Comparison(TINY(), "tiny-llava", folder, Plan([], CONFIGS))
            assert len(comparison._summaries(load_task("findit"))) == 3
        for other in {"samples.jsonl", "times.jsonl"} - {name}:
            shutil.copy(finished / other, run / other)


@pytest.mark.parametrize("name", ["rows.jsonl", "samples.jsonl", "pictures.jsonl"])
def test_whatever_a_line_became_there_is_a_report(name, run, finished, monkeypatch):
    """A line that is left out makes the same page every time; of one that passes there has to be one. Plots: below."""
    lines = (finished / name).read_bytes().splitlines(keepends=True)
    monkeypatch.setattr(report, "plots", lambda *ignored: ({}, None))
    passed = 0
    for spoil in spoilt(lines[-1].strip()):
        (run / name).write_bytes(b"".join(lines[:-1]) + spoil + b"\n")
        if not report.Run.read(run).damaged:
            report.write(run)
            passed += 1
    assert passed > 5


@pytest.mark.parametrize("key", ["value", "low", "difference", "prefill_ratio", "prefill_ms_p50", "n_visual_mean"])
@pytest.mark.parametrize("other", [0, -1, 1e300, 1e-300])
def test_numbers_of_any_size_are_plotted(key, other, run):
    damage(run / "rows.jsonl", changed(**{key: other}))
    report.write(run)


def test_seeds_of_which_one_lost_its_kinds_are_pooled(run):
    line = jsonl(run / "rows.jsonl")[-1]
    seeds = [Row.read({**line, "method": f"random:seed={i}", **({"by_kind": {}} if i else {})}) for i in range(2)]
    for group in (seeds, seeds[::-1]):
        (row,) = pooled(group)
        assert row.by_kind == {}


def record_of(row: dict) -> dict:
    """As the plug-in records a document."""
    names = ("n_visual_before", "n_visual_after", "n_visual_mean", "llm_columns_before", "llm_columns_after", "costs")
    words = ("device", "dtype", "attn_implementation", "positions", "torch", "transformers", "tokprune", "date")
    shared = {"batch_size": 1, "prefill_s": 0.1, "decode_s_per_token": None, "peak_bytes": None, "stopped": True}
    return {**{n: row[n] for n in names}, **dict.fromkeys(words, "x"), **shared, "revision": None, "gpu": None}


@pytest.fixture
def scored(run) -> Path:
    """What lmms-eval and the plug-in write about two documents."""
    own = run / "lmms-eval"
    (own / "out").mkdir(parents=True)
    rows = jsonl(run / "samples.jsonl")[:2]
    results = {
        "results": {"t": {"acc,none": 0.5, "acc_stderr,none": 0.5, "f1,none": 0.3}},
        "configs": {"t": {"test_split": "test"}},
        "n-samples": {"t": {"effective": 2}},
    }
    (own / "out" / "1_results.json").write_text(json.dumps(results))
    documents = [{"doc_id": i, "target": "a", "filtered_resps": ["a"], "acc": float(i)} for i in range(2)]
    records = [{"task": "t", "doc_id": i, "batch": i, **record_of(row)} for i, row in enumerate(rows)]
    for name, written in (("out/1_samples_t.jsonl", documents), ("record.jsonl", records)):
        (own / name).write_text("".join(json.dumps(line) + "\n" for line in written))
    return own


@pytest.mark.parametrize("name", ["record.jsonl", "out/1_samples_t.jsonl", "out/1_results.json"])
def test_whatever_a_record_became_its_configuration_has_rows_or_is_run_again(name, scored):
    path = scored / name
    *lines, last = path.read_bytes().splitlines(keepends=True)
    assert lmms._there(scored)
    for spoil in spoilt(last.strip()):
        path.write_bytes(b"".join(lines) + spoil + b"\n")
        said: list[str] = []
        found = lmms._there(scored, said.append)
        assert (found is None) is bool(said)
        if found:
            made = lmms_scores.rows("m", {Config("none"): found}, {})
            samples = [r for result in found for r in lmms_scores.sample_rows(Config("none"), result, Source("t"))]
            for row in (*made, *samples):
                typed(type(row), json.loads(json.dumps(asdict(row))))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_record_is_run_again_and_said(how, scored):
    if how == "a field more":
        pytest.skip("records may have more fields")
    damage(scored / "record.jsonl", DAMAGES[how])
    said: list[str] = []
    assert lmms._there(scored, said.append) is None
    assert "is run again" in said[0]


def test_a_journal_of_trials_that_is_damaged_is_refused_or_read(tmp_path):
    out, settings = tmp_path / "a.json", {"a": 1}
    with opened(out, settings) as trials:
        for i in range(3):
            trials.add(Point(f"2x{i}", i, 5, (3.0, 2.5)))
    lines = trials.path.read_bytes().splitlines(keepends=True)
    refused = 0
    for at in (0, 1, len(lines) - 1):
        for spoil in (*spoilt(lines[at].strip()), *(how(lines[at].strip()) for how in DAMAGES.values())):
            trials.path.write_bytes(b"".join([*lines[:at], spoil + b"\n", *lines[at + 1 :]]))
            try:
                with opened(out, settings) as again:
                    assert all(p.accuracy >= 0 and sum(p.tokens) < 1e9 for p in again.points.values())
            except RunError as error:
                assert "--overwrite" in str(error)  # noqa: PT017 - some are read
                refused += 1
    assert refused > 10


def test_rows_read_back_as_they_were(finished):
    """NaN, where nothing was timed, among them."""
    for name, kind in (("samples.jsonl", SampleRow), ("times.jsonl", BatchTime), ("pictures.jsonl", losses.Picture)):
        for line in jsonl(finished / name):
            assert asdict(typed(kind, line)) == line
    for line in jsonl(finished / "rows.jsonl"):
        if line["method"] != "question only":
            row = Row.read({**line, "prefill_ms_p50": float("nan")})
            assert math.isnan(row.prefill_ms_p50)
            assert asdict(Row.read(line)) == line
