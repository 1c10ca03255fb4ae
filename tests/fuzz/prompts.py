"""Batches from the rows of a case, as a processor would make them, and rows with where their pictures lie."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import tiny
import torch
from fuzz.cases import N_FRAMES, Row
from torch import Tensor

VIDEO_ROWS = N_FRAMES * 9 + 1


@dataclass
class Shown:
    """A picture or video in a row: its columns, and which of its rows stay from a layer on."""

    start: int
    n: int
    video: bool
    kept: dict[int, Tensor] = field(default_factory=dict)

    def left(self, layer: int) -> Tensor:
        """Rows that are there in a layer."""
        found = [at for at in sorted(self.kept) if at <= layer]
        return self.kept[found[-1]] if found else torch.arange(self.n)


@dataclass
class Line:
    """One row without padding: ids, pictures, and where each turn began with which items."""

    ids: list[int]
    images: list[Shown]
    turns: list[tuple[int, Row]]

    def then(self, more: Line) -> Line:
        """With another turn behind it."""
        n = len(self.ids)
        images = [replace(image, start=image.start + n) for image in more.images]
        return Line(self.ids + more.ids, self.images + images, self.turns + [(n + a, row) for a, row in more.turns])


def line_of(kind: str, row: Row, text: int) -> Line:
    """Ids of one row; the words follow from its seed."""
    generator = torch.Generator().manual_seed(abs(text))
    alone = sum(isinstance(item, str) and item[0] == "p" for item in row) == 1
    ids: list[int] = []
    images: list[Shown] = []
    for item in row:
        if isinstance(item, int):
            words = torch.randint(3, 80, (item,), generator=generator).tolist()
            ids += words if text >= 0 else [5 + i % 4 for i in range(item + 8)]  # what repeats is proposed again
            continue
        video = item[0] == "v"
        n = VIDEO_ROWS if video else tiny.n_rows(kind, int(item[1:]), alone)
        images.append(Shown(len(ids), n, video))
        ids += [tiny.VIDEO if video else tiny.IMAGE] * n
    return Line(ids, images, [(0, row)])


def numbers(row: Row, letter: str) -> list[int]:
    return [int(item[1:]) for item in row if isinstance(item, str) and item[0] == letter]


def pixels_of(kind: str, rows: list[Row], dtype: torch.dtype) -> dict[str, Tensor]:
    """Pictures and videos of all rows."""
    found = tiny.pixels(kind, [numbers(row, "p") for row in rows], dtype)
    videos = [number for row in rows for number in numbers(row, "v")]
    if videos:
        shown = [tiny.pictures(N_FRAMES, seed=70 + number).to(dtype) for number in videos]
        found["pixel_values_videos"] = torch.stack(shown)
    return found


@dataclass
class Batch:
    """Rows of one turn."""

    kind: str
    dtype: torch.dtype
    rows: tuple[Row, ...]
    texts: tuple[int, ...]
    side: str = "left"

    @functools.cached_property
    def lines(self) -> list[Line]:
        return [line_of(self.kind, row, text) for row, text in zip(self.rows, self.texts, strict=True)]

    @property
    def width(self) -> int:
        return max(len(line.ids) for line in self.lines)

    @property
    def is_padded(self) -> bool:
        return len({len(line.ids) for line in self.lines}) > 1

    def alone(self, r: int) -> Batch:
        return replace(self, rows=(self.rows[r],), texts=(self.texts[r],))

    def start(self, r: int) -> int:
        """The first column of a row that is no padding."""
        return self.width - len(self.lines[r].ids) if self.side == "left" else 0

    def mask(self) -> Tensor:
        mask = torch.zeros(len(self.rows), self.width, dtype=torch.long)
        for r, line in enumerate(self.lines):
            mask[r, self.start(r) : self.start(r) + len(line.ids)] = 1
        return mask

    def ids(self) -> Tensor:
        ids = torch.full((len(self.rows), self.width), tiny.PAD)
        for r, line in enumerate(self.lines):
            ids[r, self.start(r) : self.start(r) + len(line.ids)] = torch.tensor(line.ids)
        return ids

    def pixels(self) -> dict[str, Tensor]:
        return pixels_of(self.kind, list(self.rows), self.dtype)

    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids(), "attention_mask": self.mask(), **self.pixels()}

    def images(self) -> list[Shown]:
        """In the order in which a model encodes them: pictures of all rows, then videos."""
        every = [image for line in self.lines for image in line.images]
        return [i for i in every if not i.video] + [i for i in every if i.video]

    def image_rows(self) -> list[int]:
        """The row of each of these."""
        every = [(image, r) for r, line in enumerate(self.lines) for image in line.images]
        return [r for i, r in every if not i.video] + [r for i, r in every if i.video]


def counted(mask: Tensor) -> Tensor:
    """Positions as generate() counts them."""
    return (mask.cumsum(1) - 1).clamp(min=0)
