"""The any-resolution model that ships: its task, its training, its picture, its comparison."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokprune.eval.models import EMBEDDED, OF_VIDEOS, path_of
from tokprune.eval.models.training import anyres, language, recipe
from tokprune.eval.report import paired
from tokprune.eval.report.explained import explained
from tokprune.eval.run.rows import BARE, Config
from tokprune.eval.run.runner import Runner
from tokprune.eval.tasks import findit_hd, load_task, stratified
from typer.testing import CliRunner

import tokprune
from tokprune.cli import commands as cli
from tokprune.core.errors import RunError
from tokprune.core.tokens import Stage
from tokprune.methods import METHODS

# ---- the task


def test_findit_hd_is_the_same_everywhere():
    pictures = [findit_hd.draw("test", i) for i in range(4)]
    assert [image.shape[:2] for image, _ in pictures] == [(192, 192), (144, 192), (192, 192), (192, 144)]
    assert int(sum(image.astype(int).sum() for image, _ in pictures)) == FROZEN_PIXELS
    assert [s.question for s in findit_hd.FindItHD(n_scenes=1).samples()] == FROZEN_QUESTIONS


FROZEN_PIXELS = 56111501
FROZEN_QUESTIONS = ["what shape is blue?", "is there a blue square?"]


def test_findit_hd_shapes_are_huddled_in_one_or_two_quarters_and_cross_no_middle():
    for index in range(60):
        image, shapes = findit_hd.draw("train", index)
        height, width = image.shape[0] / 2, image.shape[1] / 2
        quarters = {(s.y > height, s.x > width) for s in shapes}
        assert 1 <= len(quarters) <= 2
        assert len(shapes) >= 4
        for s in shapes:
            assert abs(s.x - width) > s.width / 2
            assert abs(s.y - height) > s.width / 2


def test_findit_hd_answers_are_true_and_known_words():
    for s in findit_hd.FindItHD("validation", n_scenes=60).samples():
        _, shapes = findit_hd.draw("validation", int(s.image_id.split("-")[1]))
        language.encode(f"{s.question} {s.answer}")
        words = s.question.rstrip("?").split()
        if s.kind == "colour":
            assert [o.colour for o in shapes if o.kind == words[-1]] == [s.answer]
        elif s.kind == "shape":
            assert [o.kind for o in shapes if o.colour == words[-1]] == [s.answer]
        else:
            assert (s.answer == "yes") == any((o.colour, o.kind) == (words[-2], words[-1]) for o in shapes)


# ---- training


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return recipe.build_next_model().eval()


@pytest.mark.parametrize("size", findit_hd.SIZES)
def test_places_are_those_of_the_layout(untrained, size):
    where = anyres.places(untrained.model, size)
    with tokprune.attach(untrained, "uniform", keep_ratio=1) as attachment, torch.no_grad():
        ids = torch.tensor([[recipe.BOS, *[recipe.IMAGE] * len(where)]])
        pixels = torch.randn(1, 5, 3, 96, 96)
        untrained(input_ids=ids, pixel_values=pixels, image_sizes=torch.tensor([size]))
        (image,) = attachment.report.images
    assert image.layout.crop == tuple(where[:, 0].tolist())


@torch.no_grad()
def test_packed_questions_over_crops_equal_single_prompts(untrained):
    """What the packed, masked, ragged row computes is what `generate` will compute for each question alone."""
    model, size = untrained, (144, 192)
    trainer = anyres.AnyResTrainer(model)
    x = torch.randn(2, 5, recipe.N_VISUAL, 128)
    questions = [[("what color is the ring?", "red", "colour")], [("what shape is red?", "ring", "shape")]]
    text, where = language.pack(questions), anyres.places(model.model, size)
    keep = torch.zeros(2, len(where), dtype=torch.bool)
    keep[0, ::7], keep[1, ::11] = True, True
    keep &= where[:, 0] >= 0
    keep |= anyres.newlines_of_rows(keep, where)
    kept, valid = anyres.ragged(keep)
    for contiguous in (False, True):
        packed = trainer(x, size, kept, valid, contiguous, text)
        single = []
        for row, ((question, answer, _),) in enumerate(questions):
            ids = language.encode(question) + [recipe.ASSISTANT] + language.encode(answer)
            words = model.get_input_embeddings()(torch.tensor([[recipe.BOS, recipe.USER, *ids]]))
            projected = trainer.projector(x[row : row + 1])
            visual = anyres.pack_rows(model.model, projected, size, model.model.image_newline)[:, keep[row]]
            embeds = torch.cat([words[:, :2], visual, words[:, 2:]], 1)
            n = embeds.shape[1]
            places = torch.arange(n) if contiguous else torch.arange(2 + len(where) + len(ids))
            if not contiguous:
                index = keep[row].nonzero()[:, 0]
                places = torch.cat([places[:2], index + 2, places[2 + len(where) :]])
            out = model.model.language_model(
                inputs_embeds=embeds, position_ids=places[None], attention_mask=torch.ones(1, n), use_cache=False
            )
            single.append(model.lm_head(out.last_hidden_state)[0, -(len(language.encode(answer)) + 1) :])
        torch.testing.assert_close(packed, torch.cat(single), rtol=1e-4, atol=1e-5)


def test_dropped_subsets_keep_the_newlines_of_their_rows(untrained):
    where = anyres.places(untrained.model, (192, 192))
    rng, sizes = np.random.default_rng(0), set()
    torch.manual_seed(0)
    for _ in range(60):
        kept, valid, _ = anyres.draw_kept(rng, torch.randn(2, len(where), 8), where)
        assert ((kept.diff(dim=1) > 0) | ~valid[:, 1:]).all()
        sizes.add(int(valid.sum(1).max()))
    assert len(sizes) > 20
    assert len(where) in sizes


def test_newlines_stay_with_the_rows_that_keep_a_token(untrained):
    where = anyres.places(untrained.model, (144, 192))
    keep = torch.zeros(1, len(where), dtype=torch.bool)
    row_two = [i for i, (crop, row, _) in enumerate(where.tolist()) if crop > 0 and row == 5]  # three are padding
    keep[0, row_two[3]] = keep[0, 5] = True  # and one of the thumbnail
    ends = (where[:, 0] < 0).nonzero()[:, 0].tolist()
    assert anyres.newlines_of_rows(keep, where)[0].nonzero()[:, 0].tolist() == [ends[2]]


def test_processor_crops_are_what_training_saw():
    """The exported processor's own crops are cut to the layout that training packed."""
    from PIL import Image

    image, _ = findit_hd.draw("train", 1)
    out = recipe.build_next_processor().image_processor(Image.fromarray(image), return_tensors="pt")
    assert out["pixel_values"].shape == (1, 5, 3, 96, 96)
    assert out["image_sizes"].tolist() == [[144, 192]]
    assert (out["pixel_values"][0, 1, :, :24] == out["pixel_values"][0, 2, :, :24]).all()  # the upper padding


# ---- the model


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner.load("tiny-llava-next")


def test_model_is_small_and_genuine(runner):
    from pathlib import Path

    assert sum(f.stat().st_size for f in Path(path_of("tiny-llava-next")).iterdir()) < 12e6
    assert type(runner.model).__name__ == "LlavaNextForConditionalGeneration"
    assert type(runner.processor).__name__ == "LlavaNextProcessor"


@pytest.mark.slow
def test_model_beats_its_floors_and_needs_its_crops(runner):
    from tokprune.eval.compare import configurations

    task = load_task("findit_hd")
    samples = stratified(task.samples(), 48)
    right = {}
    for config, rows, _ in runner.run(task, samples, configurations(["none", "blind", "globalcom2"], [0.1]), 24):
        right[config.label] = right.get(config.label, 0) + sum(r.right for r in rows)
        assert all(r.costs.prefill_flops_before > 5 * 0.3e9 for r in rows)  # five crops through the tower
    assert right["none"] > right["shuffled pictures"] + 20
    assert right["none"] > right["blind"] + 20
    assert right["globalcom2@0.1"] > right["blind"] + 10


@pytest.mark.slow
def test_crops_are_counted_by_the_model(runner):
    task = load_task("findit_hd")
    samples = task.samples()[:4]
    ids = [s.image_id for s in samples]
    whole, half = (runner.asked_about(task, samples, ids, config) for config in (None, Config("downsample")))
    assert [c.n for c in whole.crops] == [5] * 4
    assert [c.n for c in half.crops] == [3] * 4  # the least that LLaVA-NeXT makes of a picture: two crops
    assert max(half.n_visual) < 0.6 * min(whole.n_visual)


@torch.no_grad()
def test_explain_draws_crops_in_place(runner):
    """The thumbnail above, the picture of the crops below; kept cells unchanged, dropped ones dark."""
    from PIL import Image

    from tokprune.prune.explain import _GAP, _TITLE, DIM

    picture = Image.fromarray(findit_hd.draw("test", 1)[0])  # 144 high, 192 wide
    sheet, (line,) = explained(runner, picture, "what is it?", [("globalcom2", {"keep_ratio": 0.2})], marks=False)
    inputs = runner.processor(images=[picture], text=[runner.prompt("what is it?")], return_tensors="pt")
    with tokprune.attach(runner.model, "globalcom2", keep_ratio=0.2) as attachment:
        runner.model(**inputs)
        (image,) = attachment.report.images
    assert "newlines" in line
    pixels, width = np.asarray(sheet).astype(int), 384  # twice and four times enlarged
    left, top = [_GAP, 2 * _GAP + width], _GAP + _TITLE
    plain, marked = (pixels[top:, x : x + width] for x in left)
    assert (plain[384 + _GAP : 384 + _GAP + 288 : 2, ::2] == np.asarray(picture)).all()
    thumbnail, mosaic = image.layout.regions
    assert (mosaic.height, mosaic.width) == (18, 24)
    kept = set(image.kept.tolist())
    for region, y, cell in ((thumbnail, 0, 32), (mosaic, 384 + _GAP, 16)):
        for place, token in enumerate(region.index):
            row, column = divmod(place, region.width)
            rows, columns = slice(y + row * cell, y + (row + 1) * cell), slice(column * cell, (column + 1) * cell)
            before, after = plain[rows, columns], marked[rows, columns]
            assert (after == (before if token in kept else (before * DIM).astype(int))).all()


# ---- compare, pairs


@pytest.mark.slow
def test_compare_by_name_and_pairs(tmp_path):
    methods = "none,downsample,globalcom2,globalcom2:allocate=even,damro_filter+vtc_cls,prumerge,random:split=even"
    arguments = ["compare", "--model", "tiny-llava-next", "--limit", "4", "--methods", methods, "--keep", "0.1"]
    done = CliRunner().invoke(cli.app, [*arguments, "--batch-size", "2", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    rows = {
        r["config"]: r for r in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines()) if "config" in r
    }
    assert set(rows) == {
        *(
            "none",
            "shuffled pictures",
            "downsample@0.1",
            "globalcom2@0.1",
            "globalcom2:allocate=even@0.1",
            "damro_filter+vtc_cls@0.1",
        ),
        *("prumerge", *(f"random:split=even:seed={seed}@0.1" for seed in range(3))),
    }
    assert rows["none"]["task"] == "findit_hd"
    assert rows["downsample@0.1"]["n_visual_after"] < 0.6 * rows["none"]["n_visual_after"]
    costs = rows["downsample@0.1"]["costs"]
    assert (
        costs["prefill_flops_after"]
        < 0.7 * costs["prefill_flops_before"]
        == 0.7 * rows["none"]["costs"]["prefill_flops_before"]
    )
    assert "random:split=even, 3 seeds" in done.output
    (difference,) = paired.differences(tmp_path, "none", "prumerge")
    assert difference.n_samples == 4
    assert difference.difference == pytest.approx(rows["none"]["value"] - rows["prumerge"]["value"])
    with pytest.raises(RunError, match="there are: damro_filter"):
        paired.differences(tmp_path, "none", "vtc_cls@0.1")
    with pytest.raises(RunError, match="no run of tokprune compare"):
        paired.differences(tmp_path / "nothing", "none", "prumerge")


def test_pairs_of_an_unfinished_run_are_refused(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"task": "t", "config": "none", "sam')
    with pytest.raises(RunError, match="is not finished; type its tokprune compare again"):
        paired.differences(tmp_path, "none", "prumerge")


def test_paired_command_refuses_in_one_line(tmp_path):
    import typer

    app = typer.Typer()
    app.command()(paired.main)
    done = CliRunner().invoke(app, [str(tmp_path), "a", "b"])
    assert (done.exit_code, "no run of tokprune compare" in done.output) == (2, True)
    assert "Traceback" not in done.output


def test_defaults_of_the_embedded_models_exist():
    for usual in EMBEDDED.values():
        assert all(load_task(task) for task in usual.tasks)
        for method in usual.methods:
            assert method in BARE or tokprune.get_method(method)
    listed = {m.split(":")[0].split("+")[0] for m in EMBEDDED["tiny-llava-next"].methods}
    built = {n: tokprune.get_method(n) for n in METHODS.own_names()}
    before = {n for n, method in built.items() if method.stage is Stage.PRE_LLM and method.space != "pixels"}
    assert before <= listed | {m.split(":")[0] for m in OF_VIDEOS}
