"""A saved folder goes wherever a method goes: in every command by --config, and in `attach`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from commands import tokprune_cli
from tokprune.eval.models import path_of
from typer.main import get_command

import tokprune
from tokprune.cli.commands import app
from tokprune.core.errors import OptionError

SCENE = str(Path(__file__).parents[2] / "docs" / "scene.png")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Half before the language model, half of that between its layers."""
    from transformers import AutoModelForImageTextToText

    folder = tmp_path_factory.mktemp("saved") / "quarter"
    model = AutoModelForImageTextToText.from_pretrained(path_of("tiny-llava"), dtype=torch.float32)
    with tokprune.attach(model, "vtc_cls+fastv:schedule=single/4", keep_ratio=0.25) as attachment:
        attachment.save(folder)
    return folder


def test_compare_runs_it_beside_other_methods(saved, tmp_path):
    out = tmp_path / "run"
    done = tokprune_cli(
        *("compare", "--config", str(saved), "--methods", "uniform", "--keep", "0.5"),
        *("--task", "findit", "--limit", "4", "--no-controls", "--out", str(out)),
    )
    assert not done.returncode, done.stderr
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    found = {row["method"]: row for row in rows if row["method"] not in ("question only", "shuffled pictures")}
    assert set(found) == {"none", "uniform", str(saved)}
    assert found[str(saved)]["keep_ratio"] is None
    assert found[str(saved)]["n_visual_after"] < found["uniform"]["n_visual_after"]
    again = json.loads((saved / "tokprune.json").read_text())
    assert str(saved) in json.loads((out / "run.json").read_text())["code"], again


def test_explain_bench_and_flops_take_it(saved, tmp_path):
    kept = tmp_path / "kept.json"
    assert not tokprune_cli("explain", SCENE, "--config", str(saved), "--json", str(kept)).returncode
    (method,) = json.loads(kept.read_text())["methods"]
    assert method["spec"] == str(saved)
    bench = tokprune_cli(
        *("bench", "--model", "tiny-llava", "--config", str(saved), "--rounds", "1", "--warmup", "0"),
        *("--new-tokens", "2", "--out", str(tmp_path / "b.jsonl")),
    )
    assert not bench.returncode, bench.stderr
    counted = tokprune_cli("flops", "--model", "llava-1.5-7b", "--config", str(saved), "--keep", "0.5")
    assert not counted.returncode, counted.stderr
    assert "640 -> 208 tokens" in counted.stdout  # a quarter of 576, and 64 of text


def test_a_folder_in_the_working_directory_is_a_folder(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(saved.parent)
    assert tokprune.get_method("./quarter") == tokprune.get_method("vtc_cls+fastv:schedule=single/4")
    assert not tokprune_cli("flops", "--model", "llava-1.5-7b", "--config", "quarter").returncode


@torch.no_grad()
def test_attach_takes_it_as_load_does(tmp_path):
    model, inputs = tiny.model(), tiny.batch()
    with tokprune.attach(model, "uniform", keep_tokens=9) as attachment:
        expected = model(**inputs).logits
        attachment.save(tmp_path / "nine")
    with tokprune.attach(model, tmp_path / "nine") as attachment:
        assert torch.equal(model(**inputs).logits, expected)
        kept = attachment.kept
    with tokprune.attach(model, str(tmp_path / "nine"), replay=kept):
        assert torch.equal(model(**inputs).logits, expected)
    for more in ({"keep_ratio": 0.5}, {"positions": "original"}, {"start_layer": 2}):
        with pytest.raises(OptionError, match=f"holds {next(iter(more))} already: leave {next(iter(more))} out"):
            tokprune.attach(model, str(tmp_path / "nine"), **more)


@pytest.mark.parametrize("command", ["compare", "eval", "bench", "explain", "flops"])
def test_a_folder_that_holds_nothing_is_one_line(command, tmp_path):
    needed = {"eval": ["--tasks", "mme"], "explain": [SCENE], "flops": ["--model", "llava-1.5-7b"]}.get(command, [])
    done = tokprune_cli(command, *needed, "--config", str(tmp_path))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "attachment.save(directory)" in line


def test_every_help_has_an_example_and_groups():
    for name, command in get_command(app).commands.items():
        help_text = tokprune_cli(name, "--help").stdout
        if len(command.params) > 3:
            assert "Example: tokprune " in help_text, name
        if len(command.params) > 8:
            sections = [line for line in help_text.splitlines() if line.endswith(":") and not line.startswith(" ")]
            assert len(sections) >= 4, name
            assert sections[-1] == "Options:"
