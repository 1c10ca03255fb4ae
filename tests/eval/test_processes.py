"""One run shared by several real processes: nothing twice, nothing lost, the rows of a single process."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import jsonl
from tokprune.eval.run.folder import RunFolder
from tokprune.eval.run.processes import Processes, launched_alone
from tokprune.eval.run.rows import BatchTime, Costs, SampleRow
from typer.testing import CliRunner

from tokprune.cli.commands import app
from tokprune.core.errors import RunError

RUN = ["compare", "--task", "findit", "--limit", "24", "--batch-size", "4", "--methods", "none,uniform,fastv,random"]
RUN += ["--keep", "0.25", "--no-controls"]
N_BATCHES, N_CONFIGS, N_ANSWERS = 6, 7, 24 * 7
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
ACCELERATE += ["--dynamo_backend", "no"]
TIMES = ("prefill_ratio", "device")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


LAUNCHERS = {
    "torchrun": [*TORCHRUN, "2"],
    "accelerate": [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())],
}


def launch(launcher: list[str], out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [*launcher, "-m", "tokprune.eval", *RUN, *options, "--out", str(out)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """The same run of one process."""
    out = tmp_path_factory.mktemp("single")
    done = launch([sys.executable], out)
    assert done.returncode == 0, done.stderr
    assert len(jsonl(out / "samples.jsonl")) == N_ANSWERS
    return out


def assert_same_rows(out: Path, single: Path) -> None:
    """To the byte, but for times and where they were taken."""
    assert (out / "samples.jsonl").read_bytes() == (single / "samples.jsonl").read_bytes()
    answers = [(r["task"], r["config"], r["sample"]) for r in jsonl(out / "samples.jsonl")]
    assert len(answers) == len(set(answers)) == N_ANSWERS
    rows = []
    for folder in (out, single):
        found = jsonl(folder / "rows.jsonl")
        rows.append(
            [{k: v for k, v in r.items() if "_ms_" not in k and k not in ("prefill_ratio", "device")} for r in found]
        )
    assert rows[0] == rows[1]
    assert not [p for p in out.iterdir() if p.name.count(".") > 1]  # no part is left


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_give_the_rows_of_one(launcher, single, tmp_path):
    done = launch(LAUNCHERS[launcher], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 processes share the questions" in done.stdout
    assert done.stdout.count("findit: 24 questions") == 1  # one table
    assert_same_rows(tmp_path, single)
    devices = {t["device"] for t in jsonl(tmp_path / "times.jsonl")}
    assert all("one of 2 processes" in device for device in devices)
    assert "one of 2 processes" in jsonl(tmp_path / "rows.jsonl")[-1]["device"]


@pytest.mark.slow
def test_accelerate_that_launches_one_process_is_told(single, tmp_path):
    done = launch([*ACCELERATE, "--cpu", "--num_processes", "2"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "accelerate launched one process" in done.stdout
    assert "share the questions" not in done.stdout
    assert_same_rows(tmp_path, single)


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "n_after"), [(0, 1), (1, 3)])
def test_a_process_killed_in_the_middle_loses_nothing(victim, n_after, single, tmp_path):
    """Killed with SIGKILL while answers are in files of both; it goes on with another number of processes."""
    command = [*LAUNCHERS["torchrun"], "-m", "tokprune.eval", *RUN, "--out", str(tmp_path)]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = [tmp_path / "times.jsonl", tmp_path / "times.1.jsonl"]
    while process.poll() is None and not all(p.exists() and p.read_bytes().count(b"\n") > 2 for p in parts):
        time.sleep(0.005)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[victim], signal.SIGKILL)
    assert process.wait(timeout=120) != 0
    n_there = sum(len(jsonl(p)) for p in parts)
    assert 6 <= n_there < N_BATCHES * N_CONFIGS
    launcher = [sys.executable] if n_after == 1 else [*TORCHRUN, str(n_after)]
    done = launch(launcher, tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "are not asked for again" in line]
    assert int(line.split()[0]) >= 4 * n_there
    assert_same_rows(tmp_path, single)


@pytest.mark.slow
def test_a_folder_of_another_run_is_refused_once(single, tmp_path):
    done = launch(LAUNCHERS["torchrun"], single, "--suffix", " now")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("tokprune: ")]
    assert len(said) == 1
    assert "other settings (suffix:" in said[0]
    assert len(jsonl(single / "samples.jsonl")) == N_ANSWERS


# ---- the folder


def answer(sample: str, batch: int, config: str = "none") -> SampleRow:
    row = {name: {"str": "", "bool": False}.get(f.type, 0) for name, f in SampleRow.__dataclass_fields__.items()}
    return SampleRow(**{**row, "task": "t", "config": config, "batch": batch, "sample": sample, "costs": Costs()})


def times(batch: int, size: int, config: str = "none") -> BatchTime:
    return BatchTime("t", config, batch, size, 0.1, None, None)


SETTINGS = {"tasks": {"t": 1}, "configurations": ["none", "b"]}


def test_batches_that_stand_in_a_part_and_in_the_whole_count_once(tmp_path):
    """A kill between putting files together and removing the parts leaves both."""
    folder = RunFolder(tmp_path, SETTINGS)
    folder.add(("t", "none", 0), [answer("0", 0), answer("1", 0)], times(0, 2))
    folder.close()
    for name in ("samples", "times"):
        (tmp_path / f"{name}.1.jsonl").write_bytes((tmp_path / f"{name}.jsonl").read_bytes())
    again = RunFolder(tmp_path, SETTINGS)
    assert [r.sample for r in again.answers["t", "none", 0]] == ["0", "1"]
    assert len(jsonl(tmp_path / "samples.jsonl")) == 2
    assert not list(tmp_path.glob("*.1.jsonl"))
    again.close()


def test_rows_stand_in_the_order_of_the_settings(tmp_path):
    folder = RunFolder(tmp_path, SETTINGS)
    for batch, config in ((1, "b"), (0, "b"), (1, "none"), (0, "none")):
        folder.add(("t", config, batch), [answer(str(batch), batch, config)], times(batch, 1, config))
    folder.gather()
    order = [(r["batch"], r["config"]) for r in jsonl(tmp_path / "samples.jsonl")]
    assert order == [(0, "none"), (0, "b"), (1, "none"), (1, "b")]
    folder.close()


def test_answers_of_another_run_are_refused(tmp_path):
    folder = RunFolder(tmp_path, SETTINGS)
    folder.add(("t", "none", 0), [answer("0", 0)], times(0, 1))
    folder.close()
    (tmp_path / "run.json").write_text(json.dumps({"tasks": {"t": 1}, "configurations": ["b"]}))
    with pytest.raises(RunError, match="answers of another run"):
        RunFolder(tmp_path, {"tasks": {"t": 1}, "configurations": ["b"]})


def test_copies_that_somebody_made_are_left_alone(tmp_path):
    folder = RunFolder(tmp_path, SETTINGS)
    folder.add(("t", "none", 0), [answer("0", 0)], times(0, 1))
    folder.close()
    for name in ("samples.old.jsonl", "times.before.jsonl", "samples.1.copy.jsonl"):
        (tmp_path / name).write_text("mine\n")
    RunFolder(tmp_path, SETTINGS).close()
    RunFolder(tmp_path, SETTINGS, overwrite=True).close()
    assert (tmp_path / "samples.old.jsonl").read_text() == "mine\n"
    assert len(list(tmp_path.glob("*.*.jsonl"))) == 3


@pytest.mark.slow
def test_answers_that_did_not_arrive_are_missed(tmp_path, monkeypatch):
    """Rows of a part of the questions would look like rows of all of them."""
    real = RunFolder.gather
    monkeypatch.setattr(RunFolder, "gather", lambda self: self.times.pop(min(self.times)) and None)
    command = [*RUN, "--out", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, RunError)
    assert "1 batches of findit are not in" in str(done.exception)
    assert not (tmp_path / "rows.jsonl").exists()
    monkeypatch.setattr(RunFolder, "gather", real)
    assert CliRunner().invoke(app, command).exit_code == 0


def test_overwrite_removes_parts(tmp_path):
    RunFolder(tmp_path, SETTINGS).close()
    (tmp_path / "samples.3.jsonl").write_text("{}\n")
    folder = RunFolder(tmp_path, SETTINGS, overwrite=True)
    assert not folder.answers
    assert not list(tmp_path.glob("*.3.jsonl"))
    folder.close()


def test_shares_of_processes_are_disjoint_and_complete():
    work = list(range(11))
    for n in (1, 2, 3, 20):
        parts = [work[Processes(i, n).share] for i in range(n)]
        assert sorted(itertools.chain(*parts)) == work


def test_a_process_alone_waits_for_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Processes.started()
    assert (alone.index, alone.n, alone.is_main, alone.told("x")) == (0, 1, True, "x")
    alone.wait()
    alone.end()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert launched_alone()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launched_alone()
