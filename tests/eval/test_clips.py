"""Videos as tasks read them: a folder of frames, or a file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from tokprune.eval.tasks import load_task

from tokprune.core.errors import TaskError
from tokprune.prune.videos import Clip, evenly, open_clip

GREYS = [10, 60, 110, 160, 210]


def write_frames(folder, greys=GREYS, size=(32, 16)):
    folder.mkdir(parents=True, exist_ok=True)
    for i, grey in enumerate(greys):
        Image.new("RGB", size, (grey,) * 3).save(folder / f"{i:03}.png")
    return folder


def write_video(path, greys=GREYS, size=(32, 16), rate=5):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for grey in greys:
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), grey, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greys_of(clip):
    return [float(np.asarray(frame).mean()) for frame in clip.frames]


@pytest.mark.parametrize(
    ("n_all", "n", "want"), [(5, 3, [0, 2, 4]), (5, 8, [0, 1, 2, 3, 4]), (9, 2, [0, 8]), (4, 1, [0])]
)
def test_frames_are_evenly_spaced(n_all, n, want):
    assert evenly(n_all, n) == want


def test_a_folder_of_frames(tmp_path):
    clip = open_clip(write_frames(tmp_path / "a"), n_frames=3)
    assert greys_of(clip) == [10, 110, 210]
    assert clip.size == (32, 16)
    assert clip.fps == pytest.approx(2 * 3 / 5)


def test_a_video_file(tmp_path):
    clip = open_clip(write_video(tmp_path / "a.mp4"), n_frames=3)
    assert greys_of(clip) == pytest.approx([10, 110, 210], abs=4)
    assert clip.size == (32, 16)
    assert clip.fps == pytest.approx(3.0)  # three frames of a second


def test_frames_keep_their_number_when_resized():
    clip = Clip((Image.new("RGB", (8, 4)), Image.new("RGB", (8, 4)))).resize((4, 2))
    assert (len(clip.frames), clip.size) == (2, (4, 2))


@pytest.mark.parametrize("kind", ["empty", "sizes", "broken", "no frames"])
def test_what_cannot_be_read_is_said_in_one_line(kind, tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    if kind == "sizes":
        write_frames(path, [1])
        Image.new("RGB", (5, 5)).save(path / "b.png")
    if kind in ("broken", "no frames"):
        path = tmp_path / "a.mp4"
        path.write_bytes(b"" if kind == "no frames" else b"no video")
    with pytest.raises(TaskError, match="replace it") as raised:
        open_clip(path, instead="replace it")
    assert "\n" not in str(raised.value)


def test_a_task_folder_with_pictures_videos_and_frames(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "p.png")
    write_video(tmp_path / "v.mp4")
    write_frames(tmp_path / "f")
    lines = [{"file_name": name, "question": "what?", "answer": "a"} for name in ("p.png", "v.mp4", "f")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = load_task(str(tmp_path))
    picture, video, frames = (task.image(s.image_id) for s in task.samples())
    assert isinstance(picture, Image.Image)
    assert (len(video.frames), len(frames.frames)) == (5, 5)
    before = [task.checksum(s.image_id) for s in task.samples()]
    Image.new("RGB", (32, 16), "red").save(tmp_path / "f" / "002.png")
    assert [a == b for a, b in zip(before, map(task.checksum, ("p.png", "v.mp4", "f")), strict=True)] == [
        True,
        True,
        False,
    ]
