"""Pictures of an emoji: what is drawn is what is asked for, and what is written is a task."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from tokprune.eval.models.training.train_real import Drawings
from tokprune.eval.tasks import emoji, load_task

from tokprune.core.errors import TaskError


def add(files: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    files.addfile(info, io.BytesIO(content))


def colour_of(name: str) -> tuple[int, int, int]:
    """Of the square that stands for a drawing here."""
    at = [n for names in emoji.NAMES.values() for n in names].index(name)
    return 255, 2 * at, 0


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The npm package with a full square of one colour, without a border, for each drawing."""
    names = [name for names in emoji.NAMES.values() for name in names]
    path = tmp_path_factory.mktemp("emoji") / "package.tgz"
    with tarfile.open(path, "w:gz") as files:
        listed = [{"short_name": name, "image": f"{name}-file.png"} for name in names]
        add(files, "package/emoji.json", json.dumps(listed).encode())
        for name in names:
            buffer = io.BytesIO()
            Image.new("RGBA", (64, 64), (*colour_of(name), 255)).save(buffer, "png")
            add(files, f"package/img/google/64/{name}-file.png", buffer.getvalue())
    return path


def test_a_scene_shows_one_thing_where_it_says(package):
    scenes = emoji.Emoji(package)
    for index in range(40):
        image, thing = scenes.draw("test", index)
        assert image.shape == (96, 96, 3)
        assert image.dtype == np.uint8
        assert thing.name in emoji.NAMES[thing.kind]
        shown = (image == colour_of(thing.name)).all(-1)
        assert shown[thing.top : thing.top + thing.width, thing.left : thing.left + thing.width].all()
        assert shown.sum() == thing.width**2


def test_every_name_is_drawn(package):
    scenes = emoji.Emoji(package)
    drawn = {scenes.draw("train", index)[1].name for index in range(300)}
    assert drawn == {name for names in emoji.NAMES.values() for name in names}


def test_scenes_come_from_the_seed_and_differ_between_splits(package):
    scenes = emoji.Emoji(package)
    assert np.array_equal(scenes.draw("test", 3)[0], emoji.Emoji(package).draw("test", 3)[0])
    assert not np.array_equal(scenes.draw("test", 3)[0], scenes.draw("train", 3)[0])


def test_a_patch_is_covered_by_as_much_as_lies_on_it(package):
    cover = emoji.Emoji(package).covered(emoji.Thing("dog", "animal", left=4, top=8, width=26)).reshape(12, 12)
    assert cover[1, 0] == pytest.approx(0.5)  # the right half of columns 0 to 7
    assert cover[1, 1] == pytest.approx(1)
    assert cover[4, 3] == pytest.approx(2 / 8 * 6 / 8)  # rows 32 and 33, columns 24 to 29
    assert cover.sum() * 64 == pytest.approx(26 * 26)
    assert not cover[0].any()


def test_what_is_written_is_a_task_whose_answers_are_true(package, tmp_path):
    emoji.write(package, tmp_path / "emoji", n_scenes=5)
    task, scenes = load_task(str(tmp_path / "emoji")), emoji.Emoji(package)
    samples = task.samples()
    assert len(samples) == 10
    for at, sample in enumerate(samples):
        image, thing = scenes.draw("test", at // 2)
        assert np.array_equal(np.asarray(task.image(sample.image_id)), image)
        assert sample.kind == ("name", "kind")[at % 2]
        assert sample.answer == getattr(thing, sample.kind)


def test_an_absent_or_foreign_package_is_one_clear_line(tmp_path):
    with pytest.raises(TaskError, match="make emoji"):
        emoji.Emoji(tmp_path / "absent.tgz")
    with tarfile.open(tmp_path / "other.tgz", "w:gz") as files:
        add(files, "package/package.json", b"{}")
    with pytest.raises(TaskError, match="emoji-datasource-google"):
        emoji.Emoji(tmp_path / "other.tgz")
    with tarfile.open(tmp_path / "empty.tgz", "w:gz") as files:
        add(files, "package/emoji.json", b"[]")
    with pytest.raises(TaskError, match="emoji-datasource-google"):
        emoji.Emoji(tmp_path / "empty.tgz")


def test_patches_say_the_thing_that_covers_a_quarter_of_them(package):
    said = Drawings(package).says(emoji.Thing("dog", "animal", left=4, top=6, width=26))
    grid = [said[12 * row : 12 * (row + 1)] for row in range(12)]
    assert grid[1][:5] == [("dog", "animal")] * 4 + [("background", "background")]  # rows 8 to 15, columns 4 to 29
    assert grid[0][1] == ("background", "background")  # rows 6 and 7 of 8: exactly a quarter
    assert said.count(("dog", "animal")) == 3 * 4
