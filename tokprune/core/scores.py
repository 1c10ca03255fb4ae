"""Scores that methods give to tokens, for drawings of them.

    with listen() as found:
        model(**inputs)
    found[0].scores  # of the first selection, (images, tokens)

Without a listener nothing is kept.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Scored:
    """What one selection was made by.

    Args:
        scores: (G, N) float32, higher is kept.
        index: (G, N), between decoder layers: which of the layout's tokens these are. None: those that show a patch.
    """

    scores: Tensor
    index: Tensor | None


class _Listening(threading.local):
    found: list[Scored] | None = None


_LOCAL = _Listening()


@contextlib.contextmanager
def listen() -> Iterator[list[Scored]]:
    """Keep the scores of the selections that are made in this thread inside a `with` block."""
    before, _LOCAL.found = _LOCAL.found, []
    try:
        yield _LOCAL.found
    finally:
        _LOCAL.found = before


def heard(scores: Tensor, index: Tensor | None) -> None:
    """Say what a selection is made by."""
    if _LOCAL.found is not None:
        _LOCAL.found.append(Scored(scores, index))
