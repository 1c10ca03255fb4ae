"""The command line, as a user types it."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from commands import changed, jsonl, refusal, tokprune_cli
from PIL import Image
from tokprune.eval.run.runner import EMBEDDED_MODEL
from tokprune.eval.tasks.findit import FindIt
from tokprune.integrations.transformers import caches as columns
from tokprune.integrations.transformers import encode as selection
from tokprune.integrations.transformers import shorten as shorten
from tokprune.integrations.transformers.compat import cache_of

import tokprune
from tokprune.core.budget import Budget
from tokprune.core.layout import grid_layout
from tokprune.core.tokens import Stage
from tokprune.methods import METHODS


def test_console_script_starts_as_a_process():
    done = subprocess.run(
        [sys.executable, "-m", "tokprune.cli", "methods"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert all(name in done.stdout for name in tokprune.list_methods())


def test_cli_compares_on_a_folder_of_ones_own(folder, tmp_path):
    out = tmp_path / "out"
    done = tokprune_cli(
        "compare",
        "--task",
        str(folder),
        "--methods",
        "none,vtc_cls,fopru:strategy=row",
        "--keep",
        "0.25",
        "--no-controls",
        "--out",
        str(out),
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [r["config"] for r in rows] == ["none", "shuffled pictures", "vtc_cls@0.25", "fopru:strategy=row@0.25"]
    assert len(samples) == 4 * 3
    assert {r["n_visual_after"] for r in rows} == {144, 36}
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "fopru:strategy=row" in done.stdout
    assert "LLM" in done.stdout
    assert "144 -> 36" in done.stdout


def test_cli_lists():
    done = tokprune_cli("methods")
    assert all(name in done.stdout for name in tokprune.list_methods())
    shown = tokprune_cli("models").stdout
    assert all(name in shown for name in tokprune.list_models())


def test_cli_lists_the_methods_of_one_model():
    shown = tokprune_cli("models", "qwen2_5_vl").stdout
    assert all(name in shown for name in tokprune.list_methods())
    assert "without_cls=received" in shown
    assert "Did you mean 'qwen2_5_vl'" in refusal(tokprune_cli("models", "qwen25_vl"))


@pytest.mark.parametrize("name", METHODS.names())
def test_cli_describes_every_method_with_all_its_options(name):
    done = tokprune_cli("methods", name)
    assert done.returncode == 0, done.stderr
    cls = METHODS.load(METHODS.parts(METHODS.aliases.get(name, name))[0])
    assert all(f"  {option.name}=" in done.stdout for option in fields(cls))
    assert "source:" in done.stdout


def test_an_alias_has_its_own_paper_and_defaults():
    shown = tokprune_cli("methods", "fastervlm").stdout
    assert "2412.01818" in shown
    assert "2412.05819" not in shown
    assert "(default -2)" in shown
    row = next(line for line in tokprune_cli("methods").stdout.splitlines() if "fastervlm" in line)
    assert "2412.01818" in row


def test_version_and_help_in_short():
    assert tokprune_cli("--version").stdout == f"tokprune {tokprune.__version__}\n"
    assert tokprune_cli("compare", "-h").stdout == tokprune_cli("compare", "--help").stdout
    _, _, listed = tokprune_cli("-h").stdout.partition("Commands:")
    assert "report" in listed
    assert "..." not in listed


@pytest.mark.parametrize("command", ["flops", "explain", "fit-exit", "search", "eval", "report", "bench"])
def test_a_command_without_what_it_needs_shows_its_help(command):
    done = tokprune_cli(command)
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.startswith(f"Usage: tokprune {command}")


BAD_COMMANDS = {
    "method": (["--methods", "vtc_csl"], "Did you mean 'vtc_cls'"),
    "option of a method": (["--methods", "fopru:rows=1"], "has no option 'rows'"),
    "ratio": (["--keep", "25"], "did you mean --keep 0.25?"),
    "no ratio": (["--keep", "half"], "--keep 0.5,0.25"),
    "task": (["--task", "findt"], "Did you mean 'findit'"),
    "model": (["--model", "/no/such/folder"], "cannot load '/no/such/folder'"),
    "limit": (["--limit", "0"], "invalid --limit 0: use a whole number of at least 1"),
    "unknown flag": (["--keeep", "0.5"], "--keep"),
    "no number": (["--limit", "many"], "integer. See tokprune compare --help"),
    "flag without a value": (["--limit"], "See tokprune compare --help"),
    "match": (["--match", "tokenz"], "use tokens or flops"),
    "folder": (["--out", "/proc/no/out", "--limit", "1"], "name another folder with --out"),
}


def test_cli_refuses_two_tasks_of_one_name(folder, tmp_path):
    done = tokprune_cli("compare", "--task", str(folder), "--task", str(folder), "--out", str(tmp_path / "out"))
    assert (done.returncode, "named alike" in done.stderr) == (2, True)


def test_cli_broken_weights_are_one_line(tmp_path):
    for file in EMBEDDED_MODEL.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    done = tokprune_cli("compare", "--model", str(tmp_path), "--limit", "1")
    assert "cannot load" in refusal(done)


@pytest.mark.parametrize("what", BAD_COMMANDS)
def test_cli_answers_bad_input_in_one_line(what):
    arguments, fix = BAD_COMMANDS[what]
    done = tokprune_cli("compare", *arguments)
    assert fix in refusal(done)


def test_cli_model_that_is_no_supported_family(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path)
    done = tokprune_cli("compare", "--model", str(tmp_path))
    assert ", ".join(tokprune.list_models()) in refusal(done)


# ---- runs that are cut off

TIMES = ("prefill_ms_p20", "prefill_ms_p50", "prefill_ms_p80", "prefill_ratio", "decode_ms_per_token_p50", "date")
RUN = ["--task", "findit", "--limit", "24", "--methods", "none,vtc_cls,blind", "--keep", "0.25", "--batch-size", "4"]
RUN += ["--no-controls"]
N_ANSWERS = 4 * 24


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def assert_same_run(out: Path, reference: Path) -> None:
    assert without_times(jsonl(out / "rows.jsonl")) == without_times(jsonl(reference / "rows.jsonl"))
    answers = [sorted(path.read_text().splitlines()) for path in (out / "samples.jsonl", reference / "samples.jsonl")]
    assert answers[0] == answers[1]
    assert len(answers[0]) == len(set(answers[0])) == N_ANSWERS


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    done = tokprune_cli("compare", *RUN, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out


def kill_at(out: Path, n_lines: int) -> None:
    """Start the run, and SIGKILL it as soon as so many answers are written."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "tokprune.cli", "compare", *RUN, "--out", str(out)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = out / "samples.jsonl"
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < n_lines):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_compare_killed_at_a_random_moment_goes_on(seed, uninterrupted, tmp_path):
    moment = random.Random(seed).randrange(1, N_ANSWERS)
    kill_at(tmp_path, moment)
    assert not (tmp_path / "rows.jsonl").exists()
    there = len(jsonl(tmp_path / "times.jsonl"))
    assert there >= (moment - 1) // 4 - 1
    done = tokprune_cli("compare", *RUN, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not there or "are not asked for again" in done.stdout
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "torn", [{"samples.jsonl": 100, "times.jsonl": 10}, {"samples.jsonl": 100}, {"times.jsonl": 10}]
)
def test_compare_with_a_torn_line_goes_on(torn, uninterrupted, tmp_path):
    """A kill in the middle of a write leaves a part of a line; a batch without its time does not count."""
    for name in ("run.json", "samples.jsonl", "times.jsonl"):
        (tmp_path / name).write_bytes((uninterrupted / name).read_bytes())
    for name, cut in torn.items():
        os.truncate(tmp_path / name, (tmp_path / name).stat().st_size - cut)
    done = tokprune_cli("compare", *RUN, "--out", str(tmp_path))
    assert f"{N_ANSWERS - 4} answers are in" in done.stdout
    assert_same_run(tmp_path, uninterrupted)


def test_compare_finished_asks_nothing_again(uninterrupted):
    before = (uninterrupted / "rows.jsonl").read_text()
    done = tokprune_cli("compare", *RUN, "--out", str(uninterrupted))
    assert f"{N_ANSWERS} answers are in" in done.stdout
    assert (uninterrupted / "rows.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--batch-size", "8"], "batch_size"),
        (["--suffix", " now"], "suffix"),
    ],
    ids=str,
)
def test_compare_refuses_a_folder_of_other_settings(change, named, uninterrupted):
    before = {path.name: path.read_bytes() for path in uninterrupted.iterdir()}
    line = refusal(tokprune_cli("compare", *changed(RUN, *change), "--out", str(uninterrupted)))
    assert f"other settings ({named}:" in line
    assert "--overwrite" in line
    assert {path.name: path.read_bytes() for path in uninterrupted.iterdir()} == before


def test_compare_overwrites_when_told_to(uninterrupted, tmp_path):
    for path in uninterrupted.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    short = ["--task", "findit", "--limit", "4", "--methods", "none", "--suffix", " now", "--out", str(tmp_path)]
    assert "other settings" in refusal(tokprune_cli("compare", *short))
    done = tokprune_cli("compare", *short, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert len(jsonl(tmp_path / "samples.jsonl")) == 2 * 4


@pytest.mark.slow
def test_compare_on_a_full_disk_loses_nothing(uninterrupted, tmp_path):
    limit = (uninterrupted / "samples.jsonl").stat().st_size // 2
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "tokprune.cli", "compare", *RUN, "--out", str(tmp_path)]
    full = subprocess.run(
        command,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert "make room and type the same command again" in refusal(full)
    assert 0 < len(jsonl(tmp_path / "samples.jsonl")) < N_ANSWERS
    assert tokprune_cli("compare", *RUN, "--out", str(tmp_path)).returncode == 0
    assert_same_run(tmp_path, uninterrupted)


def test_compare_meets_an_unreadable_picture_and_goes_on_after_it_is_replaced(folder, tmp_path):
    out = tmp_path / "out"
    good = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(b"broken")
    command = ["compare", "--task", str(folder), "--methods", "none,uniform", "--batch-size", "1", "--out", str(out)]
    assert "cannot read the picture" in refusal(tokprune_cli(*command))
    n_before = len(jsonl(out / "samples.jsonl"))
    assert n_before > 0
    (folder / "2.png").write_bytes(good)
    done = tokprune_cli(*command)
    assert done.returncode == 0, done.stderr
    assert f"{n_before} answers are in" in done.stdout


def test_compare_names_the_line_of_a_missing_field(folder, tmp_path):
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text(lines[0] + '\n{"file_name": "1.png", "question": "q"}\n')
    out = tmp_path / "out"
    assert "line 2 lacks answer" in refusal(tokprune_cli("compare", "--task", str(folder), "--out", str(out)))
    assert not out.exists()


def test_compare_refuses_other_pictures_of_the_same_names(folder, tmp_path):
    command = ["compare", "--task", str(folder), "--methods", "none", "--out", str(tmp_path / "out")]
    assert tokprune_cli(*command).returncode == 0
    before = (tmp_path / "out" / "samples.jsonl").read_bytes()
    Image.new("RGB", (50, 40), "yellow").save(folder / "0.png")
    assert "pictures of" in refusal(tokprune_cli(*command))
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == before


def test_compare_refuses_another_prompt(folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED_MODEL, model)
    command = ["compare", "--model", str(model), "--task", str(folder), "--methods", "none"]
    command += ["--out", str(tmp_path / "out")]
    assert tokprune_cli(*command).returncode == 0
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("ASSISTANT:", "ASSISTANT: :"))
    assert "other settings (prompt:" in refusal(tokprune_cli(*command))


@pytest.mark.parametrize(
    ("name", "content", "fix"),
    [
        ("run.json", b"[]", "is no JSON object"),
        ("run.json", b"{", "cannot be read"),
    ],
)
def test_compare_on_a_broken_folder_is_one_line(name, content, fix, uninterrupted, tmp_path):
    for path in uninterrupted.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(content)
    line = refusal(tokprune_cli("compare", *RUN, "--out", str(tmp_path)))
    assert fix in line
    assert "--overwrite" in line


def test_rows_name_no_commit_where_git_is_missing(monkeypatch):
    from tokprune.eval.run.rows import commit

    monkeypatch.setenv("PATH", "/nonexistent")
    assert commit() is None


def test_near_ratios_have_labels_of_their_own():
    from tokprune.eval.run.rows import Config

    assert Config("uniform", 0.25).label == "uniform@0.25"
    assert Config("uniform", 0.25).label != Config("uniform", 0.25000001).label


def test_two_processes_cannot_write_one_run(tmp_path):
    from tokprune.eval.run.folder import RunFolder

    from tokprune.core.errors import RunError

    first = RunFolder(tmp_path, {"a": 1})
    with pytest.raises(RunError, match="another process"):
        RunFolder(tmp_path, {"a": 1})
    first.close()
    RunFolder(tmp_path, {"a": 1}).close()
    with pytest.raises(RunError, match="a: 1 there, 2 now"):
        RunFolder(tmp_path, {"a": 2})
    (tmp_path / "run.json").write_text("{oops")
    with pytest.raises(RunError, match="start over with"):
        RunFolder(tmp_path, {"a": 1})
    (tmp_path / "run.json").unlink()
    with pytest.raises(RunError, match="without their settings"):
        RunFolder(tmp_path, {"a": 1})


# ---- flops


def test_flops_of_a_known_shape():
    done = tokprune_cli("flops", "--model", "llava-1.5-7b", "--visual", "576", "--text", "64", "--keep", "0.1111")
    assert done.returncode == 0, done.stderr
    assert "640 -> 128 tokens" in done.stdout
    for figure in ("8,504.30", "1,666.71", "19.6 %", "23.3 %", "320.0 MiB", "64.0 MiB", "3,328.60", "4,252.02"):
        assert figure in done.stdout, figure
    assert "4.6 % of the unpruned prefill" in done.stdout


def test_flops_by_layer_with_a_selector_and_crops():
    done = tokprune_cli("flops", "--model", "llava-next-7b", "--visual", "2880", "--method", "vtc_cls", "--layers")
    assert "layer 31" in done.stdout
    assert "1,909.59" in done.stdout  # five crops of 381.92 GFLOPs
    assert "selector" in done.stdout


def test_flops_of_a_folder_is_that_of_its_configuration():
    done = tokprune_cli("flops", "--model", str(EMBEDDED_MODEL))
    assert done.returncode == 0, done.stderr
    assert "llava: 208 -> 100 tokens" in done.stdout
    assert tokprune_cli("flops", "--model", "tiny-llava").stdout == done.stdout


def test_flops_does_not_say_that_a_tower_is_as_dear_as_before_where_a_method_makes_it_cheaper():
    page = ("flops", "--model", "qwen2.5-vl-7b", "--pixels", "448x448", "--keep", "0.5,0.25", "--method")
    assert "cannot be saved" in tokprune_cli(*page, "divprune").stdout
    assert "cannot be saved" not in tokprune_cli(*page, "pixelprune").stdout


BAD_FLOPS = {
    "shape": (["--model", "llava-1.5-7"], "Did you mean 'llava-1.5-7b'"),
    "ratio": (["--model", "llava-1.5-7b", "--keep", "25"], "did you mean --keep 0.25?"),
    "tokens": (["--model", "llava-1.5-7b", "--visual", "0"], "invalid --visual 0: use a whole number of at least 1"),
    "method": (["--model", "llava-1.5-7b", "--method", "vtc"], "vtc_cls"),
    "folder": (["--model", "/no/such"], "cannot read the configuration of '/no/such'"),
    "no [CLS] token": (["--model", "onevision-7b", "--method", "vtc_cls"], "use vtc_cls:without_cls=received"),
    "percent": (["--model", "llava-1.5-7b", "--keep", "50%,25 %"], "use --keep 0.5,0.25"),
    "no fraction": (["--model", "llava-1.5-7b", "--keep", "half"], "use --keep 0.5,0.25"),
    "no size": (["--model", "qwen2.5-vl-7b", "--frames", "4"], "--frames needs the size of a frame"),
}


@pytest.mark.parametrize("what", BAD_FLOPS)
def test_flops_answers_bad_input_in_one_line(what):
    arguments, fix = BAD_FLOPS[what]
    assert fix in refusal(tokprune_cli("flops", *arguments))


def test_flops_of_a_tower_that_takes_any_size():
    done = tokprune_cli("flops", "--model", "qwen2.5-vl-7b", "--visual", "324", "--method", "blind")
    assert "388 -> 64 tokens" in done.stdout
    assert "1,683.06" in done.stdout  # a quarter of the patches: less than a quarter of 7,145, for attention


# ---- explain


@pytest.fixture
def scene(tmp_path) -> Path:
    path = tmp_path / "scene.png"
    FindIt().image("test-3").save(path)
    return path


def test_explain_draws_kept_cells_bright_and_dropped_ones_dark(scene):
    import numpy as np
    from tokprune.eval.report.explained import explained
    from tokprune.eval.run.runner import Runner

    from tokprune.prune.explain import _GAP, _TITLE, DIM, seen
    from tokprune.prune.pictures import open_picture

    runner, picture = Runner.load(str(EMBEDDED_MODEL)), open_picture(scene)
    methods = [("vtc_cls", {"keep_ratio": 0.25}), ("random:seed=1", {"keep_ratio": 0.11}), ("blind", {})]
    sheet, lines = explained(runner, picture, "what is in the image?", methods)
    pixels, side = np.asarray(sheet).astype(int), 4 * 96  # four times enlarged
    panels = [
        pixels[_GAP + _TITLE : _GAP + _TITLE + side, left : left + side]
        for left in (_GAP + i * (side + _GAP) for i in range(4))
    ]
    assert (panels[0][::4, ::4] == np.asarray(picture)).all()  # 96 x 96 pictures pass the processor as they are
    cells = [panel.reshape(12, 32, 12, 32, 3).transpose(0, 2, 1, 3, 4).reshape(144, -1) for panel in panels]
    for mine, n_kept, line in zip(cells[1:], (36, 16, 0), lines, strict=True):
        unchanged = (mine == cells[0]).all(1)
        dark = (mine == (cells[0] * DIM).astype(int)).all(1)
        assert (unchanged.sum(), dark.sum()) == (n_kept, 144 - n_kept)
        assert f"144 -> {n_kept} each" in line
    inputs = runner.processor(images=[picture], text=[runner.prompt("what is it?")], return_tensors="pt")
    processor = runner.processor.image_processor
    assert (
        np.asarray(seen(inputs["pixel_values"][0], processor.image_mean, processor.image_std)) == np.asarray(picture)
    ).all()
    import torch

    with tokprune.attach(runner.model, "vtc_cls", keep_ratio=0.25) as attachment, torch.no_grad():
        runner.model(**inputs)
        (kept,) = attachment.kept
    assert (cells[1] == cells[0]).all(1).nonzero()[0].tolist() == kept.tolist()


def test_explain_writes_a_picture(scene, tmp_path):
    from tokprune.eval.report.drawing import LINE

    out = tmp_path / "kept.png"
    methods = ["--method", "vtc_cls,fopru", "--method", "random"]
    done = tokprune_cli("explain", str(scene), *methods, "--keep", "0.25", "--out", str(out))
    assert done.returncode == 0, done.stderr
    with Image.open(out) as picture:
        assert picture.size == (4 * 384 + 5 * 12, 384 + 22 + 2 * 12 + 2 * LINE)  # question and answer below
    assert done.stdout.count("144 -> 36 each") == 3


BAD_EXPLAIN = {
    "picture": (["nothing.png"], "cannot read the picture nothing.png"),
    "method": (["SCENE", "--method", "vtc"], "vtc_cls"),
    "ratio": (["SCENE", "--keep", "2"], "did you mean --keep 0.02?"),
    "out": (["SCENE", "--out", "/proc/no.png"], "use another file for --out"),
    "placeholder": (["SCENE", "--question", "<image> what?"], "leave <image> out"),
    "header alone": (["HEADER"], "cannot read the picture"),
}


@pytest.mark.parametrize("what", BAD_EXPLAIN)
def test_explain_answers_bad_input_in_one_line(what, scene):
    arguments, fix = BAD_EXPLAIN[what]
    header = scene.parent / "header.ppm"
    header.write_bytes(b"P6\n5")
    paths = {"SCENE": str(scene), "HEADER": str(header)}
    assert fix in refusal(tokprune_cli("explain", *(paths.get(a, a) for a in arguments)))


def test_explain_refuses_a_decompression_bomb(scene, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "cannot read the picture" in refusal(tokprune_cli("explain", str(scene)))


def test_explain_draws_a_grid_that_ends_before_the_picture_does():
    """A side of 27 pixels holds six patches of four; the last three pixels belong to no token."""
    import numpy as np

    from tokprune.prune.explain import dimmed

    whole = Image.fromarray(np.full((27, 27, 3), 200, np.uint8))
    drawn = np.asarray(dimmed(whole.crop((0, 0, 24, 24)), grid_layout(6, 6), torch.arange(35)))
    assert (drawn[:20] == 200).all()
    assert (drawn[20:, 20:] == 60).all()


# ---- doctor


def test_doctor_finds_a_healthy_installation():
    done = tokprune_cli("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    for name in METHODS.own_names():
        built = tokprune.get_method(name)
        if built.needs_file or built.space == "pixels":
            assert f" {name} " not in done.stdout
            continue
        behind = "fastv" if built.stage is Stage.DECODER else "vtc_cls"
        label = f"{name}+{behind}" if built.is_filter else name
        kept_all = f"ok     {label} runs: keeps all 144 visual tokens of these pictures, as it may" in done.stdout
        assert f"ok     {label} prunes: visual tokens 144 -> " in done.stdout or (kept_all and not built.takes_budget)
    assert "144 -> 144" not in done.stdout
    assert "visual_exit runs" in done.stdout
    assert "transformers" in done.stdout


def in_generate_alone(before):
    """Shortener that works in a plain forward and does nothing in generate."""
    return lambda self, module, args, kwargs: (
        None if cache_of(kwargs) is not None else before(self, module, args, kwargs)
    )


SABOTAGE = {
    "no compaction": (shorten.Shortener, "install", lambda _: lambda self, stack: None),
    "nothing marked": (selection, "mark_dropped", lambda _: lambda features, keep: features),
    "not in generate": (shorten.Shortener, "before", in_generate_alone),
    "one token kept": (Budget, "n_keep", lambda _: lambda self, n_visual, flops=None, least=1: 1),
    "padding mask lost": (columns.Columns, "inner_mask", lambda _: lambda self, mask, n_outer: None),
    "kept features zeroed": (selection, "mark_dropped", lambda mark: lambda f, keep: mark(torch.zeros_like(f), keep)),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SABOTAGE)
def test_doctor_sees_that_pruning_does_not_work(monkeypatch, what):
    owner, name, broken = SABOTAGE[what]
    monkeypatch.setattr(owner, name, broken(getattr(owner, name)))
    done = tokprune_cli("doctor")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.count("FAILED") >= 5
    assert "do not trust a number" in done.stderr


@pytest.mark.slow
def test_doctor_exits_with_1_as_a_process():
    code = "import tokprune.integrations.transformers.shorten as c; c.Shortener.install = lambda self, stack: None; "
    code += "import sys; sys.argv = ['tokprune', 'doctor']; from tokprune.cli import main; main()"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


# ---- methods that decide by themselves, and near misses


def test_cli_budgets_of_methods_that_decide_are_refused_with_what_to_type(scene, tmp_path):
    out = ["--out", str(tmp_path / "kept.png")]
    done = tokprune_cli("explain", str(scene), "--method", "prumerge", "--keep", "0.1", *out)
    assert "use prumerge:adaptive=false" in refusal(done)
    assert tokprune_cli("explain", str(scene), "--method", "prumerge", *out).returncode == 0
    done = tokprune_cli("flops", "--model", "llava-next-7b", "--method", "prumerge")
    assert "use prumerge:adaptive=false" in refusal(done)


def test_cli_misspelt_embedded_model_offers_the_nearest():
    assert "Did you mean 'tiny-llava-next'?" in refusal(tokprune_cli("compare", "--model", "tiny-llava-nxt"))


def test_cli_flops_says_what_it_assumed():
    done = tokprune_cli("flops", "--model", "llava-next-7b", "--visual", "2880", "--method", "globalcom2")
    assert "2880 visual tokens (5 crops" in done.stdout
    assert "< 0.01" in done.stdout  # a selector that costs next to nothing is not one that was not counted
    assert "576 visual tokens (1 crop;" in tokprune_cli("flops", "--model", "llava-next-7b").stdout
