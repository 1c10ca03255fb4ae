"""Budgets: what a user may ask for, and the one rule that turns it into a number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from numbers import Integral, Real
from typing import Any

from .errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """How many visual tokens of an image to keep: exactly one of the two is given.

    Args:
        keep_ratio: fraction kept, in (0, 1].
        keep_tokens: number kept, at least 1; above an image's number of tokens all are kept.
    """

    keep_ratio: float | None = None
    keep_tokens: int | None = None

    def __post_init__(self):
        if (self.keep_ratio is None) == (self.keep_tokens is None):
            raise BudgetError("give exactly one budget: keep_ratio=0.25 (a fraction) or keep_tokens=64 (a count)")
        if self.keep_ratio is not None:
            _check_ratio(self.keep_ratio)
        if self.keep_tokens is not None:
            _check_tokens(self.keep_tokens)

    def n_keep(self, n_visual: int) -> int:
        """Tokens kept of `n_visual`: rounded half up, within 1 and n_visual."""
        if self.keep_tokens is not None:
            return min(int(self.keep_tokens), n_visual)
        # Decimal, because 0.145 * 100 is below 14.5 in binary.
        exact = Decimal(str(float(self.keep_ratio or 0))) * n_visual
        return max(1, min(n_visual, int(exact.quantize(Decimal(1), ROUND_HALF_UP))))

    def __str__(self):
        if self.keep_tokens is not None:
            return f"keep_tokens={self.keep_tokens}"
        return f"keep_ratio={self.keep_ratio}"


def _check_ratio(ratio: Any) -> None:
    number = isinstance(ratio, Real) and not isinstance(ratio, bool)
    if not number or not 0 < float(ratio) <= 1:
        hint = ""
        if number and 1 < float(ratio) <= 100:
            hint = f" Did you mean keep_ratio={ratio / 100:g}?"
        raise BudgetError(f"keep_ratio={ratio!r} is not a fraction in (0, 1].{hint} A count goes in keep_tokens=.")


def _check_tokens(tokens: Any) -> None:
    if isinstance(tokens, bool) or not isinstance(tokens, Integral) or tokens < 1:
        raise BudgetError(
            f"keep_tokens={tokens!r} is not a whole number of at least 1. "
            "A fraction goes in keep_ratio=; the method 'blind' keeps none."
        )
