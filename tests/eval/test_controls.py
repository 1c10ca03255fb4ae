"""Smaller pictures and fewer frames: what the controls show, against counts made by hand."""

from __future__ import annotations

import collections
import math

import processors
import pytest
import tiny
from commands import jsonl, tokprune_cli
from PIL import Image
from tokprune.eval import compare
from tokprune.eval.run.controls import Seen, smaller
from tokprune.eval.run.rows import Config
from tokprune.eval.run.runner import Runner
from tokprune.eval.tasks import load_task
from tokprune.eval.tasks.watchit import WatchIt

from tokprune.prune.videos import Clip


def any_size(size):
    """A token for each 16 x 16 pixels, whole ones alone."""
    n = (size[0] // 16) * (size[1] // 16)
    return Seen(n, n * 256)


def one_size(size):
    return Seen(144, 96 * 96)


def crops(size):
    """A thumbnail and a crop for each 96 x 96 pixels, 144 tokens each."""
    n = 1 + math.ceil(size[0] / 96) * math.ceil(size[1] / 96)
    return Seen(144 * n, 96 * 96 * n)


@pytest.mark.parametrize(
    ("size", "wanted", "seen", "want"),
    [
        ((96, 96), 9, any_size, (63, 63)),  # the largest with 3 x 3
        ((96, 96), 36, any_size, (96, 96)),
        ((96, 96), 99, any_size, (96, 96)),
        ((96, 96), 14, any_size, (64, 64)),  # 16 tokens are nearer than 9
        ((160, 80), 8, any_size, (79, 39)),  # the largest with 4 x 2
        ((96, 96), 36, one_size, (48, 48)),
        ((640, 640), 36, one_size, (48, 48)),  # of what the tower sees, not of the picture
        ((40, 80), 36, one_size, (20, 40)),
        ((192, 192), 720, crops, (192, 192)),
        ((192, 192), 432, crops, (96, 96)),  # 2 crops are 288 tokens, 5 are 720, and nothing is between
        ((192, 192), 72, crops, (48, 48)),  # two crops at least: a quarter of their 96 x 96 pixels
    ],
)
def test_sizes_by_hand(size, wanted, seen, want):
    got = smaller(size, wanted, seen)
    assert max(abs(a - b) for a, b in zip(got, want, strict=True)) <= 1
    if seen is any_size:
        sizes = [tuple(max(1, round(s * k / 1000)) for s in size) for k in range(100, 1001)]
        nearest = min(abs(seen(s).n_visual - wanted) for s in sizes)
        assert abs(seen(got).n_visual - wanted) == nearest


# ---- on models


def asked(runner, picture, config):
    shown = runner.shown(picture, config)
    return shown, runner.seen(shown, shown.size).n_visual


@pytest.mark.parametrize(
    ("budget", "n"), [({"keep_ratio": 0.5}, 16), ({"keep_ratio": 0.25}, 9), ({"keep_tokens": 4}, 4)]
)
def test_a_tower_of_any_size_gives_about_as_many_tokens(budget, n):
    _, n_visual = asked(Runner.load("tiny-qwen"), Image.new("RGB", (96, 96)), Config("downsample", **budget))
    assert n_visual == n


def test_a_tower_of_one_size_is_shown_less_detail_with_all_its_tokens():
    runner = Runner.load("tiny-llava")
    shown, n_visual = asked(runner, Image.new("RGB", (96, 96)), Config("downsample", 0.25))
    assert (shown.size, n_visual) == ((48, 48), 144)
    task = load_task("findit")
    rows = {
        c.label: r for c, r, _ in runner.run(task, task.samples()[:3], [Config("none"), Config("downsample", 0.25)])
    }
    assert {(r.n_visual_before, r.n_visual_after) for r in rows["downsample@0.25"]} == {(144, 144)}
    assert [r.costs for r in rows["none"]] == [r.costs for r in rows["downsample@0.25"]]


def processor(kind):
    return processors.cropped_processor(kind) if kind in tiny.CROPPED else processors.processor(kind)


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision", "internvl", "idefics3"])
@pytest.mark.parametrize("ratio", [0.5, 0.1])
def test_crops_are_fewer_or_their_detail_is(kind, ratio):
    runner = Runner(tiny.model(kind), processor(kind))
    picture = processors.picture((96, 90))
    whole = runner.seen(picture, picture.size).n_visual
    shown, n_visual = asked(runner, picture, Config("downsample", ratio))
    sizes = [(round(96 * k / 40), round(90 * k / 40)) for k in range(7, 41)]
    nearest = min(abs(runner.seen(picture, s).n_visual - ratio * whole) for s in sizes)
    assert abs(n_visual - ratio * whole) <= nearest + 1
    assert n_visual < whole or shown.size[0] < 96


def test_smaller_frames_and_fewer_of_them():
    runner, task = Runner.load("tiny-qwen"), WatchIt("validation", 8)
    clip = task.image(task.samples()[0].image_id)
    whole = runner.seen(clip, clip.size).n_visual
    small, n_small = asked(runner, clip, Config("downsample", 0.25))
    few, n_few = asked(runner, clip, Config("frames", keep_tokens=whole // 2))
    assert isinstance(small, Clip)
    assert (len(small.frames), n_small) == (len(clip.frames), whole // 4)
    assert (few.size, len(few.frames), n_few) == (clip.size, len(clip.frames) // 2, whole // 2)


def test_a_control_of_an_earlier_run_is_half_the_height_and_width():
    shown = Runner.load("tiny-llava").shown(Image.new("RGB", (97, 40)), Config("downsample"))
    assert shown.size == (48, 20)


# ---- in a comparison


def test_controls_have_every_budget():
    grid = compare.configurations(["downsample", "frames"], [0.5], tokens=[9])
    assert [c.label for c in grid] == ["downsample@0.5", "downsample@9tokens", "frames@0.5", "frames@9tokens"]


def test_controls_are_compared_unless_they_are_left_out(tmp_path):
    run = ["compare", "--model", "tiny-qwen", "--methods", "uniform", "--keep", "0.5", "--limit", "2"]
    found = collections.defaultdict(set)
    for out, more in (("with", []), ("without", ["--no-controls"])):
        done = tokprune_cli(*run, *more, "--out", str(tmp_path / out))
        assert done.returncode == 0, done.stderr
        for row in jsonl(tmp_path / out / "rows.jsonl"):
            if row.get("config"):
                found[out, row["task"]].add(row["config"])
    usual = {"none", "shuffled pictures", "uniform@0.5"}
    assert found == {
        ("with", "findit"): usual | {"downsample@0.5"},
        ("with", "watchit"): usual | {"downsample@0.5", "frames@0.5"},
        ("without", "findit"): usual,
        ("without", "watchit"): usual,
    }


def test_without_a_budget_there_is_nothing_to_control(tmp_path):
    done = tokprune_cli(
        "compare", "--task", "findit", "--methods", "none", "--limit", "2", "--out", str(tmp_path / "a")
    )
    assert done.returncode == 0, done.stderr
    assert "downsample" not in (tmp_path / "a" / "rows.jsonl").read_text()
