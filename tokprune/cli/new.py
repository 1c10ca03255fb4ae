"""`tokprune new`: a file to begin with, and a test that passes as it is."""

from __future__ import annotations

import keyword
from pathlib import Path
from string import Template

from ..core.errors import RunError

METHOD = Template('''"""A method of one's own: tokprune explain picture.png --method ./$name.py:$cls"""

from __future__ import annotations

from dataclasses import dataclass

from tokprune.methods.base import ScoreMethod


@dataclass(frozen=True)
class $cls(ScoreMethod):
    """Keep the rows with the largest norm.

    Source:   none yet.

    Args:
        power: of the norm.
    """

    power: float = 2.0

    def score(self, tokens):
        """Features (images, tokens, width) to scores (images, tokens); higher is kept. No loop over images."""
        return tokens.features.float().norm(p=self.power, dim=-1)
''')
METHOD_TEST = Template('''"""pytest test_$name.py"""

from __future__ import annotations

from pathlib import Path

import pytest
import tokprune
import torch
from tokprune.core import grid_layout
from tokprune.prune import Picture

METHOD = f"{Path(__file__).parent / '$name.py'}:$cls"


def pictures(n=3):
    generator = torch.Generator().manual_seed(0)
    return [Picture(torch.randn(64, 32, generator=generator), grid_layout(8, 8)) for _ in range(n)]


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_it_keeps_as_many_as_asked(keep):
    for kept in tokprune.select(pictures(), METHOD, keep_ratio=keep):
        assert len(kept.index) == int(64 * keep + 0.5)


def test_a_batch_keeps_what_its_pictures_keep_alone():
    together = tokprune.select(pictures(), METHOD, keep_ratio=0.25)
    for picture, kept in zip(pictures(), together, strict=True):
        (alone,) = tokprune.select([picture], METHOD, keep_ratio=0.25)
        assert torch.equal(kept.index, alone.index)
''')
TASK = Template('''"""A task of one's own: tokprune compare --task ./$name.py:$cls"""

from __future__ import annotations

from PIL import Image
from tokprune.eval.tasks import Sample


class $cls:
    """What color is a picture?"""

    name = "$name"  # results go by it

    def samples(self):
        """The questions, always in the same order."""
        colors = ("red", "green", "blue")
        return [Sample(c, image_id=c, question="what color is the picture?", answer=c) for c in colors]

    def image(self, image_id):
        """The picture of a question, RGB; or a tokprune.prune.videos.Clip."""
        return Image.new("RGB", (96, 96), image_id)

    def train_samples(self):
        """Questions for the question-only floor, or None."""
        return None
''')
TASK_TEST = Template('''"""pytest test_$name.py"""

from __future__ import annotations

from pathlib import Path

import tokprune
from tokprune.eval.tasks import load_task

TASK = f"{Path(__file__).parent / '$name.py'}:$cls"


def test_questions_are_unique_and_have_pictures():
    task = load_task(TASK)
    samples = task.samples()
    assert len({s.id for s in samples}) == len(samples) > 0
    assert all(task.image(s.image_id).mode == "RGB" for s in samples)


def test_it_can_be_compared_on():
    compared = tokprune.compare("tiny-llava", task=TASK, methods=["uniform"], keep=[0.5])
    assert {row.task for row in compared.rows} == {"$name"}
''')
KINDS = {"method": (METHOD, METHOD_TEST), "task": (TASK, TASK_TEST)}


def write(kind: str, name: str, folder: Path) -> list[Path]:
    """Write the file and its test; what is there is never replaced.

    Args:
        kind: "method" or "task".
        name: of the file, in small letters; its class is named alike.
        folder: where to write.

    Raises:
        RunError: no such kind, a name that Python cannot import, or a file that is there already.
    """
    if kind not in KINDS:
        raise RunError(
            f"invalid kind {kind!r}: use {' or '.join(KINDS)}; a model family is described in CONTRIBUTING.md"
        )
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise RunError(f"invalid name {name!r}: use small letters, digits and underscores, such as my_{kind}")
    files = [folder / f"{name}.py", folder / f"test_{name}.py"]
    there = [file for file in files if file.exists()]
    if there:
        raise RunError(f"{there[0]} is there already; use another name")
    cls = "".join(part.capitalize() for part in name.split("_"))
    try:
        for file, template in zip(files, KINDS[kind], strict=True):
            file.write_text(template.substitute(name=name, cls=cls), encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {error.filename}: {error.strerror}; use another folder with --folder") from error
    return files
