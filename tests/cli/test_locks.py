"""Two commands at one output: the second is refused in one line, and writes nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands import jsonl, refusal, tokprune_cli
from tokprune.eval.bench import sweep as bench
from tokprune.eval.run.runner import Runner
from tokprune.eval.search import fit_exit
from tokprune.eval.tasks.findit import FindIt

BENCH = ("bench", "--model", "tiny-llava", "--methods", "uniform", "--rounds", "1", "--new-tokens", "2")
FIT = ("fit-exit", "--task", "findit", "--samples", "4", "--steps", "4", "--hidden", "4", "--batch-size", "4")
SEARCH = ("search", "--tolerance", "0.5", "--samples", "2", "--trials", "1")
COMPARE = ("compare", "--task", "findit", "--limit", "2", "--methods", "none")
COMMANDS = {
    "bench": (BENCH, "out.lock"),
    "fit-exit": (FIT, "out.lock"),
    "search": (SEARCH, "out.lock"),
    "compare": (COMPARE, "out/.lock"),
}
HOLD = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); input()"


class Few(FindIt):
    """A few scenes; drawing all takes seconds."""

    def __init__(self, split="test", n_scenes=12):
        super().__init__(split, n_scenes)


@pytest.fixture
def held(tmp_path):
    """Another process that holds a lock."""
    started = []

    def hold(path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"

    yield hold
    for process in started:
        process.communicate("\n")


def files(folder: Path) -> dict:
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


@pytest.mark.parametrize("what", COMMANDS)
def test_a_command_at_the_output_of_another_is_refused(what, held, tmp_path, monkeypatch):
    monkeypatch.setattr("tokprune.eval.tasks.findit.FindIt", Few)
    command, lock = COMMANDS[what]
    held(tmp_path / lock)
    before = files(tmp_path)
    line = refusal(tokprune_cli(*command, "--out", str(tmp_path / "out")))
    assert "another process writes to" in line
    assert "with --out" in line
    assert files(tmp_path) == before


def test_a_bench_that_is_written_by_another_is_not_called_an_earlier_run(held, tmp_path):
    (tmp_path / "out").write_text("rows\n")
    held(tmp_path / "out.lock")
    for more in ((), ("--overwrite",)):
        assert "another process writes to" in refusal(tokprune_cli(*BENCH, "--out", str(tmp_path / "out"), *more))
    assert (tmp_path / "out").read_text() == "rows\n"


def test_two_benches_at_once_write_rows_once(tmp_path, monkeypatch):
    out, seen, measure = tmp_path / "new" / "rows.jsonl", [], bench.Bench._measure

    def measuring(self, cell, advance):
        monkeypatch.setattr(bench.Bench, "_measure", measure)
        seen.append(tokprune_cli(*BENCH, "--overwrite", "--out", str(out)))
        return measure(self, cell, advance)

    monkeypatch.setattr(bench.Bench, "_measure", measuring)
    assert tokprune_cli(*BENCH, "--out", str(out)).returncode == 0
    assert "another process writes to" in refusal(seen[0])
    assert len(jsonl(out)) == 2
    assert tokprune_cli(*BENCH, "--overwrite", "--out", str(out)).returncode == 0  # it is free again


def test_rows_that_came_while_a_bench_was_built_are_not_lost(tmp_path, monkeypatch):
    out, subjects = tmp_path / "rows.jsonl", bench.Bench._subjects

    def slow(self, configs):
        found = subjects(self, configs)
        out.write_text("of another\n")
        return found

    monkeypatch.setattr(bench.Bench, "_subjects", slow)
    assert "holds rows of an earlier run" in refusal(tokprune_cli(*BENCH, "--out", str(out)))
    assert out.read_text() == "of another\n"


def test_two_fits_at_once_write_one_gate(tmp_path, monkeypatch):
    monkeypatch.setattr("tokprune.eval.tasks.findit.FindIt", Few)
    out, seen, observe = tmp_path / "gate", [], fit_exit.observe

    def observing(*arguments):
        monkeypatch.setattr(fit_exit, "observe", observe)
        seen.append(tokprune_cli(*FIT, "--out", str(out)))
        return observe(*arguments)

    monkeypatch.setattr(fit_exit, "observe", observing)
    assert tokprune_cli(*FIT, "--out", str(out)).returncode == 0
    assert "another process writes to" in refusal(seen[0])
    assert out.exists()


def test_a_gate_that_came_while_a_fit_was_begun_is_not_lost(tmp_path):
    out = tmp_path / "gate"
    settings = fit_exit.Settings(steps=4, hidden=4, samples=4, batch_size=4)
    fit = fit_exit.Fit(Runner.load("tiny-llava"), "tiny-llava", Few(), settings, out)
    out.write_text("of another")
    with pytest.raises(fit_exit.RunError, match="exists already"):
        fit.run(fit_exit.Console(quiet=True))
    assert out.read_text() == "of another"


@pytest.mark.parametrize("what", ["bench"])
def test_a_device_has_no_lock(what):
    done = tokprune_cli(*COMMANDS[what][0], "--out", "/dev/null")
    assert done.returncode == 0, done.stderr
    assert not Path("/dev/null.lock").exists()
