"""Is this row a beam copy? The one answer, for rows of a batch, encoded pictures and their salts.

`generate` repeats every row for its beams, and transformers 4 repeats the pictures with them. Copies lie next to each
other, share what is selected, and are reported once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from ..core.errors import OptionError
from ..core.lazy import torch
from .report import ImageReport

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def same_as_before(*rows: Tensor) -> Tensor:
    """(B - 1,) bool, on the device: whether a row equals the one before it in every tensor, each (B, ...)."""
    return torch.stack([(x[1:] == x[:-1]).flatten(1).all(1) for x in rows]).all(0)


def leaders(same: Sequence[bool]) -> list[int]:
    """By row, the first row that it is a copy of; `same` is `same_as_before`, (B - 1,)."""
    found = [0]
    for row, is_copy in enumerate(same, start=1):
        found.append(found[-1] if is_copy else row)
    return found


def repeated(values: Sequence[T], n: int) -> list[T] | None:
    """One value for each of n pictures, each repeated in place for copies; None where that does not come out even."""
    if not values or n % len(values):
        return None
    return [value for value in values for _ in range(n // len(values))]


def salts_of(salts: Sequence[int], n_images: int, before: int = 0) -> tuple[int, ...]:
    """One salt an image.

    Args:
        salts: one for all, or one an image, videos after the images.
        n_images: that were encoded together.
        before: images of the call that were encoded before.

    Raises:
        OptionError: they are neither one for all nor one an image.
    """
    if salts and n_images % len(salts) and before + n_images <= len(salts):
        return tuple(salts[before : before + n_images])
    found = repeated(salts, n_images)
    if found is None:
        raise OptionError(
            f"{len(salts)} salts for {n_images} images; set attachment.salts to one an image, or to one for all"
        )
    return tuple(found)


def folded(images: list[ImageReport], rows: Tensor | None) -> list[ImageReport]:
    """One entry an image, copies left out.

    Args:
        images: as encoded.
        rows: (B, S) input_ids that may hold copies, or None.
    """
    if rows is None or len(images) < 2:
        return list(images)
    sizes = {len(list(group)) for _, group in itertools.groupby(leaders(same_as_before(rows).tolist()))}
    n = sizes.pop() if len(sizes) == 1 else 1
    alike = len(images) % n == 0 and all(_same_kept(image, images[i - i % n]) for i, image in enumerate(images))
    return images[::n] if alike else list(images)


def _same_kept(a: ImageReport, b: ImageReport) -> bool:
    one, other = a.kept_by_layer, b.kept_by_layer
    return one.keys() == other.keys() and all(torch.equal(one[layer], other[layer]) for layer in one)
