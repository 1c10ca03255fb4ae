"""The vision tower on a part of its pictures: kept tokens go in, and come back to their places, zeros between them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from tokprune.core.errors import NotCopyable, TokPruneError

from .compat import spread_features
from .families.base import ModelFamily
from .hooks import Hooks
from .passes import Passes


@dataclass
class Part:
    """The tokens of encoded pictures that the tower is to run on.

    Args:
        keep: (N,) bool, of all pictures of the call.

    Attributes:
        index: (K,) where they are among the N; reading their number is the one synchronisation.
        ran: whether the tower ran.

    Raises:
        TokPruneError: there is none.
    """

    keep: Tensor
    index: Tensor = field(init=False)
    ran: bool = field(init=False, default=False)

    def __post_init__(self):
        self.index = self.keep.nonzero()[:, 0]
        if not len(self.index):
            raise TokPruneError("the vision tower cannot run on nothing; keep one token of a picture at least")

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left out, so that the tower runs as it is."""
        return len(self.index) == len(self.keep)

    def spread(self, rows: Tensor) -> Tensor:
        """(N, D) from the rows (K, D) of kept tokens; the others are zeros."""
        return rows.new_zeros(len(self.keep), rows.shape[1]).index_copy(0, self.index.to(rows.device), rows)


class TowerShortener(NotCopyable):
    """Forward hooks of a tower that takes positions and segments ready-made (`ModelFamily.takes_cells`)."""

    def __init__(self, family: ModelFamily, passes: Passes):
        self.family, self._passes = family, passes

    def install(self, hooks: Hooks) -> None:
        """Register the hooks."""
        hooks.before(self.family.cell_tower, self.before)
        hooks.after(self.family.cell_tower, self.after)

    def before(self, tower: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Forward pre-hook: the pixels, positions and segments of kept tokens alone."""
        part = self._passes.part
        if part is None:
            return None
        part.ran = True
        return None if part.is_whole else self.family.tower_part(args, kwargs, part.keep, part.index)

    def after(self, tower: nn.Module, args: tuple, kwargs: dict, out):
        """Forward hook: as many rows as the model waits for."""
        part = self._passes.part
        return None if part is None or part.is_whole else spread_features(out, part.spread)
