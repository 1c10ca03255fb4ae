"""Which columns of a prompt show which image, at every layer of a pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokprune.core import ops
from tokprune.core.layout import Layout
from tokprune.prune.copies import leaders, repeated
from tokprune.prune.report import ImageReport

from ..passes import Call
from ..prompt import places_of
from .shorten import Entry

TEXT, PADDING = -1, -2


@dataclass
class ImageState:
    """An image in the prompt of a pass.

    Args:
        number: its place among the images of the pass.
        row: of the batch; where rows are copies of each other, the first of them.
        report: what is told about it.
        n: visual tokens that are still there.
        n_received: that the language model was given.
        n_special: rows that show no patch and are still there.
        targets: visual tokens left from a layer on.
        after: its last column, and `last` the last one of any image of its row; of this pass before any cut.
        n_text: tokens of text by what a signal asks for.
        salt: for seeded randomness.
    """

    number: int
    row: int
    report: ImageReport
    n: int
    n_received: int
    n_special: int
    targets: dict[int, int]
    after: int
    last: int
    n_text: dict[str, int]
    salt: int = 0

    @property
    def layout(self) -> Layout:
        """Where its rows lie."""
        return self.report.layout


@dataclass
class PromptState:
    """One pass: what its columns are, at the layer that is reached. Tensors are (B, K).

    Args:
        owner: number of the image of a column, or TEXT or PADDING.
        index: place of an image's column among its rows.
        shows: whether a column shows a patch.
        place: column before any cut.
        end: (B,) the last column of the prompt; what comes after it was generated.
        leader: by row, the first row that is the same.
        copies: reports of images in rows that are copies, each with the report that it shares its cuts with.
        images: of leading rows.
        n_text: valid columns that belong to no image, by row.
        n_tail: columns after the last image, in every row.
        embeds: (B, S, D), before any cut; None where nobody asks for them.
        owner_before, shows_before: before any cut.
        masses: (B,) attention to visual tokens, by layer.
        mistakes: scalars on the device, one a selection, as `tokprune.methods.base.mistake`.
    """

    owner: Tensor
    index: Tensor
    shows: Tensor
    place: Tensor
    end: Tensor
    leader: list[int]
    copies: list[tuple[ImageReport, ImageReport]]
    images: list[ImageState]
    n_text: list[int]
    n_tail: int
    embeds: Tensor | None
    owner_before: Tensor
    shows_before: Tensor
    masses: dict[int, Tensor] = field(default_factory=dict)
    mistakes: list[Tensor] = field(default_factory=list)

    def widths(self) -> list[int]:
        """Columns of every leading row that are not padding."""
        found = list(self.n_text)
        for image in self.images:
            found[image.row] += image.n + image.n_special
        return found

    def gather(self, keep: Tensor, longest: int) -> None:
        """Go on with the columns that stay."""
        source, valid = ops.right_align(keep, longest)
        self.owner = self.owner.gather(1, source).masked_fill(~valid, PADDING)
        self.index, self.place = self.index.gather(1, source), self.place.gather(1, source)
        self.shows = self.shows.gather(1, source) & valid


def owners(call: Call, masks: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, list[tuple[ImageReport, Any]]]:
    """(B, S) image and place of every column, on the host, and the images with their places."""
    shape = next(iter(masks.values())).shape
    owner, index = torch.full(shape, TEXT), torch.zeros(shape, dtype=torch.long)
    found: list[tuple[ImageReport, Any]] = []
    for name, mask in masks.items():
        reports = [call.images[i] for i in call.by_name.get(name, ())]
        if not reports:
            continue
        lengths = [len(r.layout.crop) for r in reports]
        for report, place in zip(reports, places_of(mask, sum(lengths), lengths), strict=True):
            at = torch.tensor(place.columns)
            for row in place.rows:
                owner[row, at], index[row, at] = len(found), torch.arange(len(at))
            found.append((report, place))
    return owner, index, found


def prompt_state(
    entry: Entry, found: list, host: tuple[Tensor, ...], end: int, salts: Sequence[int], embeds: bool
) -> PromptState:
    """The prompt of a pass, its images without targets.

    Args:
        entry: what enters the language model.
        found: images and their places in the user's columns.
        host: (B, S) owner and index of the user's columns, the user's columns that are left, and which of them are
            valid; (B - 1,) whether a row is the one before it again. On the host.
        end: columns of the prompt; what comes after was generated.
        salts: for seeded randomness.
        embeds: whether somebody asks for the embeddings.
    """
    owner, index, columns, valid, same = host
    owner = owner.gather(1, columns).masked_fill(~valid, PADDING)
    index = index.gather(1, columns)
    leader = leaders(same.tolist())
    salt_of = repeated(tuple(salts), len(found)) or [salts[i * len(salts) // len(found)] for i in range(len(found))]
    places = torch.arange(owner.shape[1]).expand(owner.shape)
    inside = valid & (columns < end)
    ends = places.masked_fill(~inside, -1).amax(1)
    images = []
    for number, (report, place) in enumerate(found):
        salt = salt_of[number]
        # Copies of a prompt share what is selected; beams stop being copies where they are passed whole again.
        for row in (r for r in place.rows if leader[r] == r):
            images.append(_image_state(number, row, report, salt, owner[row], index[row]))
    last = {row: max(i.after for i in images if i.row == row) for row in {i.row for i in images}}
    for image in images:
        image.last = last[image.row]
        text = (owner[image.row] == TEXT) & inside[image.row]
        for name, start in (("after", image.after), ("last", image.last), ("all", -1)):
            image.n_text[name] = int((text & (places[0] > start)).sum())
    is_own = owner >= 0
    tail = places.masked_fill(~is_own & valid, -1).amax(1)
    device = entry.embeds.device
    patches = torch.zeros(owner.shape, dtype=torch.bool)
    for number, (report, _) in enumerate(found):
        crop = torch.tensor(report.layout.crop) >= 0
        patches |= (owner == number) & crop[index.clamp(max=len(crop) - 1)]
    sent, shows = owner.to(device, non_blocking=True), patches.to(device, non_blocking=True)
    return PromptState(
        owner=sent,
        index=index.to(device, non_blocking=True),
        shows=shows,
        place=places.to(device, non_blocking=True),
        end=ends.to(device, non_blocking=True),
        leader=leader,
        copies=_copies(found, leader),
        images=images,
        n_text=((owner == TEXT) & valid).sum(1).tolist(),
        n_tail=int(owner.shape[1] - 1 - tail.amax()),
        embeds=entry.embeds if embeds else None,
        owner_before=sent,
        shows_before=shows,
    )


def _copies(found: list, leader: list[int]) -> list[tuple[ImageReport, ImageReport]]:
    by_row: dict[int, list[ImageReport]] = {}
    for report, place in found:
        for row in place.rows:
            by_row.setdefault(row, []).append(report)
    pairs = [pair for row in by_row for pair in zip(by_row[row], by_row[leader[row]], strict=True)]
    return [(copy, first) for copy, first in pairs if copy is not first]


def _image_state(number: int, row: int, report: ImageReport, salt: int, owner: Tensor, index: Tensor) -> ImageState:
    at = (owner == number).nonzero()[:, 0]
    crops = report.layout.crop
    n = sum(crops[i] >= 0 for i in index[at].tolist())
    after = int(at[-1]) if len(at) else -1
    return ImageState(number, row, report, n, n, len(at) - n, {}, after, after, {}, salt)
