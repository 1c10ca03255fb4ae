"""Token budgets, and the rounding rule that turns them into a number of tokens."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from numbers import Integral, Real
from typing import Any, Literal, get_args

from .errors import BudgetError

REFERENCE_TEXT = 64  # text tokens of the prompt that a FLOPs budget assumes by default

Scope = Literal["llm", "prefill"]


@dataclass(frozen=True)
class Budget:
    """How many visual tokens of an image to keep; exactly one of the first three is given.

    Args:
        keep_ratio: fraction kept, in (0, 1].
        keep_tokens: number kept, at least 1; an image with fewer tokens keeps all of them.
        flops_ratio: fraction of the unpruned FLOPs, in (0, 1], for a prompt of `flops_text` text tokens.
        flops_scope: FLOPs of the language model ("llm"), or of everything up to the first token ("prefill").
        flops_text: text tokens of the prompt that `flops_ratio` assumes.
    """

    keep_ratio: float | None = None
    keep_tokens: int | None = None
    flops_ratio: float | None = None
    flops_scope: Scope = "llm"
    flops_text: int = REFERENCE_TEXT

    def __post_init__(self):
        given = [v for v in (self.keep_ratio, self.keep_tokens, self.flops_ratio) if v is not None]
        if len(given) != 1:
            raise BudgetError(
                "give exactly one budget: keep_ratio=0.25 (a fraction of the tokens), keep_tokens=64 (a count) or "
                "flops_ratio=0.3 (a fraction of the FLOPs)"
            )
        if self.keep_ratio is not None:
            _check_ratio("keep_ratio", self.keep_ratio)
        if self.keep_tokens is not None:
            _check_tokens(self.keep_tokens)
        if self.flops_ratio is not None:
            _check_ratio("flops_ratio", self.flops_ratio)
        if self.flops_scope not in get_args(Scope):
            raise BudgetError(f"flops_scope={self.flops_scope!r} is not one of 'llm', 'prefill'")
        if isinstance(self.flops_text, bool) or not isinstance(self.flops_text, Integral) or self.flops_text < 0:
            raise BudgetError(f"flops_text={self.flops_text!r} is not a number of text tokens; use flops_text=64")

    @property
    def is_everything(self) -> bool:
        """Whether all tokens of every image are kept."""
        return 1 in (self.keep_ratio, self.flops_ratio)

    def n_keep(self, n_visual: int, flops: Callable[[int], int] | None = None, least: int = 1) -> int:
        """Tokens kept of `n_visual`: rounded half up, within 1 and n_visual.

        Args:
            n_visual: tokens of the image.
            flops: for `flops_ratio`, the cost of keeping a number of tokens; it grows with the number.
            least: for `flops_ratio`, the smallest number to consider.

        Raises:
            BudgetError: even `least` tokens cost more than `flops_ratio` allows.
        """
        if self.keep_tokens is not None:
            return min(int(self.keep_tokens), n_visual)
        if self.flops_ratio is not None:
            if flops is None:
                raise BudgetError("flops_ratio needs a model whose cost is known; use keep_ratio here")
            return self._affordable(n_visual, flops, least)
        # Decimal, because 0.145 * 100 is below 14.5 in binary.
        exact = Decimal(str(float(self.keep_ratio or 0))) * n_visual
        return max(1, min(n_visual, int(exact.quantize(Decimal(1), ROUND_HALF_UP))))

    def _affordable(self, n_visual: int, flops: Callable[[int], int], least: int) -> int:
        """The most tokens whose FLOPs are within the ratio."""
        ratio, whole = float(self.flops_ratio or 0), flops(n_visual)
        if ratio >= 1:
            return n_visual
        n_keep = least + bisect.bisect_right(range(least, n_visual), ratio * whole, key=flops) - 1
        if n_keep < least:
            reach = math.ceil(1000 * flops(least) / whole) / 1000
            raise BudgetError(
                f"flops_ratio={ratio:g} of the {self.flops_scope} FLOPs is out of reach: {least} of {n_visual} visual "
                f"tokens with {self.flops_text} text tokens still cost {reach:g}; use flops_ratio={reach:g} or more"
            )
        return n_keep

    def __str__(self):
        if self.keep_tokens is not None:
            return f"keep_tokens={self.keep_tokens}"
        if self.flops_ratio is not None:
            return f"flops_ratio={self.flops_ratio} of the {self.flops_scope} FLOPs"
        return f"keep_ratio={self.keep_ratio}"


def _check_ratio(name: str, ratio: Any) -> None:
    number = isinstance(ratio, Real) and not isinstance(ratio, bool)
    if not number or not 0 < float(ratio) <= 1:
        hint = ""
        if number and 2 <= float(ratio) <= 100:
            hint = f" Did you mean {name}={ratio / 100:g}?"
        raise BudgetError(f"{name}={ratio!r} is not a fraction in (0, 1].{hint} For a count, use keep_tokens=64.")


def _check_tokens(tokens: Any) -> None:
    if isinstance(tokens, bool) or not isinstance(tokens, Integral) or tokens < 1:
        raise BudgetError(
            f"keep_tokens={tokens!r} is not a whole number of at least 1; use keep_tokens=64, or keep_ratio=0.25 for a "
            "fraction, or the method 'blind' to keep none"
        )
