"""What README and docs say is true: their tables, snippets, pictures, commands and links."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokprune.eval.report.render import BLOCK, BLOCKS, PAGES, predicted, read_rows, rendered
from typer.main import get_command

import tokprune
from tokprune.cli import reference
from tokprune.cli.commands import app
from tokprune.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text()
TEXTS = {path.relative_to(ROOT): path.read_text() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]}
ALL = "\n".join(TEXTS.values())


def test_tables_are_rendered_from_the_committed_rows_and_the_registries():
    assert {match[1] for match in BLOCK.findall(ALL)} == set(BLOCKS)
    for page in PAGES:
        assert rendered(TEXTS[page]) == TEXTS[page], f"run python -m tokprune.eval.report.render ({page})"
    assert len(re.findall(r"\| question only +\|", BENCHMARKS)) >= 2


def test_a_changed_figure_in_a_table_is_seen():
    (figure, *_) = re.findall(r"\| none +\| +\| (0\.\d+)", BENCHMARKS)
    assert rendered(BENCHMARKS.replace(figure, "0.999", 1)) == BENCHMARKS


def test_the_command_line_page_has_todays_help():
    page = TEXTS[reference.PAGE]
    assert reference.rendered(page) == page, "run python -m tokprune.cli.reference"


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 180


@pytest.mark.parametrize("page", sorted(p for p in TEXTS if "```python" in TEXTS[p]), ids=str)
def test_snippets_run_and_print_what_they_say(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    scope: dict = {}
    printed = io.StringIO()
    for kind, code in re.findall(r"```(python|text)\n(.*?)```", TEXTS[page], re.DOTALL):
        if kind == "text":  # what the snippet before it prints; diagrams follow none that prints
            assert printed.getvalue() in ("", code)
            printed = io.StringIO()
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), scope)


def test_the_quickstart_prints_its_report():
    code, printed = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL).groups()
    assert "attachment.report" in code
    assert printed.startswith("purple\nvtc_cls keep_ratio=0.25: 1 image, visual tokens 144 -> 36")


def test_the_predicted_report_is_what_a_call_prints():
    """The one of the large model is computed; here the small one's is compared with a call."""
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(ROOT / "eval/models/tiny-llava", dtype=torch.float32)
    size, image = model.config.vision_config.image_size, model.config.image_token_id
    ids = torch.tensor([[1] * 40 + [image] * 144 + [1] * 24])
    with torch.no_grad(), tokprune.attach(model, "vtc_cls", keep_ratio=0.25) as attachment:
        model(input_ids=ids, pixel_values=torch.rand(1, 3, size, size))
        shape = attachment.report.shape
        assert str(predicted(shape, "vtc_cls", 0.25, 64, bytes_per_value=4)) == str(attachment.report)


def included(page: Path) -> str:
    """A page with the files that it includes, as the site shows it."""
    return re.sub(r'--8<-- "(.*?)"', lambda match: (ROOT / match[1]).read_text(), TEXTS[page])


@pytest.mark.parametrize("page", sorted(TEXTS), ids=str)
def test_links_lead_somewhere(page):
    top = ROOT / "docs" if page.parts[0] == "docs" else ROOT  # the site has nothing else
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", included(page)):
        path, _, anchor = target.partition("#")
        found = (ROOT / page.parent / path if path else ROOT / page).resolve()
        assert found.exists(), target
        assert found.is_relative_to(top), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}, target


def test_every_method_and_model_has_a_row():
    methods, models = TEXTS[Path("docs/methods.md")], TEXTS[Path("docs/models.md")]
    for name in METHODS.own_names():
        assert f"| `{name}` |" in methods
        assert f"\n### {name}\n" in methods
    for name in METHODS.table:
        section = methods.split(f"\n### {name}\n")[1].split("\n### ")[0]
        assert "- **Needs**: " in section
    assert f"All {len(METHODS.own_names())} methods" in README
    (head,) = re.findall(r"^\| method +\| (.*`llava`.*)$", models, re.MULTILINE)
    for name in tokprune.list_models():
        assert f"`{name}`" in README
        assert f"`{name}`" in head


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([\w%-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([\w-]+)`", ALL)) | set(re.findall(r"^make (\w+)", ALL, re.MULTILINE))
    assert {"demo", "test", "docs", "check"} <= named
    assert named <= targets


def test_every_page_is_in_the_navigation_and_nothing_is_fetched():
    settings = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in settings
    assert "font: false" in settings
    assert not re.search(r"https?:", settings)
    for asset in re.findall(r"\[(assets/[\w./-]+)\]", settings):
        assert (ROOT / "docs" / asset).is_file()
    assert "polyfills: [assets/iframe-worker.js]" in settings  # otherwise the plug-in offline adds one from the network


@pytest.mark.parametrize("command", re.findall(r"`(tokprune explain docs/.*?)`", ALL))
def test_picture_is_what_explain_draws(command):
    from tokprune.eval.report.explained import explained
    from tokprune.eval.run.runner import Runner

    from tokprune.prune.pictures import open_picture

    words = shlex.split(command)
    options = dict(zip(words[3::2], words[4::2], strict=True))
    keep = float(options.get("--keep", "0.25"))
    runner = Runner.load(options.get("--model", "tiny-llava"))
    methods = [(m, {"keep_ratio": keep}) for m in options["--method"].split(",")]
    sheet, _ = explained(
        runner, open_picture(ROOT / words[2]), options.get("--question", "what is in the image?"), methods
    )
    with Image.open(ROOT / options["--out"]) as committed:
        difference = np.abs(np.asarray(sheet).astype(int) - np.asarray(committed.convert("RGB")).astype(int))
    assert (difference.max(-1) > 0).mean() < 0.02  # a rounding elsewhere may move a token, not a picture


def test_there_are_two_pictures():
    assert len(re.findall(r"`tokprune explain docs/.*?`", ALL)) == 2


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^(tokprune [a-z].*?)(?:  +#.*)?$", ALL, re.MULTILINE))))
def test_commands_have_these_options(line):
    command = get_command(app).commands.get(line.split()[1])
    if command is None:  # a sentence that begins with the name
        assert "--" not in line
        return
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
