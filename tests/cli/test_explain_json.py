"""`tokprune explain --json`: the kept indices, where they lie, and that they can be replayed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from commands import refusal, tokprune_cli
from PIL import Image
from tokprune.eval.report.explained import asked, explained
from tokprune.eval.run.runner import EMBEDDED_MODEL, Runner
from tokprune.eval.tasks.findit import FindIt

import tokprune
from tokprune.prune.pictures import open_picture

QUESTION = "what color is the circle?"
METHODS = "vtc_cls:start_layer=1,damro_filter+fopru,pool,blind,fastv,vtc_cls+pyramiddrop:schedule=pyramid/2/5"
REPLAYED = [i for i, spec in enumerate(METHODS.split(",")) if spec != "pool"]


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    FindIt().image("test-3").save(path)
    return path


@pytest.fixture(scope="module")
def written(scene) -> tuple[dict, str]:
    """The values of a file, and what was printed."""
    path = scene.parent / "kept.json"
    arguments = ("--method", METHODS, "--question", QUESTION, "--json", str(path))
    done = tokprune_cli("explain", str(scene), *arguments)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(scene.parent)) == ["kept.json", "scene.png"]  # no PNG
    return json.loads(path.read_text()), done.stdout


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner.load(str(EMBEDDED_MODEL))


def inputs_of(runner, path, question=QUESTION):
    return runner.processor(images=[Image.open(path)], text=[runner.prompt(question)], return_tensors="pt")


def replay_of(kept):
    """As the documentation says."""
    if isinstance(kept, dict):
        return {int(layer): torch.tensor(rows, dtype=torch.int64) for layer, rows in kept.items()}
    return torch.tensor(kept, dtype=torch.int64)


def test_file_says_what_was_asked_and_printed(written, scene):
    values, printed = written
    assert (values["format"], values["format_version"]) == ("tokprune-kept", 1)
    assert (values["model"], values["image"], values["question"]) == ("tiny-llava", str(scene), QUESTION)
    assert values["versions"]["tokprune"] == tokprune.__version__
    assert {"python", "torch", "transformers", "device"} < values["versions"].keys()
    assert [m["spec"] for m in values["methods"]] == METHODS.split(",")
    assert [m["budget"] for m in values["methods"]] == [
        {"keep_ratio": 0.25} if m != "blind" else {} for m in METHODS.split(",")
    ]
    question, unpruned, *answers = printed.splitlines()[:8]
    assert (question, unpruned) == (f"question: {QUESTION}", f"unpruned: {values['answer']}")
    assert printed.splitlines()[8:-1] == [m["report"] for m in values["methods"]]
    for line, one in zip(answers, values["methods"], strict=True):
        budget = "".join(f" {value:g}" for value in one["budget"].values())
        other = "" if one["answer"] == values["answer"] else " (another answer)"
        assert line == f"{one['spec']}{budget}: {one['answer']}{other}"
    assert printed.splitlines()[-1].endswith("kept.json: kept indices of 6 methods")


def test_file_holds_what_attachments_kept(written, scene, runner):
    for one in written[0]["methods"]:
        with tokprune.attach(runner.model, one["spec"], **one["budget"]) as attachment, torch.no_grad():
            runner.model(**inputs_of(runner, scene))
            (kept,), (image,) = attachment.kept, attachment.report.images
        found = replay_of(one["kept"])
        if isinstance(kept, dict):
            assert found.keys() == kept.keys()
            assert all(torch.equal(found[layer], kept[layer]) for layer in kept)
        else:
            assert torch.equal(found, kept)
        assert (one["n_rows"], one["n_visual"], one["n_kept"]) == (144, 144, image.n_kept)
        assert one["n_kept"] == {"blind": 0}.get(one["spec"], 36)
        assert [t["index"] for t in one["tokens"]] == image.left.tolist()
        assert all((t["crop"], t["row"], t["column"]) == (0, *divmod(t["index"], 12)) for t in one["tokens"])
        assert (one["newlines"], one["grids"]) == ([], [[12, 12]])


@pytest.mark.parametrize("i", REPLAYED)
@torch.no_grad()
def test_what_the_file_holds_generates_the_same_when_replayed(i, written, scene, runner):
    one, inputs = written[0]["methods"][i], inputs_of(runner, scene)
    with tokprune.attach(runner.model, one["spec"], **one["budget"]):
        want = runner.model(**inputs).logits[:, -1], runner.model.generate(**inputs, max_new_tokens=8)
    with tokprune.attach(runner.model, one["spec"], replay=[replay_of(one["kept"])]) as attachment:
        assert torch.equal(runner.model(**inputs).logits[:, -1], want[0])
        assert torch.equal(runner.model.generate(**inputs, max_new_tokens=8), want[1])
        assert attachment.report.images[0].n_kept == one["n_kept"]


def test_crops_and_newlines_of_an_any_resolution_model(tmp_path):
    runner = Runner.load("tiny-llava-next")
    picture = Image.new("RGB", (150, 96), "white")
    picture.putpixel((3, 3), (255, 0, 0))
    found = asked(runner, picture, "what is it?", [("globalcom2", {"keep_ratio": 0.2}), ("fastv", {"keep_ratio": 0.2})])
    values = json.loads(json.dumps(found.to_dict()))
    for one, shown in zip(values["methods"], found.shown, strict=True):
        layout = shown.image.layout
        left = shown.image.left.tolist()
        assert sorted([t["index"] for t in one["tokens"]] + one["newlines"]) == left
        assert one["newlines"] == [i for i in left if layout.crop[i] == -1] != []
        assert {t["crop"] for t in one["tokens"]} > {0}
        for t in one["tokens"]:
            height, width = one["grids"][t["crop"] > 0]
            assert (t["crop"], t["row"], t["column"]) == tuple(
                getattr(layout, name)[t["index"]] for name in ("crop", "row", "column")
            )
            assert 0 <= t["row"] < height
            assert 0 <= t["column"] < width
        assert one["n_rows"] == one["n_visual"] + layout.n_newlines
    assert [isinstance(one["kept"], dict) for one in values["methods"]] == [False, True]


def test_both_files_and_the_picture_that_is_drawn(scene, tmp_path, monkeypatch, runner):
    out, path = tmp_path / "a.png", tmp_path / "a.json"
    common = ("explain", str(scene), "--method", "fopru", "--keep", "0.5")
    assert tokprune_cli(*common, "--out", str(out), "--json", str(path)).returncode == 0
    assert json.loads(path.read_text())["methods"][0]["budget"] == {"keep_ratio": 0.5}
    sheet, _ = explained(runner, open_picture(scene), "what is in the image?", [("fopru", {"keep_ratio": 0.5})])
    with Image.open(out) as picture:
        assert picture.tobytes() == sheet.tobytes()
    monkeypatch.chdir(tmp_path)
    assert tokprune_cli(*common).returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.png", "kept.png"]
    assert Path("kept.png").read_bytes() == out.read_bytes()


BAD = {
    "a folder that is not there": (
        ["--json", "/proc/no/a.json"],
        "cannot write /proc/no/a.json: .*another file for --json",
    ),
    "a folder": (["--json", "FOLDER"], "cannot write .*use another file for --json"),
    "the picture": (["--json", "SCENE"], "the picture and --json are both .*use another file for --json"),
    "a link to the picture": (["--json", "LINK"], "the picture and --json are both"),
    "the picture for the PNG": (["--out", "SCENE"], "the picture and --out are both .*use another file for --out"),
    "one file for both": (["--out", "a.x", "--json", "./a.x"], "--out and --json are both"),
}


@pytest.mark.parametrize("what", BAD)
def test_files_that_cannot_be_written_are_one_line(what, tmp_path):
    arguments, said = BAD[what]
    scene, link = tmp_path / "scene.png", tmp_path / "link.json"
    FindIt().image("test-3").save(scene)
    os.link(scene, link)
    before, names = scene.read_bytes(), sorted(os.listdir(tmp_path))
    paths = {"SCENE": str(scene), "LINK": str(link), "FOLDER": str(tmp_path)}
    line = refusal(tokprune_cli("explain", str(scene), *(paths.get(a, a) for a in arguments)))
    assert re.search(said, line), line
    assert scene.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == names


def test_a_file_that_is_there_stays_where_writing_fails(scene, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("mine")

    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert "No space left on device" in refusal(tokprune_cli("explain", str(scene), "--json", str(path)))
    assert path.read_text() == "mine"
    assert os.listdir(tmp_path) == ["a.json"]
