"""`tokprune explain` of a video: its sheet, its animation, its JSON file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from commands import refusal, tokprune_cli
from PIL import Image, ImageSequence

from tokprune.core.layout import frames_layout
from tokprune.prune.explain import DIM, dimmed_frames

N_FRAMES, SIDE = 8, 64  # of the clip; tiny-qwen makes 4 steps of 4 x 4 tokens of it


@pytest.fixture
def clip(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for i in range(N_FRAMES):
        Image.new("RGB", (SIDE, SIDE), (200 + 6 * i,) * 3).save(folder / f"{i}.png")  # equal frames would be joined
    return folder


def test_a_video_is_a_sheet_an_animation_and_indices(clip, tmp_path):
    files = {name: tmp_path / f"kept.{name}" for name in ("png", "gif", "json")}
    done = tokprune_cli(
        *("explain", str(clip), "--model", "tiny-qwen", "--method", "uniform", "--keep", "0.25"),
        *("--out", str(files["png"]), "--animation", str(files["gif"]), "--json", str(files["json"])),
    )
    assert done.returncode == 0, done.stderr
    assert "1 video, visual tokens 64 -> 16 each" in done.stdout
    (found,) = json.loads(files["json"].read_text())["methods"]
    kept = next(value for key, value in found.items() if key.startswith("kept"))
    assert len(kept) == 16
    frames = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(Image.open(files["gif"]))]
    assert len(frames) == N_FRAMES
    for earlier, later in zip(frames[::2], frames[1::2], strict=True):  # two frames are one step of time
        assert np.abs(earlier.astype(int) - later).max() < 24
    with Image.open(files["png"]) as sheet:
        assert sheet.width > N_FRAMES * SIDE


def test_cells_of_every_frame_are_those_of_its_step():
    """A cell of 4 x 4 tokens is bright in both frames of a step whose token is kept."""
    white = [Image.new("RGB", (SIDE, SIDE), "white")] * N_FRAMES
    layout = frames_layout(4, 4, 4)
    drawn = dimmed_frames(white, layout, torch.tensor([0, 5, 16 + 15, 48]))
    want = {0: [(0, 0), (1, 1)], 1: [(3, 3)], 2: [], 3: [(0, 0)]}
    for number, frame in enumerate(drawn):
        cells = np.asarray(frame)[8::16, 8::16, 0]
        bright = np.full((4, 4), int(255 * DIM))
        for cell in want[number // 2]:
            bright[cell] = 255
        np.testing.assert_allclose(cells, bright, atol=1)


def test_a_picture_cannot_be_animated(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    done = tokprune_cli("explain", str(tmp_path / "a.png"), "--animation", str(tmp_path / "a.gif"))
    assert "cannot be animated" in refusal(done)
