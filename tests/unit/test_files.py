"""Files that are written at once: permissions, bytes, and what happens to those that were there."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from commands import tokprune_cli
from tokprune.eval.report.explained import Explained
from tokprune.eval.run.folder import RunFolder
from tokprune.eval.run.runner import EMBEDDED_MODEL, Runner
from tokprune.eval.search.fit_exit import Fit, Seen
from tokprune.eval.search.trials import Point, opened
from tokprune.eval.tasks.findit import FindIt

import tokprune
from tokprune.core import errors
from tokprune.core.schedules import ScheduleFile, write_schedule
from tokprune.core.signals import Decoder
from tokprune.methods.gates import Gates, read_gates, write_gates


def gates(seed: int = 0) -> Gates:
    draw = torch.Generator().manual_seed(seed)
    pairs = {i: (torch.randn(4, 16, generator=draw), torch.randn(2, 4, generator=draw)) for i in range(3)}
    return Gates(Decoder(5, 8, "some"), pairs, {"fit": {"model": 'a "b" \\ é', "step": 3}, "kl": [0.1, 0.2]})


def schedule() -> ScheduleFile:
    return ScheduleFile("fastv", {2: 0.5}, 5, "some", {"note": "é"})


def run_folder(folder: Path) -> None:
    run = RunFolder(folder / "run", {"tasks": {}, "configurations": []})
    run.write_jsonl("rows.jsonl", [{"a": 1}])
    run.close()


def trials(folder: Path) -> None:
    with opened(folder / "schedule.json", {"a": 1}) as there:
        there.add(Point("1x2", 1, 2, (1.0,)))


def saved(folder: Path) -> None:
    model = Runner.load(str(EMBEDDED_MODEL)).model
    with tokprune.attach(model, "uniform", keep_ratio=1) as attachment:
        decoder = attachment._family.decoder
    pairs = {0: (torch.zeros(2, 2 * decoder.width), torch.zeros(2, 2))}
    write_gates(folder / "gate", Gates(decoder, pairs, {"a": 1}))
    with tokprune.attach(model, f"dyvte:gate={folder / 'gate'}") as attachment:
        attachment.save(folder / "saved")


def partial_fit(folder: Path) -> None:
    """What a fit puts down on its way."""
    fit = Fit.__new__(Fit)
    fit.gates, fit.step = torch.nn.ModuleList([torch.nn.Linear(2, 2)]), 1
    fit.optimiser = torch.optim.AdamW(fit.gates.parameters())
    fit.seen = [Seen(torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.bool), torch.zeros(1, 2))]
    fit.facts, fit.partial = {"a": 1}, folder / "gate.partial"
    fit._save()


def explained(folder: Path) -> None:
    FindIt().image("test-3").save(folder / "scene.png")
    files = ("--out", str(folder / "kept.png"), "--json", str(folder / "kept.json"))
    done = tokprune_cli("explain", str(folder / "scene.png"), *files)
    assert done.returncode == 0, done.stderr


def compared(folder: Path) -> None:
    run = ("--task", "findit", "--limit", "2", "--methods", "none,uniform", "--keep", "0.25")
    done = tokprune_cli("compare", *run, "--out", str(folder / "out"))
    assert done.returncode == 0, done.stderr


WRITERS = {
    "gates": lambda folder: write_gates(folder / "gate", gates()),
    "a schedule": lambda folder: write_schedule(folder / "schedule.json", schedule()),
    "JSON of explain": lambda folder: Explained(None, None, None, []).write_json(folder / "a.json"),
    "a run": run_folder,
    "trials": trials,
    "an attachment": saved,
    "a fit on its way": partial_fit,
    "explain": explained,
    "compare and its report": compared,
}


@pytest.fixture
def umask():
    """Sets it; what was there comes back."""
    before = os.umask(0o022)
    os.umask(before)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("what", WRITERS)
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002], ids=oct)
def test_files_are_as_readable_as_the_umask_says(mask, what, umask, tmp_path):
    umask(mask)
    WRITERS[what](tmp_path)
    files = [p for p in tmp_path.rglob("*") if p.is_file() and not p.name.endswith(".lock")]
    assert files
    modes = {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in files}
    assert modes == dict.fromkeys(modes, oct(0o666 & ~mask))


def test_gates_of_the_same_content_are_the_same_bytes(tmp_path):
    for i in range(12):
        write_gates(tmp_path / str(i), gates())
    assert len({p.read_bytes() for p in tmp_path.iterdir()}) == 1
    write_gates(tmp_path / "other", gates(1))
    assert (tmp_path / "other").read_bytes() != (tmp_path / "0").read_bytes()
    found = read_gates(tmp_path / "0")
    assert found.notes == gates().notes
    assert all(torch.equal(x, y) for i in range(3) for x, y in zip(found.weights[i], gates().weights[i], strict=True))


def test_gates_saved_twice_have_one_name_and_the_same_bytes(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        saved(tmp_path / name)
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / n / "saved").iterdir()} for n in "ab")
    assert one == other


SIMPLE = {
    "gates": lambda path: write_gates(path, gates()),
    "a schedule": lambda path: write_schedule(path, schedule()),
    "JSON of explain": lambda path: Explained(None, None, None, []).write_json(path),
}


@pytest.mark.parametrize("what", SIMPLE)
def test_a_file_that_is_there_keeps_its_permissions_and_a_link_stays_one(what, tmp_path):
    path, link = tmp_path / "a", tmp_path / "link"
    path.write_text("before")
    path.chmod(0o640)
    link.symlink_to("a")
    SIMPLE[what](link)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    SIMPLE[what](tmp_path / "new")
    assert path.read_bytes() == (tmp_path / "new").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a", "link", "new"]


@pytest.mark.parametrize("what", SIMPLE)
def test_a_pipe_is_written_to_and_stays(what, tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    SIMPLE[what](pipe)
    reader.join(60)
    SIMPLE[what](tmp_path / "file")
    assert read == [(tmp_path / "file").read_bytes()]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("what", SIMPLE)
def test_a_write_that_fails_leaves_what_was_there(what, tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("before")

    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        SIMPLE[what](path)
    assert os.listdir(tmp_path) == ["a"]
    assert path.read_text() == "before"


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """Each has a file of its own until it is whole; the last one stays."""
    from tokprune.core.files import replacing

    path = tmp_path / "a"
    with replacing(path) as one, replacing(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["a"]


def test_a_run_that_goes_on_removes_what_a_kill_left(tmp_path):
    RunFolder(tmp_path, {"a": 1}).close()
    (tmp_path / ".samples.jsonl.0123456789abcdef.writing").write_text("{")
    RunFolder(tmp_path, {"a": 1}).close()
    assert not list(tmp_path.glob(".*.writing"))
    with pytest.raises(errors.RunError):
        RunFolder(tmp_path, {"a": 2})
