"""watchit: short clips of coloured shapes, about what changes in them; answering needs the right moments.

Clips are drawn from a seed, so nothing is downloaded and nothing is shipped: clip `index` of a split is the same
everywhere. Each has eight frames of 64 x 64 pixels over findit's backgrounds, still or with noise that is new in every
frame. Two shapes stay, one moves for a moment, and one or two come up later: half see-through in their first frame, as
some of the shapes that stay are all the time. So nothing in a single frame tells what moved, or what came.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tokprune.prune.videos import Clip

from . import findit
from .base import Sample

SIZE = 64
N_FRAMES = 8
FPS = 2.0
KINDS = ("moved", "appeared", "last", "count")
N_TEST_CLIPS = 1000
N_STEPS = 3  # of a movement, one a frame
FAINT = 0.5  # opacity of a shape in its first frame, and of some that are there from the start
SHARE_FAINT = 0.4
COUNTS = (1, 2, 3, 4)  # frames that show the shape that "how many frames" is asked of


@dataclass(frozen=True)
class Actor:
    """A shape: what it is, where it begins (left and top, pixels), when it comes up, and how it moves.

    `begins` is its first frame, 0 where it is there from the start. It moves by `step` pixels between each two of the
    frames `moves_from` to `moves_from + N_STEPS`.
    """

    kind: str
    colour: str
    left: int
    top: int
    width: int
    begins: int = 0
    faint: bool = False
    step: tuple[int, int] = (0, 0)
    moves_from: int = 0

    def at(self, frame: int) -> tuple[int, int]:
        """Left and top in a frame."""
        done = min(max(frame - self.moves_from, 0), N_STEPS)
        return self.left + done * self.step[0], self.top + done * self.step[1]

    def opacity(self, frame: int) -> float:
        """0 before it comes up."""
        if frame < self.begins:
            return 0.0
        return FAINT if self.faint or 0 < self.begins == frame else 1.0

    @property
    def moves(self) -> bool:
        return self.step != (0, 0)

    @property
    def boxes(self) -> list[tuple[int, int, int]]:
        """Everywhere it is (left, top, width)."""
        return [(*self.at(f), self.width) for f in range(self.moves_from, self.moves_from + N_STEPS + 1)]


def draw(split: str, index: int) -> tuple[np.ndarray, list[Actor]]:
    """Clip `index` of a split: frames, (8, 64, 64, 3) uint8, and what is in them."""
    rng = np.random.default_rng((20_30, findit.SPLITS[split], index))
    actors = _cast(rng)
    paints = [np.array(findit.COLOURS[a.colour]) + rng.uniform(-14, 14, 3) for a in actors]
    still = findit.background(rng)[:SIZE, :SIZE]
    noise = rng.uniform(4, 10) if rng.random() < 0.5 else 0.0
    frames = []
    for frame in range(N_FRAMES):
        image = still + noise * rng.standard_normal(still.shape) if noise else still.copy()
        for actor, paint in zip(actors, paints, strict=True):
            _paint(image, actor, frame, paint)
        frames.append(image)
    return np.clip(np.stack(frames), 0, 255).astype(np.uint8), actors


def _paint(image: np.ndarray, actor: Actor, frame: int, paint: np.ndarray) -> None:
    (x, y), width = actor.at(frame), actor.width
    cover = actor.opacity(frame) * findit._coverage(actor.kind, width)[..., None]
    window = image[y : y + width, x : x + width]
    window += cover * (paint - window)


def _cast(rng: np.random.Generator) -> list[Actor]:
    """The mover, two that stay, and one or two that come up; no two alike, none in the way of another."""
    begins = _beginnings(rng)
    looks = rng.permutation(len(findit.SHAPES) * len(findit.COLOURS))
    while True:
        actors: list[Actor] = []
        for i, start in enumerate([0, 0, 0, *begins]):
            kind, colour = divmod(int(looks[i]), len(findit.COLOURS))
            faint = start == 0 and bool(rng.random() < SHARE_FAINT)
            look = findit.SHAPES[kind], list(findit.COLOURS)[colour]
            actor = _place(rng, look, actors, moves=i == 0, begins=start, faint=faint)
            if actor is None:
                break
            actors.append(actor)
        else:
            return actors


def _beginnings(rng: np.random.Generator) -> list[int]:
    """First frames of those that come up: one of them, or two at least two frames apart."""
    last = N_FRAMES - int(rng.choice(COUNTS))
    if rng.random() < 0.5:
        return [int(rng.integers(1, last - 1)), last]
    early = N_FRAMES - max(COUNTS)
    return [last if rng.random() < 0.7 else int(rng.integers(1, early))]


def _place(
    rng: np.random.Generator, look: tuple[str, str], others: list[Actor], moves: bool, begins: int, faint: bool
) -> Actor | None:
    """An actor at a free place, or None where none is found."""
    taken = [box for other in others for box in other.boxes]
    for _ in range(40):
        width = int(rng.integers(11, 15))
        left, top = (int(v) for v in rng.integers(1, SIZE - width, 2))
        step, moves_from = (0, 0), 0
        if moves:
            angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(4.5, 7)
            step = round(length * math.cos(angle)), round(length * math.sin(angle))
            moves_from = int(rng.integers(0, N_FRAMES - N_STEPS))
        actor = Actor(*look, left, top, width, begins, faint, step, moves_from)
        inside = all(x > 0 and x + width < SIZE and y > 0 and y + width < SIZE for x, y, _ in actor.boxes)
        if inside and all(findit.is_free(box, taken) for box in actor.boxes):
            return actor
    return None


def _ask_moved(rng: np.random.Generator, actors: list[Actor]) -> tuple[str, str] | None:
    (mover,) = (a for a in actors if a.moves)
    return _what(rng, "moved", mover)


def _ask_appeared(rng: np.random.Generator, actors: list[Actor]) -> tuple[str, str] | None:
    late = [a for a in actors if a.begins]
    return _what(rng, "appeared", late[0]) if len(late) == 1 else None


def _ask_last(rng: np.random.Generator, actors: list[Actor]) -> tuple[str, str] | None:
    late = [a for a in actors if a.begins]
    return _what(rng, "came last", max(late, key=lambda a: a.begins)) if len(late) == 2 else None


def _ask_count(rng: np.random.Generator, actors: list[Actor]) -> tuple[str, str] | None:
    last = max(actors, key=lambda a: a.begins)
    shown = N_FRAMES - last.begins
    return (f"how many frames show the {last.colour} {last.kind}?", str(shown)) if shown in COUNTS else None


def _what(rng: np.random.Generator, did: str, actor: Actor) -> tuple[str, str]:
    if rng.random() < 0.5:
        return f"what color {did}?", actor.colour
    return f"what shape {did}?", actor.kind


_ASK = {"moved": _ask_moved, "appeared": _ask_appeared, "last": _ask_last, "count": _ask_count}


def ask(rng: np.random.Generator, actors: list[Actor], rounds: int = 1) -> list[tuple[str, str, str]]:
    """Distinct (question, answer, kind) about a clip, as `findit.ask`."""
    return findit.ask(rng, actors, rounds, KINDS, _ASK)


class WatchIt:
    """The task: what moved, what appeared or came last, and for how many frames it shows."""

    name = "watchit"
    kinds: Sequence[str] = KINDS
    seed = 20_31  # of the questions
    calibration_split = "validation"  # what settings are found on

    def __init__(self, split: str = "test", n_clips: int = N_TEST_CLIPS):
        self.split, self.n_clips = split, n_clips

    def samples(self) -> list[Sample]:
        """One question of each kind a clip, where the clip allows it."""
        return _samples(self.split, self.n_clips)

    def train_samples(self) -> list[Sample]:
        return _samples("train", self.n_clips)

    def image(self, image_id: str) -> Clip:
        """The clip of a sample."""
        split, index = image_id.split("-")
        return _clip(split, int(index))


@functools.lru_cache(maxsize=8)
def _samples(split: str, n_clips: int) -> list[Sample]:
    samples = []
    for index in range(n_clips):
        rng = np.random.default_rng((WatchIt.seed, findit.SPLITS[split], index))
        for question, answer, kind in ask(rng, draw(split, index)[1]):
            samples.append(Sample(f"{split}-{index}-{kind}", f"{split}-{index}", question, answer, kind))
    return samples


@functools.lru_cache(maxsize=256)
def _clip(split: str, index: int) -> Clip:
    return Clip(tuple(Image.fromarray(frame) for frame in draw(split, index)[0]), FPS)
