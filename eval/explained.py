"""Pictures of what methods keep, made by running a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import tokprune
from tokprune.errors import TaskError
from tokprune.explain import dimmed, enlarged, seen, side_by_side

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


@torch.no_grad()
def explained(
    runner: Runner, picture: Image.Image, question: str, methods: Sequence[tuple[str, dict[str, Any]]]
) -> tuple[Image.Image, list[str]]:
    """The picture as the model sees it and, beside it, what each method with its budget keeps; and the reports."""
    inputs = runner.processor(images=[picture], text=[runner.prompt(question)], return_tensors="pt")
    inputs = inputs.to(runner.model.device, runner.model.dtype)
    processor = runner.processor.image_processor
    whole = seen(inputs["pixel_values"][0], processor.image_mean, processor.image_std)
    panels, lines = [("as the model sees it", enlarged(whole))], []
    for spec, budget in methods:
        with tokprune.attach(runner.model, spec, **budget) as attachment:
            runner.model(**inputs)
            report = attachment.report
        (image,) = report.images
        title = f"{spec}: {image.n_visual} -> {image.n_kept}"
        # A side that is no multiple of the patch has pixels at its end that no token shows.
        patch = runner.model.config.vision_config.patch_size
        shown = whole.crop((0, 0, image.layout.width * patch, image.layout.height * patch))
        panels.append((title, enlarged(dimmed(shown, image.layout, image.kept))))
        lines.append(str(report))
    return side_by_side(panels), lines
