"""The script that needs a GPU, run whole on a CPU at toy size: its rows, its page, and what ends a piece."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time

import pytest
import torch
from tokprune.eval.bench import gpu, shaped, sweep
from tokprune.eval.bench.settings import Settings
from tokprune.eval.report import gpu as page
from tokprune.eval.report import render
from typer.testing import CliRunner

import tokprune
from tokprune.core.errors import TokPruneError

BLOCKS = ("pieces", "kernels", "sweeps", "selection", "threads")


def place(tmp_path) -> gpu.Place:
    return gpu.Place(tmp_path, "cpu", toy=True)


@pytest.mark.slow
def test_every_piece_writes_rows_that_the_page_shows(tmp_path, monkeypatch):
    """In this process, but for pytest; the interpreter stands for the compiler where Triton is installed."""
    for name in gpu.ALL:
        said = gpu.ALL[name][1](place(tmp_path))
        assert said, name
    ended = [gpu.Piece(name, gpu.DONE, 1.0, "said", **place(tmp_path).conditions()) for name in gpu.ALL]
    gpu._write(tmp_path / gpu.PIECES, ended)
    shown = {block: page.tables(tmp_path, block) for block in BLOCKS}
    assert not [block for block, text in shown.items() if page.NOTHING in text]
    assert re.findall(r"^\| (\w.*?) +\|", shown["pieces"], re.MULTILINE)[1:] == list(gpu.ALL)
    for what in ("divprune", "cdpruner", "received"):
        assert shown["kernels"].count(f"`{what}`") == 2
    times = [json.loads(line) for line in (tmp_path / gpu.TIMES).read_text().splitlines()]
    assert all((row["kernel_ms"] is not None) == gpu._kernels_run(place(tmp_path)) for row in times)
    batches = gpu.SMALL.batches
    for shape in gpu.SHAPES:
        rows = [json.loads(line) for line in (tmp_path / f"gpu-{shape}.jsonl").read_text().splitlines()]
        assert [(r["batch_size"], r["method"]) for r in rows] == [
            (n, method) for n in batches for method in ("none", gpu.SHAPES[shape][0])
        ]
    assert shown["selection"].count("vtc_cls 0.25") == 2 * len(batches) + 2
    answered = [json.loads(line) for line in (tmp_path / gpu.THREADS).read_text().splitlines()]
    assert [(r["method"], r["threads"]) for r in answered] == [("none", 1), ("none", 2), ("vtc_cls", 1), ("vtc_cls", 2)]
    assert (tmp_path / "gpu-short-steps.jsonl").exists()


@pytest.mark.parametrize("block", BLOCKS)
def test_what_was_not_measured_says_so_and_is_on_the_page(block, tmp_path, monkeypatch):
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    assert f"<!-- gpu: {block} -->" in (gpu.ROOT / "docs" / "gpu.md").read_text()
    assert render.rendered(f"<!-- gpu: {block} -->\n<!-- end -->") == (
        f"<!-- gpu: {block} -->\n\n{page.NOTHING}\n<!-- end -->"
    )


def states(tmp_path) -> dict[str, str]:
    return {piece.name: piece.state for piece in gpu.ended(tmp_path)}


def test_pieces_end_and_what_is_done_is_not_run_again(tmp_path, monkeypatch):
    codes = {"laws": "print('well'); print('all well')", "kernels": "raise SystemExit(3)"}
    ran = []

    def command_of(name, place):
        ran.append(name)
        return [gpu.sys.executable, "-c", codes[name]]

    monkeypatch.setattr(gpu, "command_of", command_of)
    assert not gpu.run_all(place(tmp_path), ["laws", "kernels"], 600)
    assert states(tmp_path) == {"laws": gpu.DONE, "kernels": gpu.FAILED}
    codes["kernels"] = "print('better')"
    assert gpu.run_all(place(tmp_path), ["laws", "kernels"], 600)
    assert ran == ["laws", "kernels", "kernels"]
    assert [piece.said for piece in gpu.ended(tmp_path)] == ["all well", "better"]


def test_a_piece_is_interrupted_at_its_limit_and_killed_if_that_does_not_help(tmp_path, monkeypatch):
    """However long a busy machine takes to begin: the limit counts from where the piece is ready."""
    ready = tmp_path / "ready"
    begun = f"import pathlib, signal, time\nready = pathlib.Path({str(ready)!r})\n"
    # Started in the background, a process inherits that interrupts are ignored.
    gentle = "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    gentle += "try:\n  ready.touch()\n  time.sleep(600)\nexcept KeyboardInterrupt:\n  print('kept')\n  raise"
    deaf = "signal.signal(signal.SIGINT, signal.SIG_IGN)\nready.touch()\ntime.sleep(600)"

    class Waiting(subprocess.Popen):
        def communicate(self, *more, **named):
            while not ready.exists():
                time.sleep(0.05)
            return super().communicate(*more, **named)

    monkeypatch.setattr(gpu.subprocess, "Popen", Waiting)
    for code, grace_s, said in ((gentle, 300, "kept"), (deaf, 1, "")):
        ready.unlink(missing_ok=True)
        monkeypatch.setattr(gpu, "GRACE_S", grace_s)
        monkeypatch.setattr(gpu, "command_of", lambda name, place, code=code: [gpu.sys.executable, "-c", begun + code])
        piece = gpu.run_piece("laws", place(tmp_path), 1)
        assert (piece.state, piece.said) == (gpu.STOPPED, said)


def test_without_time_left_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "run_piece", lambda *ignored: pytest.fail("begun"))
    clock = iter((0.0, 590.0))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    assert not gpu.run_all(place(tmp_path), ["laws"], 600)


def test_without_a_gpu_one_line_says_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    app = gpu.typer.Typer()
    app.command()(gpu.main)
    ran = CliRunner().invoke(app, ["--out", str(tmp_path)])
    assert ran.exit_code == 2
    assert ran.output.strip().count("\n") == 0
    assert "needs a CUDA device" in ran.output
    ran = CliRunner().invoke(app, ["--out", str(tmp_path), "--device", "cpu", "--pieces", "law"])
    assert ran.exit_code == 2
    assert "no piece 'law'" in ran.output


def test_an_error_of_a_piece_is_its_last_line(tmp_path, monkeypatch, capsys):
    def fail(place):
        raise TokPruneError("no room\nat all")

    monkeypatch.setitem(gpu.ALL, "laws", (1, fail))
    with pytest.raises(gpu.typer.Exit):
        gpu.one_piece("laws", place(tmp_path))
    assert capsys.readouterr().out == "no room\n"


def test_batches_that_do_not_fit_are_left_out(tmp_path, monkeypatch):
    tried = []

    def run(settings, out, overwrite, console):
        tried.append(settings.batch_sizes)
        if len(settings.batch_sizes) > 1:
            raise shaped.NoRoom("needs 90 GiB")
        return True

    monkeypatch.setattr(sweep, "run", run)
    assert gpu._swept(Settings(model="tiny-llava", batch_sizes=(1, 8, 32)), tmp_path / "x") == "batch sizes 1"
    assert tried == [(1, 8, 32), (1, 8), (1,)]


@pytest.mark.parametrize("shape", [*gpu.SHAPES, gpu.SHORT])
def test_every_shape_runs_its_methods(shape, monkeypatch):
    """Checked without weights: a method that a model cannot run would end its piece."""
    monkeypatch.setattr(shaped, "free_bytes", lambda device: 2**50)
    methods = gpu.SHAPES.get(shape, ("uniform", "fastv", "pyramiddrop"))
    settings = Settings(shape=shape, methods=methods, device="cpu", layers=8, batch_sizes=gpu.Size().batches)
    bench = sweep.Bench(settings, gpu.Path(os.devnull), gpu.Console(stderr=True))
    (subject,) = bench._subjects(sweep.configurations(methods, (0.25,)))
    assert subject.n_placeholders >= 576


def test_kernel_times_name_methods_of_the_registry():
    assert set(gpu.TEXT_METHODS) <= set(tokprune.list_methods())
