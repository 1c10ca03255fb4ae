"""Code that lies in a model's folder is never run, whatever the command and whatever is typed at a prompt."""

from __future__ import annotations

import ast
import io
import json
import sys
from pathlib import Path

import pytest
import typer
from commands import refusal, tokprune_cli
from folders import AUTO, write_model
from house import modules
from PIL import Image
from tokprune.eval.run.folder import RunFolder
from tokprune.eval.run.runner import Runner

from tokprune.cli import commands as cli
from tokprune.core.errors import RunError

NEEDS_MORE = {
    "compare": ["--limit", "1", "--methods", "none", "--task", "findit"],
    "fit-exit": ["--task", "findit", "--samples", "16", "--steps", "1"],
    "search": ["--task", "findit", "--tolerance", "0.01", "--samples", "4"],
    "eval": ["--suite", "lmms-eval", "--tasks", "findit", "--methods", "uniform", "--limit", "1"],
    "flops": [],
    "bench": ["--methods", "uniform", "--rounds", "1", "--warmup", "0", "--new-tokens", "1"],
    "tune": ["--task", "findit", "--methods", "uniform", "--limit", "20", "--max-loss", "90%"],
    "explain": ["PICTURE", "--json", "kept.json"],
}
COMMANDS = sorted(
    name
    for name, command in typer.main.get_command(cli.app).commands.items()
    if any("--model" in parameter.opts for parameter in command.params)
)


@pytest.fixture
def yes(monkeypatch, tmp_path):
    """Somebody who says yes to everything, in a folder that may be written to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 1000))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))


def typed(command: str, model: Path, tmp_path: Path) -> list[str]:
    Image.new("RGB", (9, 9)).save(tmp_path / "picture.png")
    more = [str(tmp_path / "picture.png") if word == "PICTURE" else word for word in NEEDS_MORE[command]]
    out = {"flops": [], "explain": [], "search": ["--out", "a.json"], "fit-exit": ["--out", "a.safetensors"]}
    return [command, *more, "--model", str(model), *out.get(command, ["--out", str(tmp_path / f"{command}.out")])]


def test_every_command_with_a_model_is_tried():
    assert sorted(NEEDS_MORE) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", AUTO)
def test_code_of_an_unknown_family_is_refused_in_one_line_and_not_asked_about(command, name, yes, tmp_path, capfd):
    model = write_model(tmp_path / "foreign", [name, "config.json"], model_type="mine")
    done = tokprune_cli(*typed(command, model, tmp_path))
    assert not (model / "marker").exists()
    line = refusal(done)
    if command != "eval":  # lmms-eval is not in every environment
        assert f"{str(model)!r}: it needs remote code, which tokprune never runs" in line
        assert "trust_remote_code" not in line
    assert "[y/N]" not in done.stdout + done.stderr + "".join(capfd.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c in ("explain", "flops", "compare")])
@pytest.mark.parametrize("name", AUTO)
def test_code_beside_a_known_family_is_left_alone(command, name, yes, tmp_path, capfd):
    """Its files say what the library can read without that code, or it is refused; nothing is asked or run."""
    model = write_model(tmp_path / "known", [name])
    done = tokprune_cli(*typed(command, model, tmp_path))
    assert not (model / "marker").exists()
    assert done.returncode == 0 or "tokprune never runs" in refusal(done)
    assert "[y/N]" not in done.stdout + done.stderr + "".join(capfd.readouterr())


def test_a_run_of_somebody_else_names_a_model_with_code(yes, tmp_path):
    model = write_model(tmp_path / "foreign", ["config.json"], model_type="mine")
    done = tokprune_cli("compare", *NEEDS_MORE["compare"], "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**settings, "model": str(model)}))
    done = tokprune_cli("report", str(tmp_path / "run"), "--pictures")
    assert not (model / "marker").exists()
    assert "tokprune never runs" in refusal(done)


def test_an_adapter_that_leads_to_code_is_refused(yes, tmp_path):
    model = write_model(tmp_path / "foreign", ["config.json"], model_type="mine")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    with pytest.raises(RunError, match="cannot load"):
        Runner.load(str(adapter))
    assert not (model / "marker").exists()


def test_every_call_that_loads_refuses_code():
    """In the sources of the package; `trust_remote_code` stands in the call itself, so that no dict can lose it."""
    calls = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("from_pretrained", "pipeline"):
                given = {k.arg: k.value for k in node.keywords}.get("trust_remote_code")
                calls.append((name, node.lineno, isinstance(given, ast.Constant) and given.value is False))
    assert len(calls) >= 5
    assert [call for call in calls if not call[-1]] == []


def test_run_folder_is_untouched_by_a_refusal(yes, tmp_path):
    """What was answered before a model was changed stays."""
    out = tmp_path / "compare.out"
    RunFolder(out, {"tasks": {}, "configurations": []}).close()
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    model = write_model(tmp_path / "foreign", ["config.json"], model_type="mine")
    refusal(tokprune_cli(*typed("compare", model, tmp_path)))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
