"""`tokprune explain`: answers, ratios, pictures, merged tokens, scores, and crop labels."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from commands import refusal, tokprune_cli
from PIL import Image
from tokprune.eval.report import drawing, explained
from tokprune.eval.run.runner import Runner
from tokprune.eval.tasks.findit import FindIt

import tokprune
from tokprune.core.layout import Layout, Region
from tokprune.core.scores import listen

QUESTION = "what color is the circle?"


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner.load("tiny-llava")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return FindIt().image("test-3")


def read(*arguments: str, path) -> tuple[dict, str]:
    done = tokprune_cli("explain", *arguments, "--json", str(path))
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


# ---- answers, ratios, pictures


def test_answers_are_those_of_the_model(runner, picture, tmp_path):
    """Generated here, with and without pruning, from the same prompt."""
    picture.save(tmp_path / "a.png")
    arguments = (str(tmp_path / "a.png"), "--method", "vtc_cls,blind", "--keep", "0.25", "--question", QUESTION)
    values, shown = read(*arguments, path=tmp_path / "a.json")
    inputs = runner.processor(images=[picture], text=[runner.prompt(QUESTION)], return_tensors="pt")

    def answer() -> str:
        out = runner.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return runner.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    bare = answer()
    with tokprune.attach(runner.model, "vtc_cls", keep_ratio=0.25):
        pruned = answer()
    with tokprune.attach(runner.model, "blind"):
        blind = answer()
    assert (values["answer"], [m["answer"] for m in values["methods"]]) == (bare, [pruned, blind])
    assert blind != bare == pruned  # so that the picture tells them apart
    assert f"unpruned: {bare}\nvtc_cls 0.25: {pruned}\nblind: {blind} (another answer)\n" in shown


def test_several_pictures_and_ratios(picture, tmp_path):
    for name in "ab":
        picture.save(tmp_path / f"{name}.png")
    files = [str(tmp_path / f"{name}.png") for name in "ab"]
    out = tmp_path / "kept.png"
    common = ("--method", "vtc_cls,fopru", "--keep", "0.5,0.25,0.1")
    values, shown = read(*files, *common, "--out", str(out), path=tmp_path / "a.json")
    assert [p["image"] for p in values["pictures"]] == files
    for one in values["pictures"]:
        assert [(m["spec"], m["n_kept"]) for m in one["methods"]] == [
            (spec, n) for spec in ("vtc_cls", "fopru") for n in (72, 36, 14)
        ]
    assert [line for line in shown.splitlines() if line.endswith(".png:")] == [f"{file}:" for file in files]
    with Image.open(out) as sheet:
        assert sheet.width == 4 * 384 + 5 * 12  # the picture, and a column a ratio
        assert sheet.height > 4 * 384  # a line a method, for each picture
    one, _ = read(files[0], *common, path=tmp_path / "b.json")
    assert one == values["pictures"][0]


def test_an_animation_is_of_one_video(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    scene = str(tmp_path / "a.png")
    assert "takes one video" in refusal(tokprune_cli("explain", scene, scene, "--animation", str(tmp_path / "a.gif")))
    assert "did you mean --keep 0.25?" in refusal(tokprune_cli("explain", scene, "--keep", "0.5,25"))


def test_a_picture_of_several_is_not_written_over(picture, tmp_path):
    for name in "ab":
        picture.save(tmp_path / f"{name}.png")
    files = [str(tmp_path / f"{name}.png") for name in "ab"]
    assert "picture 2 and --out are both" in refusal(tokprune_cli("explain", *files, "--out", files[1]))


# ---- merged tokens


@torch.no_grad()
def entering(runner, inputs) -> torch.Tensor:
    """Embeddings that the language model is called with."""
    found = []
    model = runner.model.model.language_model
    hook = model.register_forward_pre_hook(lambda m, a, k: found.append(k["inputs_embeds"][0]), with_kwargs=True)
    runner.model(**inputs)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("spec", ["visionzip", "tome", "prumerge:adaptive=false"])
def test_merged_tokens_are_those_that_come_from_nowhere(spec, runner, picture):
    """Kept tokens whose embedding is none of the unpruned ones."""
    found = explained.asked(runner, picture, QUESTION, [(spec, {"keep_ratio": 0.25})]).shown[0]
    inputs = runner.inputs([QUESTION], [picture])
    ids = inputs["input_ids"][0]
    first = int((ids == runner.model.config.image_token_id).nonzero()[0])
    bare = entering(runner, inputs)[first : first + 144]
    with tokprune.attach(runner.model, spec, keep_ratio=0.25):
        given = entering(runner, inputs)[first : first + 36]
    there = {i for i, row in enumerate(bare) if any(torch.allclose(row, g, rtol=1e-5, atol=1e-6) for g in given)}
    assert set(found.merged) == set(found.image.kept.tolist()) - there
    assert found.merged
    if spec == "visionzip":
        assert len(found.merged) == 6 + 1  # ten of 64 gather others, and [CLS] has a place


def test_methods_that_merge_nothing_have_no_merged_tokens(runner, picture):
    budget = {"keep_ratio": 0.25}
    found = explained.asked(runner, picture, QUESTION, [(m, budget) for m in ("vtc_cls", "fastv")])
    assert [one.merged for one in found.shown] == [(), ()]


def test_merged_tokens_are_framed(runner, picture):
    found = explained.asked(runner, picture, QUESTION, [("visionzip", {"keep_ratio": 0.25})])
    plain, marked = (np.asarray(found._kept_panel(found.shown[0], marks).picture) for marks in (False, True))
    cells = (plain != marked).any(2).reshape(12, 32, 12, 32).transpose(0, 2, 1, 3).reshape(144, -1)
    assert set(cells.any(1).nonzero()[0]) == set(found.shown[0].merged)
    assert not cells.all(1).any()  # what a token shows stays visible


# ---- scores


def test_scores_are_those_that_choose(runner, picture):
    """The kept tokens are the highest ones; what is drawn is their order."""
    found = explained.asked(runner, picture, QUESTION, [("fastervlm", {"keep_ratio": 0.25})], scores=True).shown[0]
    assert sorted(found.scores) == list(range(144))
    highest = sorted(found.scores, key=lambda i: -found.scores[i])[:36]
    assert sorted(highest) == found.image.kept.tolist()
    assert found.to_dict()["scores"] == [found.scores[i] for i in range(144)]


def test_scores_between_layers_are_of_the_first_cut(runner, picture):
    found = explained.asked(runner, picture, QUESTION, [("fastv", {"keep_ratio": 0.25})], scores=True).shown[0]
    highest = sorted(found.scores, key=lambda i: -found.scores[i])[:36]
    assert sorted(highest) == found.image.left.tolist()


def test_methods_without_scores_have_no_panel_of_them(runner, picture):
    found = explained.asked(runner, picture, QUESTION, [("divprune", {"keep_ratio": 0.25})], scores=True)
    assert found._panels(True)[2] is None
    assert "scores" not in found.to_dict()["methods"][0]
    assert "it has no scores of single tokens" in found._panels(True)[1].caption


def test_nobody_keeps_scores_without_a_listener(runner, picture):
    inputs = runner.inputs([QUESTION], [picture])
    with torch.no_grad(), tokprune.attach(runner.model, "vtc_cls", keep_ratio=0.25):
        with listen() as found:
            runner.model(**inputs)
        runner.model(**inputs)
    assert [scored.scores.shape for scored in found] == [(1, 144)]


def test_ranks_and_colours_by_hand():
    assert drawing.ranks_of({3: 5.0, 7: -1.0, 8: 5.0, 9: 0.0}) == {3: 1.0, 7: 0.0, 8: 1.0, 9: 0.5}
    assert drawing.ranks_of({1: 2.0}) == {1: 0.0}
    assert drawing.ranks_of({}) == {}
    light = [sum(drawing.colour(rank / 10)) for rank in range(11)]
    assert light == sorted(light)  # readable without colours
    grey = drawing.heated(Image.new("RGB", (20, 10), (100, 100, 100)), Region(1, 2, (4, 5)), {5: 1.0})
    assert grey.getpixel((3, 3)) == (100, 100, 100)
    assert grey.getpixel((13, 3)) == tuple(round(0.28 * 100 + 0.72 * c) for c in (250, 230, 60))


# ---- labels and sheets


def test_crops_are_numbered_at_their_corners():
    """Four crops of 2 x 2 tokens, drawn on 80 x 80 pixels."""
    places = [(1 + r // 2 * 2 + c // 2, r, c) for r in range(4) for c in range(4)]
    crop, row, column = zip(*places, strict=True)
    layout = Layout(crop, row, column, (2, 2))
    drawn = np.asarray(drawing.labelled(Image.new("RGB", (80, 80), (9, 9, 9)), layout, layout.regions[0]))
    for top, left in ((0, 0), (0, 40), (40, 0), (40, 40)):
        assert (drawn[top + 1, left + 1] == 0).all()  # the black of a label
        assert (drawn[top + 39, left : left + 40] == 255).all()  # the lower border
    assert (drawn[30, 30] == 9).all()
    single = Image.new("RGB", (8, 8))
    assert drawing.labelled(single, Layout((0,) * 4, (0, 0, 1, 1), (0, 1, 0, 1)), Region(2, 2, (0, 1, 2, 3))) is single


def test_captions_wrap_and_titles_are_cut():
    lines = drawing.wrapped("what is to the left of the yellow triangle that lies below the ring?", 150)
    assert " ".join(lines) == "what is to the left of the yellow triangle that lies below the ring?"
    assert len(lines) > 1
    assert all(drawing._font(13).getlength(line) <= 150 for line in lines)
    long = drawing.wrapped("word " * 100, 150)
    assert (len(long), long[-1][-1]) == (3, "…")
    assert drawing._font(13).getlength(drawing._cut("x" * 200, 100)) <= 100


def test_sheets_leave_places_empty():
    panel = drawing.Panel("a", Image.new("RGB", (50, 40), "red"))
    drawn = np.asarray(drawing.sheet(drawing.in_rows(panel, [panel] * 3, 2)))
    assert drawn.shape == (2 * (22 + 40) + 3 * 12, 3 * 50 + 4 * 12, 3)
    red = (drawn == (255, 0, 0)).all(2)
    assert red.sum() == 4 * 50 * 40
    assert not red[12 + 22 + 40 + 12 :, : 12 + 50].any()  # below the first one
