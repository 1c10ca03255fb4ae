"""emoji: a drawing of an everyday thing on findit's busy background, written as a folder of pictures and questions.

    make emoji       # or: python -m tokprune.eval.tasks.emoji PACKAGE.tgz runs/emoji

The drawings are those of Noto Emoji (Apache-2.0) in the npm package emoji-datasource-google; none of them ships with
tokprune. Scenes are drawn from a seed. There are two questions about a picture: what is in it, and what kind of thing
that is, in words that a pretrained language model knows.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from tokprune.core.errors import TaskError
from tokprune.prune.pictures import open_drawing

from . import findit

# Short names of the package.
NAMES = {
    "animal": "dog frog penguin fish butterfly tiger".split(),
    "food": "apple banana pizza carrot cake mushroom".split(),
    "vehicle": "car bus tractor rocket ship bike".split(),
    "tool": "hammer axe scissors ladder bucket broom".split(),
}
PATCHES = 12  # on a side, of 8 pixels
N_TEST = 200


@dataclass(frozen=True)
class Thing:
    """A drawing in a scene: its name, its kind, and its box (pixels)."""

    name: str
    kind: str
    left: int
    top: int
    width: int


class Emoji:
    """Drawings of 64 x 64 pixels by name, with transparency, and the scenes made of them.

    Args:
        package: the .tgz file of the npm package.

    Raises:
        TaskError: no such file, or it lacks one of the drawings.
    """

    def __init__(self, package: Path):
        if not package.is_file():
            raise TaskError(f"no file {package}; type make emoji, which fetches it")
        with tarfile.open(package) as files:
            known = {e["short_name"]: e["image"] for e in json.load(_member(files, package, "package/emoji.json"))}
            self.drawings = {name: _drawing(files, package, known.get(name, name)) for name in _all_names()}

    def draw(self, split: str, index: int) -> tuple[np.ndarray, Thing]:
        """Scene `index` of a split: the picture, (96, 96, 3) uint8, and the thing in it."""
        rng = np.random.default_rng((20_30, findit.SPLITS[split], index))
        image = findit.background(rng)
        kind = str(rng.choice(list(NAMES)))
        width = int(rng.integers(22, 33))
        left, top = (int(v) for v in rng.integers(1, findit.SIZE - width, 2))
        thing = Thing(str(rng.choice(NAMES[kind])), kind, left, top, width)
        drawing = self._sized(thing.name, width)
        window = image[top : top + width, left : left + width]
        window += drawing[..., 3:] / 255 * (drawing[..., :3] - window)
        return np.clip(image, 0, 255).astype(np.uint8), thing

    def covered(self, thing: Thing) -> np.ndarray:
        """Share of every patch that a thing covers, (144,)."""
        cover = np.zeros((findit.SIZE, findit.SIZE))
        rows, columns = (slice(low, low + thing.width) for low in (thing.top, thing.left))
        cover[rows, columns] = self._sized(thing.name, thing.width)[..., 3] / 255
        side = findit.SIZE // PATCHES
        return cover.reshape(PATCHES, side, PATCHES, side).mean((1, 3)).reshape(-1)

    def _sized(self, name: str, width: int) -> np.ndarray:
        return np.asarray(self.drawings[name].resize((width, width), Image.BICUBIC)).astype(float)


def _all_names() -> list[str]:
    return [name for names in NAMES.values() for name in names]


def _member(files: tarfile.TarFile, package: Path, name: str) -> io.BytesIO:
    try:
        return io.BytesIO(files.extractfile(name).read())  # type: ignore[union-attr]
    except KeyError:
        raise TaskError(f"{package} has no {name}; use emoji-datasource-google, as make emoji does") from None


def _drawing(files: tarfile.TarFile, package: Path, name: str) -> Image.Image:
    return open_drawing(_member(files, package, f"package/img/google/64/{name}"))


def ask(thing: Thing) -> list[tuple[str, str, str]]:
    """(question, answer, kind of question): what it is, and of which kind."""
    return [("what is in the picture?", thing.name, "name"), ("what kind of thing is it?", thing.kind, "kind")]


def write(package: Path, out: Path, split: str = "test", n_scenes: int = N_TEST) -> None:
    """Write scenes and questions as a folder that `--task` takes.

    Raises:
        TaskError: as `Emoji`.
    """
    emoji = Emoji(package)
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(n_scenes):
        image, thing = emoji.draw(split, index)
        file = f"{split}-{index}.png"
        Image.fromarray(image).save(out / file)
        lines += [json.dumps(dict(file_name=file, question=q, answer=a, kind=k)) for q, a, k in ask(thing)]
    (out / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(
    package: Annotated[Path, typer.Argument(help="The .tgz file of the npm package emoji-datasource-google.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Write pictures of one emoji each, and questions about them."""
    write(package, out)
    typer.echo(f"{2 * N_TEST} questions in {out}; next: tokprune compare --model runs/real --task {out} --limit 120")


if __name__ == "__main__":
    typer.run(main)
