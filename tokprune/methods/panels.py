"""Greedy choices among many tokens on a CPU: exact, a panel of candidates at a time.

Where what a candidate is worth can only fall with every choice, old values are upper bounds. So the candidates with
the highest ones are brought up to date among themselves after every choice, and all others once a panel, in one matrix
product instead of one pass over memory a choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ..core import ops
from ..core.lazy import torch
from .coverage import HELD

if TYPE_CHECKING:
    from torch import Tensor

CANDIDATES = 512  # in a panel
LONGEST = 128  # choices in a panel


class Choice(Protocol):
    """What a greedy method does; N candidates of G images, C of them in a panel."""

    def worth(self) -> Tensor:
        """(G, N), up to date with `settle`; -inf for those chosen."""

    def open(self, candidates: Tensor) -> None:
        """Begin a panel with the candidates (G, C)."""

    def worth_inside(self) -> Tensor:
        """(G, C), up to date with `choose`; -inf for those chosen."""

    def choose(self, place: Tensor) -> None:
        """Choose the candidates at places (G,) of the panel."""

    def settle(self, chosen: Tensor) -> None:
        """Bring all up to date with the choices (G, P) of the panel."""


def are_many(x: Tensor) -> bool:
    """Whether panels are for (G, N, D): more tokens than have their N x N matrix held, on a CPU.

    Each choice reads one number back from the device, which costs nothing on a CPU alone.
    """
    return x.shape[1] > HELD and x.device.type == "cpu"


def chosen_in_panels(greedy: Choice, n_keep: int) -> Tensor:
    """Indices in the order they are chosen, (G, n_keep); of equals the lower index."""
    found: list[Tensor] = []
    n_found = 0
    while n_found < n_keep:
        chosen = _panel(greedy, min(LONGEST, n_keep - n_found))
        found.append(chosen)
        n_found += chosen.shape[1]
        greedy.settle(chosen)
    return torch.cat(found, 1)


def _panel(greedy: Choice, n_most: int) -> Tensor:
    """The choices of one panel, (G, P), at least one and at most `n_most`."""
    worth = greedy.worth()
    best = torch.sort(worth, dim=1, descending=True, stable=True)
    outside = best.values[:, CANDIDATES : CANDIDATES + 1]
    candidates = best.indices[:, :CANDIDATES].sort(dim=1).values
    greedy.open(candidates)
    chosen: list[Tensor] = []
    while len(chosen) < min(n_most, candidates.shape[1]):
        inside = greedy.worth_inside()
        if chosen and not bool((inside.amax(1, keepdim=True) > outside).all()):
            break
        place = ops.first_highest(inside)
        chosen.append(candidates.gather(1, place[:, None]))
        greedy.choose(place)
    return torch.cat(chosen, 1)
