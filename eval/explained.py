"""Pictures of what methods keep, made by running a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import tokprune
from tokprune.errors import TaskError
from tokprune.explain import dimmed, enlarged, seen, side_by_side, stacked
from tokprune.types import Layout

from .run import Runner
from .tasks.base import UNREADABLE


def open_picture(path: Path) -> Image.Image:
    """An RGB picture.

    Raises:
        TaskError: it cannot be read.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except UNREADABLE as error:
        raise TaskError(f"cannot read the picture {path}: {error}; name a PNG or JPEG file") from error


def explained(
    runner: Runner, picture: Image.Image, question: str, methods: Sequence[tuple[str, dict[str, Any]]], salt: int = 0
) -> tuple[Image.Image, list[str]]:
    """The picture as the model sees it and, beside it, what each method with its budget keeps; and the reports."""
    panels, lines = drawn(runner, picture, question, methods, salt)
    return side_by_side(panels), lines


@torch.no_grad()
def drawn(
    runner: Runner, picture: Image.Image, question: str, methods: Sequence[tuple[str, dict[str, Any]]], salt: int = 0
) -> tuple[list[tuple[str, Image.Image]], list[str]]:
    """Titled pictures: as the model sees it, then what each method with its budget keeps; and the reports.

    Args:
        runner: model and processor.
        picture: RGB.
        question: asked beside it.
        methods: specifications with what `tokprune.attach` takes as their budget.
        salt: what seeded methods mix in; a run has one a question, see `tokprune.Attachment.salts`.
    """
    inputs = runner.processor(images=[picture], text=[runner.prompt(question)], return_tensors="pt")
    inputs = inputs.to(runner.model.device, runner.model.dtype)
    processor = runner.processor.image_processor
    crops = inputs["pixel_values"].flatten(0, -4)
    panels, lines = [], []
    for spec, budget in methods:
        with tokprune.attach(runner.model, spec, **budget) as attachment:
            attachment.salts = [salt]
            runner.model(**inputs)
            report = attachment.report
        (image,) = report.images
        order = list(dict.fromkeys(crop for crop in image.layout.crop if crop >= 0))
        whole = seen(crops[order.index(0) if 0 in order else 0], processor.image_mean, processor.image_std)
        if not panels:
            panels.append(("as the model sees it", _both(whole, picture, image.layout)))
        patch = runner.model.config.vision_config.patch_size
        shown = (
            whole if len(order) > 1 else _covered(whole, image.layout, patch if isinstance(patch, int) else patch[0])
        )
        title = f"{spec}: {image.n_visual} -> {image.n_kept}"
        panels.append((title, _both(shown, picture, image.layout, image.left)))
        lines.append(str(report))
    return panels, lines


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
