"""What one call of an attached model did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .errors import OptionError
from .report import ImageReport, Prefill


@dataclass
class Call:
    """What one call of the model did: begun by an encode, or by a language-model pass on an empty cache."""

    encoded: set[str] = field(default_factory=set)
    images: list[ImageReport] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    bad: list[Tensor] = field(default_factory=list)  # whether features held NaN, on the device
    dropped: list[Tensor] = field(default_factory=list)  # whether tokens were dropped, on the device
    below_budget: bool = False  # some image had more tokens than its budget, so some have to be dropped
    touched: bool = False  # a method ran
    pending: list = field(default_factory=list)  # `selection.Encoded`, to be selected when the prompt is known
    marks: list = field(default_factory=list)  # (`prompt.Place`, marked rows, rows before) of what was selected then
    masks: Mapping[str, Tensor] = field(default_factory=dict)  # placeholders of the prompt that they were found in
    by_name: dict[str, range] = field(default_factory=dict)  # places in `images` by encode function
    prompt: Mapping[str, Tensor] = field(default_factory=dict)  # placeholders of the prompt in which layers were cut
    clamped: bool = False
    by_hand: bool = False  # begun by an encode of the user, outside of any generate or forward
    ran: bool = False
    rows: Tensor | None = None  # input_ids whose rows may be beam copies


def repeated_salts(salts: tuple[int, ...], n_images: int, before: int = 0) -> tuple[int, ...]:
    """One salt an image; each repeated in place where beams repeat the pictures.

    Args:
        salts: one for all, or one an image, videos behind the images.
        n_images: that were encoded together.
        before: images of the call that were encoded before.
    """
    if salts and n_images % len(salts) and before + n_images <= len(salts):
        return salts[before : before + n_images]
    if not salts or n_images % len(salts):
        raise OptionError(
            f"{len(salts)} salts for {n_images} images; set attachment.salts to one an image, or to one for all"
        )
    return tuple(salt for salt in salts for _ in range(n_images // len(salts)))
