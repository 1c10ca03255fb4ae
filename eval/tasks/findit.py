"""findit: small coloured shapes on a busy background; answering needs the right place of the picture.

Scenes are drawn from a seed, so nothing is downloaded and nothing is shipped: scene `index` of a split is
the same picture everywhere. Each has three to six shapes of 12 to 17 pixels on 96 x 96, over textured noise
with grey strokes and blobs as distractors, and every question is about one or some of the shapes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .base import Sample

SIZE = 96
COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 210, 50),
    "purple": (150, 60, 190),
    "orange": (240, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses", "ring": "rings"}
KINDS = ("colour", "shape", "existence", "count", "position")
SPLITS = {"train": 0, "validation": 1, "test": 2, "crowded": 3}
N_TEST_SCENES = 2000
CENTRE_MARGIN = 5  # a shape this near to a middle line is in no quadrant for certain


@dataclass(frozen=True)
class Shape:
    """A drawn shape: its kind, its colour, its centre (pixels, x to the right, y down) and its width."""

    kind: str
    colour: str
    x: float
    y: float
    width: int


@functools.cache
def _coverage(kind: str, width: int, oversample: int = 4) -> np.ndarray:
    """Share of each pixel that the shape covers, (width, width)."""
    n = width * oversample
    v, u = (np.mgrid[0:n, 0:n] - (n - 1) / 2) / (n / 2)
    radius = np.hypot(u, v)
    inside = {
        "circle": radius <= 1,
        "square": (abs(u) <= 0.9) & (abs(v) <= 0.9),
        "triangle": abs(u) <= (v + 1) / 2,
        "cross": (abs(u) <= 0.33) | (abs(v) <= 0.33),
        "ring": (radius <= 1) & (radius >= 0.55),
    }[kind]
    return inside.reshape(width, oversample, width, oversample).mean((1, 3))


def background(rng: np.random.Generator, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """Textured noise with strokes and blobs, (height, width, 3); as dense on a large picture as on a small one."""
    grey = rng.uniform(60, 190)
    cells = int(rng.integers(4, 13))
    coarse = Image.fromarray(rng.uniform(-28, 28, (cells * height // SIZE, cells * width // SIZE)).astype(np.float32))
    image = grey + rng.uniform(-14, 14, 3) + np.asarray(coarse.resize((width, height), Image.BICUBIC))[..., None]
    image = image + rng.normal(0, rng.uniform(4, 11), (height, width, 1)) + rng.normal(0, 3, (height, width, 3))
    n_times = height * width // SIZE**2
    for _ in range(n_times * rng.integers(1, 4)):
        _stroke(image, rng, grey)
    for _ in range(n_times * rng.integers(0, 3)):
        _blob(image, rng, grey)
    return image


def _stroke(image: np.ndarray, rng: np.random.Generator, grey: float) -> None:
    height, width = image.shape[:2]
    x0, y0 = rng.uniform(0, (width, height))
    angle, length = rng.uniform(0, math.pi), rng.uniform(10, 40)
    steps = np.arange(0, length, 0.5)
    x, y = (x0 + steps * math.cos(angle)).astype(int), (y0 + steps * math.sin(angle)).astype(int)
    inside = (x >= 0) & (x < width - 1) & (y >= 0) & (y < height - 1)
    shade = grey + rng.choice([-60, 60])
    for dx, dy in ((0, 0), (0, 1), (1, 0), (1, 1)):
        image[y[inside] + dy, x[inside] + dx] = shade


def _blob(image: np.ndarray, rng: np.random.Generator, grey: float) -> None:
    height, width = image.shape[:2]
    x0, y0 = rng.uniform(6, (width - 6, height - 6))
    y, x = np.mgrid[0:height, 0:width]
    weight = np.exp(-(((x - x0) / rng.uniform(3, 6)) ** 2 + ((y - y0) / rng.uniform(3, 6)) ** 2))[..., None]
    image += weight * (grey + rng.choice([-50, 50]) - image)


def _place(rng: np.random.Generator, n_shapes: int) -> list[tuple[int, int, int]]:
    """Up to `n_shapes` boxes (left, top, width) at least two pixels apart."""
    boxes: list[tuple[int, int, int]] = []
    for _ in range(40 * n_shapes):
        if len(boxes) == n_shapes:
            break
        width = int(rng.integers(12, 18))
        x, y = (int(v) for v in rng.integers(1, SIZE - width, 2))
        if is_free((x, y, width), boxes):
            boxes.append((x, y, width))
    return boxes


def is_free(box: tuple[int, int, int], boxes: list[tuple[int, int, int]]) -> bool:
    """Whether a box (left, top, width) is at least two pixels from all others."""
    x, y, width = box
    return all(
        x + width + 2 <= left or left + other + 2 <= x or y + width + 2 <= top or top + other + 2 <= y
        for left, top, other in boxes
    )


def draw(split: str, index: int) -> tuple[np.ndarray, list[Shape]]:
    """Scene `index` of a split: the picture, (96, 96, 3) uint8, and what is in it."""
    rng = np.random.default_rng((20_26, SPLITS[split], index))
    image = background(rng)
    n_shapes = 9 if split == "crowded" else int(rng.choice([3, 4, 5, 6]))
    shapes = paint_shapes(image, rng, _place(rng, n_shapes))
    return np.clip(image, 0, 255).astype(np.uint8), shapes


def paint_shapes(image: np.ndarray, rng: np.random.Generator, boxes: list[tuple[int, int, int]]) -> list[Shape]:
    """Paint a shape of any kind and colour into every box (left, top, width)."""
    shapes = []
    for x, y, width in boxes:
        kind, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
        cover = _coverage(kind, width)[..., None]
        paint = np.array(COLOURS[colour]) + rng.uniform(-14, 14, 3)
        window = image[y : y + width, x : x + width]
        window += cover * (paint - window)
        shapes.append(Shape(kind, colour, x + width / 2, y + width / 2, width))
    return shapes


def _ask_colour(rng: np.random.Generator, shapes: list[Shape]) -> tuple[str, str] | None:
    single = [s for s in shapes if sum(o.kind == s.kind for o in shapes) == 1]
    if not single:
        return None
    shape = single[rng.integers(len(single))]
    return f"what color is the {shape.kind}?", shape.colour


def _ask_shape(rng: np.random.Generator, shapes: list[Shape]) -> tuple[str, str] | None:
    single = [s for s in shapes if sum(o.colour == s.colour for o in shapes) == 1]
    if not single:
        return None
    shape = single[rng.integers(len(single))]
    return f"what shape is {shape.colour}?", shape.kind


def _ask_existence(rng: np.random.Generator, shapes: list[Shape]) -> tuple[str, str] | None:
    present = {(s.kind, s.colour) for s in shapes}
    if rng.random() < 0.5:
        kind, colour = sorted(present)[rng.integers(len(present))]
        return f"is there a {colour} {kind}?", "yes"
    # Mostly near misses: a colour and a shape that are both there, on different objects.
    kinds, colours = sorted({s.kind for s in shapes}), sorted({s.colour for s in shapes})
    near = rng.random() < 0.7
    pairs = [(k, c) for k in (kinds if near else SHAPES) for c in (colours if near else COLOURS)]
    absent = [pair for pair in pairs if pair not in present]
    if not absent:
        return None
    kind, colour = absent[rng.integers(len(absent))]
    return f"is there a {colour} {kind}?", "no"


def _ask_count(rng: np.random.Generator, shapes: list[Shape]) -> tuple[str, str] | None:
    # The number is drawn first, so that no number is the safe guess.
    counts = {PLURALS[k]: sum(s.kind == k for s in shapes) for k in SHAPES}
    counts |= {f"{c} shapes": sum(s.colour == c for s in shapes) for c in COLOURS}
    number = rng.choice(sorted(set(counts.values())))
    names = sorted(name for name, count in counts.items() if count == number)
    return f"how many {names[rng.integers(len(names))]} are there?", str(number)


def _ask_position(rng: np.random.Generator, shapes: list[Shape]) -> tuple[str, str] | None:
    single = [
        s
        for s in shapes
        if sum((o.kind, o.colour) == (s.kind, s.colour) for o in shapes) == 1
        and min(abs(s.x - SIZE / 2), abs(s.y - SIZE / 2)) >= CENTRE_MARGIN
    ]
    if not single:
        return None
    shape = single[rng.integers(len(single))]
    vertical, horizontal = "top" if shape.y < SIZE / 2 else "bottom", "left" if shape.x < SIZE / 2 else "right"
    return f"where is the {shape.colour} {shape.kind}?", f"{vertical} {horizontal}"


_ASK = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "existence": _ask_existence,
    "count": _ask_count,
    "position": _ask_position,
}


def ask(
    rng: np.random.Generator,
    shown: Sequence[Any],
    rounds: int = 1,
    kinds: Sequence[str] = KINDS,
    makers: Mapping[str, Callable[..., tuple[str, str] | None]] = _ASK,
) -> list[tuple[str, str, str]]:
    """Distinct (question, answer, kind) about what is shown: up to one of each kind a round, where it allows one.

    Args:
        rng: draws what is asked.
        shown: the shapes of a scene, or what `makers` take.
        rounds: how often each kind is tried.
        kinds: of questions.
        makers: a question and its answer, by kind.
    """
    asked: dict[str, tuple[str, str, str]] = {}
    for _ in range(rounds):
        for kind in kinds:
            pair = makers[kind](rng, shown)
            if pair:
                asked.setdefault(pair[0], (*pair, kind))
    return list(asked.values())


class FindIt:
    """The task: five kinds of questions about the scenes of a split."""

    name = "findit"
    kinds: Sequence[str] = KINDS
    seed = 20_27  # of the questions
    calibration_split = "validation"  # what settings are found on
    draw = staticmethod(draw)

    def __init__(self, split: str = "test", n_scenes: int = N_TEST_SCENES):
        self.split, self.n_scenes = split, n_scenes

    def samples(self) -> list[Sample]:
        """One question of each kind a scene, where the scene allows it."""
        return _samples(type(self), self.split, self.n_scenes)

    def train_samples(self) -> list[Sample]:
        return _samples(type(self), "train", self.n_scenes)

    def image(self, image_id: str) -> Image.Image:
        split, index = image_id.split("-")
        return Image.fromarray(self.draw(split, int(index))[0])


@functools.lru_cache(maxsize=8)
def _samples(task: type[FindIt], split: str, n_scenes: int) -> list[Sample]:
    samples = []
    for index in range(n_scenes):
        shapes = task.draw(split, index)[1]
        rng = np.random.default_rng((task.seed, SPLITS[split], index))
        for question, answer, kind in ask(rng, shapes, kinds=task.kinds):
            samples.append(Sample(f"{split}-{index}-{kind}", f"{split}-{index}", question, answer, kind))
    return samples
