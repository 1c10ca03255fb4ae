"""What the README says is true: its tables, its snippets, its picture, its commands."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokprune.eval.report.render import BLOCK, BLOCKS, PAGES, read_rows, rendered
from typer.main import get_command

from tokprune.cli.commands import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
ALL = "\n".join((ROOT / page).read_text() for page in PAGES)


def test_tables_are_rendered_from_the_committed_rows_and_the_registries():
    assert rendered(ALL) == ALL
    assert {match[1] for match in BLOCK.findall(ALL)} == set(BLOCKS)
    assert len(re.findall(r"\| question only +\|", README)) >= 2


def test_a_changed_figure_in_a_table_is_seen():
    (figure, *_) = re.findall(r"\| none +\| +\| (0\.\d+)", README)
    assert rendered(README.replace(figure, "0.999", 1)) == README


def test_snippets_run_and_print_what_they_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    scope: dict = {}
    blocks = re.findall(r"```(python|text)\n(.*?)```", README, re.DOTALL)
    assert [kind for kind, _ in blocks].count("python") >= 2
    printed = io.StringIO()
    for kind, code in blocks:
        if kind == "text":
            assert printed.getvalue() == code
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), scope)
    assert scope["attachment"].budget.flops_ratio == 0.6


def test_first_snippet_is_short():
    first = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert README[: README.index("```python")].count("\n") <= 12
    assert len(re.findall(r"attach\(", first)) == 1


@pytest.mark.parametrize("command", re.findall(r"`(tokprune explain docs/.*?)`", ALL))
def test_picture_is_what_explain_draws(command):
    from tokprune.eval.report.explained import explained
    from tokprune.eval.run.runner import Runner

    from tokprune.prune.pictures import open_picture

    words = command.split()
    options = dict(zip(words[3::2], words[4::2], strict=True))
    keep = float(options.get("--keep", "0.25"))
    runner = Runner.load(options.get("--model", "tiny-llava"))
    methods = [(m, {"keep_ratio": keep}) for m in options["--method"].split(",")]
    sheet, _ = explained(runner, open_picture(ROOT / words[2]), "what is in the image?", methods)
    with Image.open(ROOT / options["--out"]) as committed:
        difference = np.abs(np.asarray(sheet).astype(int) - np.asarray(committed.convert("RGB")).astype(int))
    assert (difference.max(-1) > 0).mean() < 0.02  # a rounding elsewhere may move a token, not a picture


def test_there_are_two_pictures():
    assert len(re.findall(r"`tokprune explain docs/.*?`", ALL)) == 2


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^(tokprune .*?)(?:  +#.*)?$", ALL, re.MULTILINE))))
def test_commands_have_these_options(line):
    command = get_command(app).commands[line.split()[1]]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in line.split() if word.startswith("--")} <= known


def rows_of(name: str) -> list[dict]:
    return [r for r in read_rows(name) if r["task"] == "findit" and r["method"] != "question only"]


@pytest.mark.parametrize("name", [f"compare-tiny-llava{which}.jsonl" for which in ("", "-seed1", "-next")])
def test_committed_rows_have_floors_that_leave_room(name):
    """A benchmark that a blind model solves says nothing about pictures."""
    rows = [r for r in read_rows(name) if r["task"] != "easyvqa"]
    floors = [r["value"] for r in rows if r["method"] in ("question only", "shuffled pictures", "blind")]
    assert len(floors) == 3
    assert max(floors) < 0.55


def test_committed_rows_have_the_columns_that_others_need():
    (row, *_) = rows_of("compare-tiny-llava.jsonl")
    needed = (
        "model revision method params keep_ratio n_visual_before n_visual_after task split n_samples metric value "
        "stderr prefill_ms_p20 prefill_ms_p50 prefill_ms_p80 decode_ms_per_token_p50 peak_gib gpu dtype batch_size "
        "attn_implementation torch transformers tokprune commit seed date"
    )
    assert set(needed.split()) <= set(row)


def test_files_that_are_named_exist():
    for path in re.findall(r"`((?:eval|docs|tests)/[\w./-]+)`", ALL):
        assert (ROOT / path).exists(), path
