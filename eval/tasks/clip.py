"""A video as a task gives it."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Clip:
    """A video: its frames, RGB, all of one size, and how many of them a second shows."""

    frames: tuple[Image.Image, ...]
    fps: float = 2.0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.frames[0].size
