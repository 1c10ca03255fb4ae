"""The model of pictures of any size and of clips that ships: its inputs, its training, its answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import processors
import pytest
import tiny
import torch
from commands import jsonl, tokprune_cli
from PIL import Image
from rich.console import Console
from tokprune.eval import compare
from tokprune.eval.models import EMBEDDED, path_of
from tokprune.eval.models.training import qwen, recipe_qwen
from tokprune.eval.run.rows import Config
from tokprune.eval.run.runner import Runner
from tokprune.eval.tasks import findit, load_task, watchit
from tokprune.integrations.transformers.processing import inputs_of, load_processor, video_inputs
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

import tokprune
from tokprune.core.errors import RunError
from tokprune.prune.videos import Clip

FOLDER = Path(path_of("tiny-qwen"))


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    return load_processor(str(FOLDER))


def prompt(processor, question: str, visual) -> str:
    kind = "video" if isinstance(visual, Clip) else "image"
    content = [{"type": kind}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def asked(processor, task, samples):
    visuals = [task.image(s.image_id) for s in samples]
    return inputs_of(
        processor,
        [prompt(processor, s.question, v) for s, v in zip(samples, visuals, strict=True)],
        [[v] for v in visuals],
    )


@torch.no_grad()
def share_right(model, processor, task, samples) -> float:
    """Of greedy answers, in batches of 32."""
    right = []
    for i in range(0, len(samples), 32):
        part = samples[i : i + 32]
        inputs = asked(processor, task, part)
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(out, skip_special_tokens=True)
        right += [s.is_right(text) for s, text in zip(part, texts, strict=True)]
    return float(np.mean(right))


# ---- inputs


def test_frames_become_patches_in_pairs(processor):
    """Two frames of one colour each: the first fills the first half of every colour's values, the second the other."""
    clip = Clip(tuple(Image.new("RGB", (48, 32), (v, 0, 255 - v)) for v in (10, 200, 90)), fps=4.0)
    made = video_inputs(processor, [clip])
    assert made["video_grid_thw"].tolist() == [[2, 4, 6]]
    assert made["second_per_grid_ts"].tolist() == [0.5]
    values = made["pixel_values_videos"].reshape(2, 24, 3, 2, 64)
    mean, std = 0.48145466, 0.26862954
    for step, frame, level in ((0, 0, 10), (0, 1, 200), (1, 0, 90), (1, 1, 90)):
        red = values[step, :, 0, frame]
        torch.testing.assert_close(red, torch.full_like(red, (level / 255 - mean) / std), rtol=1e-5, atol=1e-5)


def test_a_still_clip_is_the_picture_again_and_again(processor):
    picture = Image.fromarray(findit.draw("validation", 0)[0])
    one = processor.image_processor([picture], return_tensors="pt")["pixel_values"]
    many = video_inputs(processor, [Clip((picture,) * 4)])["pixel_values_videos"]
    assert torch.equal(many, torch.cat([one, one]))


def test_a_batch_of_clips_of_two_sizes_is_padded_on_the_left(processor):
    small, large = (Clip((Image.new("RGB", size),) * 4) for size in ((32, 32), (64, 48)))
    made = inputs_of(processor, [prompt(processor, "what moved?", c) for c in (small, large)], [[small], [large]])
    n = [2 * 2 * 2, 2 * 3 * 4]
    assert (made["mm_token_type_ids"] == 2).sum(1).tolist() == n
    assert (made["input_ids"] == recipe_qwen.VIDEO).sum(1).tolist() == n
    assert made["attention_mask"][0].tolist() == [0] * 16 + [1] * (made["input_ids"].shape[1] - 16)


@torch.no_grad()
def test_a_batch_of_pictures_clips_and_both_equals_its_rows(processor, model):
    tasks = [load_task("findit"), load_task("watchit")]
    picture, clip = (task.image(task.samples()[0].image_id) for task in tasks)
    rows = [[picture], [clip], [clip, picture], []]
    content = [[{"type": "video" if isinstance(v, Clip) else "image"} for v in row] for row in rows]
    said = [[{"role": "user", "content": [*c, {"type": "text", "text": "what moved?"}]}] for c in content]
    text = [processor.apply_chat_template(turns, add_generation_prompt=True) for turns in said]
    whole = model(**inputs_of(processor, text, rows), logits_to_keep=1).logits
    for i, (prompt_, row) in enumerate(zip(text, rows, strict=True)):
        alone = model(**inputs_of(processor, [prompt_], [row]), logits_to_keep=1).logits
        torch.testing.assert_close(whole[i], alone[0], rtol=1e-4, atol=1e-4)


def test_a_placeholder_without_a_clip_is_refused(processor):
    picture = Image.new("RGB", (32, 32))
    with pytest.raises(RunError, match="2 <.video_pad.> for 1 visuals"):
        inputs_of(processor, ["<|video_pad|><|video_pad|>"], [[Clip((picture,) * 2)]])


# ---- training


def test_training_patches_are_those_of_the_processor(processor):
    image = findit.draw("validation", 0)[0]
    made = processor.image_processor([Image.fromarray(image)], return_tensors="pt")["pixel_values"]
    assert torch.equal(qwen.patchify(image[None, None])[0], made)
    clip = watchit.WatchIt("validation").image("validation-0")
    frames = watchit.draw("validation", 0)[0]
    assert torch.equal(qwen.patchify(frames[None])[0], video_inputs(processor, [clip])["pixel_values_videos"])


def test_labels_lie_where_the_shapes_are():
    _, cast = watchit.draw("train", 3)
    grid = (4, 8, 8)
    labels = qwen.clip_label(cast, grid)
    order = qwen.by_patch(np.arange(4 * 8 * 8).reshape(grid))
    raster = np.zeros_like(labels)
    raster[:, order] = labels
    raster = raster.reshape(4, *grid)
    for actor in cast:
        for step in range(4):
            frame = 2 * step + 1
            if not actor.opacity(frame):
                continue
            x, y = (int((v + actor.width / 2) // 8) for v in actor.at(frame))
            shape, colour, state, centre = raster[:, step, y, x]
            assert (qwen.SHAPES[shape], qwen.COLOURS[colour], centre) == (actor.kind, actor.colour, 1)
            comes = actor.begins in (frame, frame - 1) and actor.begins > 0
            moves = actor.at(frame) != actor.at(frame - 1)
            assert qwen.STATES[state].startswith("comes up" if comes else "moves" if moves else "still")


@torch.no_grad()
@pytest.mark.parametrize("is_video", [False, True])
def test_packed_questions_equal_the_prompts_that_users_make(model, processor, is_video):
    """What the packed row computes is what the whole model computes of each prompt alone, positions included."""
    task = (watchit.WatchIt if is_video else findit.FindIt)("validation")
    visual = task.image("validation-1")
    questions = [("what color appeared?", "red", ""), ("how many frames show the red ring?", "3", "")]
    frames = np.stack([np.array(f) for f in visual.frames]) if is_video else np.array(visual)[None]
    grid = (4, 8, 8) if is_video else (1, 12, 12)
    batch = qwen.Batch(qwen.patchify(frames[None]), torch.empty(0), grid, is_video, [questions])
    trainer = qwen.Trainer(AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval())
    rows, text = trainer.see(batch)[1], qwen.pack(batch.questions)
    packed, _ = trainer.answers(rows, batch, torch.arange(rows.shape[1])[None], text)
    single = []
    for question, answer, _ in questions:
        inputs = inputs_of(processor, [f"{prompt(processor, question, visual)} {answer}"], [[visual]])
        single.append(model(**inputs, logits_to_keep=2).logits[0])
    torch.testing.assert_close(packed, torch.cat(single), rtol=1e-4, atol=1e-4)


def test_every_word_of_both_tasks_is_known():
    for task in (findit.FindIt("test", 300), watchit.WatchIt("test", 300)):
        for s in task.samples():
            qwen.encode(f"{s.question} {s.answer}")


def test_dropped_subsets_are_ascending_and_favour_no_size():
    rng, sizes = np.random.default_rng(0), set()
    torch.manual_seed(0)
    x = torch.randn(2, 64, 8)
    for _ in range(200):
        kept = qwen.draw_kept(rng, x, (4, 4, 4), True)
        assert (kept.diff(dim=1) > 0).all()
        sizes.add(kept.shape[1])
    assert {0, 64} < sizes
    assert len(sizes) > 30
    assert qwen.draw_kept(rng, x, (4, 4, 4), False).shape == (2, 64)


# ---- the model that ships


def test_it_is_genuine_and_small(model):
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 12e6
    assert EMBEDDED["tiny-qwen"].tasks == ("findit", "watchit")


@pytest.mark.parametrize(("name", "floor"), [("findit", 0.9), ("watchit", 0.9)])
def test_it_answers_about_pictures_and_clips(model, processor, name, floor):
    """A hundred validation questions; the standard error is about 3 points."""
    task = type(load_task(name))("validation", 40)
    assert share_right(model, processor, task, task.samples()[:96]) > floor - 0.08


@pytest.mark.parametrize("name", ["findit", "watchit"])
def test_pruned_to_a_half_it_still_answers(model, processor, name):
    task = type(load_task(name))("validation", 40)
    samples = task.samples()[:64]
    with tokprune.attach(model, "fopru", keep_ratio=0.5) as attachment:
        share = share_right(model, processor, task, samples)
        (seen,) = {(i.layout.n_visual, i.n_kept) for i in attachment.report.encoded}
    assert seen == ((36, 18) if name == "findit" else (64, 32))
    assert share > 0.6


def test_it_takes_pictures_of_other_sizes(model, processor):
    """The scenes of findit in the corner of a larger canvas of their own colour, and scaled."""
    task = findit.FindIt("validation", 30)
    samples = [s for s in task.samples() if s.kind in ("colour", "shape")]
    for change in (
        lambda p: p.resize((128, 128), Image.Resampling.BICUBIC),
        lambda p: padded(p, (128, 96)),
        lambda p: padded(p, (112, 128)),
    ):
        assert share_right(model, processor, Changed(task, change), samples) > 0.85


class Changed:
    """A task whose pictures are made to another size."""

    def __init__(self, task, change):
        self.task, self.change = task, change

    def image(self, image_id: str) -> Image.Image:
        return self.change(self.task.image(image_id))


def padded(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    canvas = Image.new("RGB", size, tuple(int(v) for v in np.asarray(picture).mean((0, 1))))
    canvas.paste(picture, (0, 0))
    return canvas


def test_the_saved_processor_says_the_same_of_pictures_and_of_clips(processor):
    """What a user with torchvision loads; it cannot be made without, so what is written is compared."""
    picture, video, both = (
        json.loads((FOLDER / f"{name}.json").read_text())
        for name in ("preprocessor_config", "video_preprocessor_config", "processor_config")
    )
    assert (picture.pop("image_processor_type"), video.pop("video_processor_type")) == (
        "Qwen2VLImageProcessor",
        "Qwen2VLVideoProcessor",
    )
    assert picture.pop("processor_class") == video.pop("processor_class") == both["processor_class"]
    assert both["processor_class"] == "Qwen2_5_VLProcessor" == type(processor).__name__
    assert video.pop("do_sample_frames") is False
    assert picture == video
    assert both["image_processor"].items() > picture.items()
    assert both["video_processor"].items() > video.items()
    assert (picture["patch_size"], picture["merge_size"], picture["temporal_patch_size"]) == (8, 2, 2)


@pytest.mark.parametrize(
    ("kind", "option"), [("llava_onevision", "num_image_tokens"), ("internvl", "image_seq_length")]
)
def test_options_of_a_processor_come_back_without_its_video_part(kind, option, tmp_path):
    made = processors.processor(kind)
    tiny.model(kind).save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    assert getattr(load_processor(str(tmp_path)), option) == getattr(made, option) is not None


def test_other_processors_load_as_ever():
    assert type(load_processor(path_of("tiny-llava"))).__name__ == "LlavaProcessor"


# ---- the control with fewer frames


@pytest.fixture(scope="module")
def runner():
    return Runner.load("tiny-qwen")


@pytest.mark.parametrize(("ratio", "n_visual"), [(0.5, 32), (0.25, 16), (0.1, 16)])
def test_fewer_frames_are_the_bare_model_on_some_of_them(runner, ratio, n_visual):
    """Two frames are one step of time with 16 tokens, which is the least."""
    task = watchit.WatchIt("validation", 8)
    samples = task.samples()[:3]
    rows = {c.label: rows for c, rows, _ in runner.run(task, samples, [Config("none"), Config("frames", ratio)])}
    assert {r.n_visual_after for r in rows["none"]} == {64}
    few = rows[f"frames@{ratio}"]
    assert {(r.n_visual_before, r.n_visual_after) for r in few} == {(64, n_visual)}
    assert all(r.costs.prefill_flops_after < r.costs.prefill_flops_before for r in few)


def test_clips_keep_their_first_and_last_frame_and_their_speed():
    frames = tuple(Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(8))
    few = Clip(frames, 4.0).some_frames(0.5)
    assert [f.getpixel((0, 0))[0] for f in few.frames] == [0, 2, 5, 7]
    assert few.fps == 2.0
    assert len(Clip(frames).some_frames(0.01).frames) == 1


def test_frames_are_for_videos(runner):
    part = [(task, task.samples()[:2]) for task in (findit.FindIt("validation", 4),)]
    console = Console(quiet=True)
    with pytest.raises(RunError, match="frames needs a task about videos"):
        compare.runnable(runner, part, [Config("frames", 0.5)], False, True, console)
    left = compare.runnable(runner, part, [Config("none"), Config("frames", 0.5)], False, False, console)
    assert left == [Config("none")]


def test_compare_shows_frames_of_the_task_with_videos_alone(tmp_path):
    run = ["compare", "--model", "tiny-qwen", "--methods", "none,frames", "--keep", "0.5", "--limit", "4"]
    done = tokprune_cli(*run, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    rows = jsonl(tmp_path / "run" / "rows.jsonl")
    assert {r["task"] for r in rows if r["method"] == "frames"} == {"watchit"}
    assert {r["task"] for r in rows if r["method"] == "none"} == {"findit", "watchit"}
