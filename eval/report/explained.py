"""Pictures of what methods keep, made by running a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import tokprune
from tokprune.core.files import write_text
from tokprune.core.layout import Layout
from tokprune.prune.explain import dimmed, enlarged, seen, side_by_side, stacked
from tokprune.prune.report import ImageReport, Report

from ..run.runner import Runner

FORMAT, VERSION = "tokprune-kept", 1


@dataclass(frozen=True)
class Shown:
    """One method on one picture.

    Args:
        spec: the method as it was asked for.
        budget: by its name, empty for a method that takes none.
        kept: of the picture, as `attachment.kept` has it: indices, or indices by layer.
        report: of the call.
    """

    spec: str
    budget: dict[str, Any]
    kept: torch.Tensor | dict[int, torch.Tensor]
    report: Report

    @property
    def image(self) -> ImageReport:
        """Of the one picture."""
        (image,) = self.report.images
        return image

    def to_dict(self) -> dict[str, Any]:
        """As `Explained.to_dict` describes it."""
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
    """What methods keep of a picture, to be drawn, printed or written down.

    Args:
        picture: as it is.
        pixels: (crops, 3, H, W), as the model was given it.
        runner: who was asked.
        shown: one entry a method.
    """

    picture: Image.Image
    pixels: torch.Tensor
    runner: Runner
    shown: list[Shown]

    @property
    def lines(self) -> list[str]:
        """The reports."""
        return [str(one.report) for one in self.shown]

    def sheet(self) -> Image.Image:
        """The picture as the model sees it and, beside it, what each method keeps."""
        return side_by_side(self.panels())

    def panels(self) -> list[tuple[str, Image.Image]]:
        """The same one by one, with titles."""
        processor = self.runner.processor.image_processor
        panels = []
        for one in self.shown:
            image = one.image
            order = list(dict.fromkeys(crop for crop in image.layout.crop if crop >= 0))
            whole = seen(self.pixels[order.index(0) if 0 in order else 0], processor.image_mean, processor.image_std)
            if not panels:
                panels.append(("as the model sees it", _both(whole, self.picture, image.layout)))
            patch = self.runner.model.config.vision_config.patch_size
            patch = patch if isinstance(patch, int) else patch[0]
            cells = whole if len(order) > 1 else _covered(whole, image.layout, patch)
            title = f"{one.spec}: {image.n_visual} -> {image.n_kept}"
            panels.append((title, _both(cells, self.picture, image.layout, image.left)))
        return panels

    def to_dict(self, **asked: Any) -> dict[str, Any]:
        """Plain numbers, lists and text; `asked` says of which picture, with which question and model.

        Of every method: `spec` and `budget` as `attach` takes them, and the `report`; `n_rows`, the placeholders of
        the picture, of which `n_visual` show a patch; `n_kept`, how many of those are left in the end. `kept` are
        indices among the placeholders, from 0, rows without a patch among them; for methods between decoder layers an
        object, by layer what is left from it on, 0 for before the first. `tokens` are those that are left in the end,
        with index, crop, row and column as `types.Layout` has them (crop 0 is the thumbnail or only crop, rows and
        columns of the others are of their mosaic), and `newlines` the indices of rows without a patch beside them.
        `grids` are rows and columns of the thumbnail or only crop, and of the mosaic, as far as they exist.

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
        """Write `to_dict` to a file; it is there complete, or not at all.

        Raises:
            OSError: it cannot be written.
        """
        write_text(path, json.dumps(self.to_dict(**asked), indent=1) + "\n")


Methods = Sequence[tuple[str, dict[str, Any]]]


@torch.no_grad()
def asked(runner: Runner, picture: Image.Image, question: str, methods: Methods, salt: int = 0) -> Explained:
    """What each method with its budget keeps of a picture beside a question.

    `salt` is what seeded methods mix in: a run has one a question, see `tokprune.Attachment.salts`.
    """
    inputs = runner.processor(images=[picture], text=[runner.prompt(question)], return_tensors="pt")
    inputs = inputs.to(runner.model.device, runner.model.dtype)
    shown = []
    for spec, budget in methods:
        with tokprune.attach(runner.model, spec, **budget) as attachment:
            attachment.salts = [salt]
            runner.model(**inputs)
            (kept,) = attachment.kept
            shown.append(Shown(spec, budget, kept, attachment.report))
    return Explained(picture, inputs["pixel_values"].flatten(0, -4), runner, shown)


def explained(runner: Runner, picture: Image.Image, question: str, methods: Methods) -> tuple[Image.Image, list[str]]:
    """The picture as the model sees it and, beside it, what each method with its budget keeps; and the reports."""
    found = asked(runner, picture, question, methods)
    return found.sheet(), found.lines


def _both(whole: Image.Image, picture: Image.Image, layout: Layout, kept: torch.Tensor | None = None) -> Image.Image:
    """What the only crop shows; or the thumbnail and, below it, the picture that the crops cut up."""
    parts = [whole, picture][: len(layout.regions)] if 0 in layout.crops else [picture]
    if kept is not None:
        parts = [dimmed(p, layout, kept, region=r) for p, r in zip(parts, layout.regions, strict=True)]
    return enlarged(parts[0]) if len(parts) == 1 else stacked(*map(enlarged, parts))


def _covered(whole: Image.Image, layout: Layout, patch: int) -> Image.Image:
    """A side that is no multiple of the patch has pixels at its end that no token shows."""
    cell = patch * max(1, whole.width // patch // layout.width)  # a token may show several patches
    return whole.crop((0, 0, layout.width * cell, layout.height * cell))
