"""Drawings of what methods keep of a picture or a video, made by running a model."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import tokprune
from tokprune.core.errors import RunError
from tokprune.core.files import replacing, write_text
from tokprune.core.layout import Layout
from tokprune.prune.explain import (
    below_each_other,
    dimmed,
    dimmed_frames,
    enlarged,
    row_of,
    seen,
    side_by_side,
    stacked,
)
from tokprune.prune.report import ImageReport, Report
from tokprune.prune.videos import Clip

from ..run.runner import Runner

FORMAT, VERSION = "tokprune-kept", 1


@dataclass(frozen=True)
class Shown:
    """One method on one picture.

    Args:
        spec: the method as `attach` takes it.
        budget: as keywords of `attach`; empty for a method that takes none.
        kept: the entry of `attachment.kept`: indices, or indices by layer.
        report: of the call.
    """

    spec: str
    budget: dict[str, Any]
    kept: torch.Tensor | dict[int, torch.Tensor]
    report: Report

    @property
    def image(self) -> ImageReport:
        """The report of the picture."""
        (image,) = self.report.images
        return image

    def to_dict(self) -> dict[str, Any]:
        """An entry of "methods" in `Explained.to_dict`."""
        image, layout = self.image, self.image.layout
        by_layer = isinstance(self.kept, dict)
        left = image.left.tolist()
        tokens = [i for i in left if layout.crop[i] >= 0]
        return {
            "spec": self.spec,
            "budget": self.budget,
            "report": str(self.report),
            "n_rows": len(layout.crop),
            "n_visual": image.n_visual,
            "n_kept": image.n_kept,
            "kept": {str(k): v.tolist() for k, v in self.kept.items()} if by_layer else self.kept.tolist(),
            "tokens": [
                {"index": i, "crop": layout.crop[i], "row": layout.row[i], "column": layout.column[i]} for i in tokens
            ],
            "newlines": [i for i in left if layout.crop[i] < 0],
            "grids": [[region.height, region.width] for region in layout.regions],
        }


@dataclass(frozen=True)
class Explained:
    """What methods keep of a picture, to draw, print or write.

    Args:
        picture: the original, a video for a clip.
        pixels: (crops, 3, H, W), the input of the model; None where it is given patches.
        runner: the model with its processor.
        shown: one entry for each method.
    """

    picture: Image.Image | Clip
    pixels: torch.Tensor | None
    runner: Runner
    shown: list[Shown]

    @property
    def lines(self) -> list[str]:
        """The reports."""
        return [str(one.report) for one in self.shown]

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        file = io.BytesIO()
        self.sheet().save(file, format="PNG")
        return file.getvalue()

    def sheet(self) -> Image.Image:
        """The picture as the model sees it, and next to it what each method keeps; of a video frame by frame."""
        return (below_each_other if isinstance(self.picture, Clip) else side_by_side)(self.panels())

    def panels(self) -> list[tuple[str, Image.Image]]:
        """The parts of `sheet` with their titles."""
        if isinstance(self.picture, Clip):
            return [(title, row_of([enlarged(f, 112) for f in frames])) for title, frames in self._films(self.picture)]
        panels = []
        for one in self.shown:
            image = one.image
            order = list(dict.fromkeys(crop for crop in image.layout.crop if crop >= 0))
            whole = self._whole(order, self.picture)
            if not panels:
                panels.append(("as the model sees it", _both(whole, self.picture, image.layout)))
            cells = whole if len(order) > 1 or self.pixels is None else _covered(whole, image.layout, self._patch)
            panels.append((_title(one), _both(cells, self.picture, image.layout, image.left)))
        return panels

    def animation(self) -> list[Image.Image]:
        """For every frame of a video what `sheet` shows of a picture.

        Raises:
            RunError: it is a picture.
        """
        films = self._films(self._clip)
        moments = zip(*(frames for _, frames in films), strict=True)
        titles = [title for title, _ in films]
        return [side_by_side(list(zip(titles, map(enlarged, moment), strict=True))) for moment in moments]

    def write_animation(self, path: Path) -> int:
        """`animation` as a GIF at the speed of the video; gives the number of frames.

        Raises:
            RunError: it is a picture.
            OSError: it cannot be written.
        """
        first, *others = self.animation()
        with replacing(path) as new:
            duration = 1000 / self._clip.fps
            first.save(new, format="GIF", save_all=True, append_images=others, loop=0, duration=duration)
        return 1 + len(others)

    @property
    def _clip(self) -> Clip:
        if not isinstance(self.picture, Clip):
            raise RunError("only a video can be animated; leave --animation out, or name a video")
        return self.picture

    def _films(self, clip: Clip) -> list[tuple[str, list[Image.Image]]]:
        """The frames of a video, and those that show what each method keeps, with their titles."""
        films = [("as the model sees it", list(clip.frames))]
        films += [(_title(one), dimmed_frames(clip.frames, one.image.layout, one.image.left)) for one in self.shown]
        return films

    @property
    def _patch(self) -> int:
        """Pixels a side of a patch."""
        patch = self.runner.model.config.vision_config.patch_size
        return patch if isinstance(patch, int) else patch[0]

    def _whole(self, order: Sequence[int], picture: Image.Image) -> Image.Image:
        """The thumbnail or only crop; a model that is given patches sees the picture itself."""
        if self.pixels is None:
            return picture
        processor = self.runner.processor.image_processor
        return seen(self.pixels[order.index(0) if 0 in order else 0], processor.image_mean, processor.image_std)

    def to_dict(self, **asked: Any) -> dict[str, Any]:
        """Plain numbers, lists and text. `asked` adds entries such as the picture, the question and the model.

        For each method:

        - `spec`, `budget`: as `attach` takes them; `report`: as text.
        - `n_rows`: placeholders of the picture. `n_visual` of them show a patch, and `n_kept` of those are left at the
          end.
        - `kept`: indices among the placeholders, from 0, with rows that show no patch. For methods that cut between
          decoder layers, an object: for each layer what is left from there on, 0 for before the first layer.
        - `tokens`: those left at the end, with index, crop, row and column as in `Layout`. Crop 0 is the thumbnail or
          the only crop; rows and columns of other crops count in their mosaic.
        - `newlines`: indices of the rows left at the end that show no patch.
        - `grids`: rows and columns of the thumbnail or only crop, then of the mosaic, if they exist.

        What was kept can be replayed on the same prompt, unless the method merges tokens:

            kept = values["methods"][0]["kept"]
            if isinstance(kept, dict):
                replay = {int(layer): torch.tensor(rows, dtype=torch.int64) for layer, rows in kept.items()}
            else:
                replay = torch.tensor(kept, dtype=torch.int64)
            tokprune.attach(model, values["methods"][0]["spec"], replay=[replay])
        """
        return {"format": FORMAT, "format_version": VERSION, **asked, "methods": [one.to_dict() for one in self.shown]}

    def write_json(self, path: Path, **asked: Any) -> None:
        """Write `to_dict` to a file, complete or not at all.

        Raises:
            OSError: it cannot be written.
        """
        write_text(path, json.dumps(self.to_dict(**asked), indent=1) + "\n")


Methods = Sequence[tuple[str, dict[str, Any]]]


@torch.no_grad()
def asked(runner: Runner, picture: Image.Image | Clip, question: str, methods: Methods, salt: int = 0) -> Explained:
    """What each method with its budget keeps of a picture or video with a question.

    Seeded methods mix in `salt`: a run has one for each question, see `tokprune.Attachment.salts`.
    """
    inputs = runner.inputs([question], [picture])
    shown = []
    for spec, budget in methods:
        with tokprune.attach(runner.model, spec, **budget) as attachment:
            attachment.salts = [salt]
            runner.model(**inputs)
            (kept,) = attachment.kept
            shown.append(Shown(spec, budget, kept, attachment.report))
    pixels = inputs.get("pixel_values")
    return Explained(picture, None if pixels is None or pixels.ndim < 4 else pixels.flatten(0, -4), runner, shown)


def explained(
    runner: Runner, picture: Image.Image | Clip, question: str, methods: Methods
) -> tuple[Image.Image, list[str]]:
    """`Explained.sheet` and `Explained.lines` of a picture with a question."""
    found = asked(runner, picture, question, methods)
    return found.sheet(), found.lines


def _title(one: Shown) -> str:
    return f"{one.spec}: {one.image.n_visual} -> {one.image.n_kept}"


def _both(whole: Image.Image, picture: Image.Image, layout: Layout, kept: torch.Tensor | None = None) -> Image.Image:
    """The only crop; or the thumbnail and, below it, the picture that was cut into crops."""
    parts = [whole, picture][: len(layout.regions)] if 0 in layout.crops else [picture]
    if kept is not None:
        parts = [dimmed(p, layout, kept, region=r) for p, r in zip(parts, layout.regions, strict=True)]
    return enlarged(parts[0]) if len(parts) == 1 else stacked(*map(enlarged, parts))


def _covered(whole: Image.Image, layout: Layout, patch: int) -> Image.Image:
    """Without the pixels at the end of a side that no token shows, if the side is no multiple of the patch."""
    cell = patch * max(1, whole.width // patch // layout.width)  # a token may show several patches
    return whole.crop((0, 0, layout.width * cell, layout.height * cell))
