"""A schedule from a file: what `tokprune search` found for one language model."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..core.errors import OptionError, TokPruneError
from ..core.layout import Layout
from ..core.lazy import torch
from ..core.schedules import HOW, Schedule, ScheduleFile, read_schedule, write_schedule
from ..core.signals import Decoder, Signal
from ..core.tokens import Count, VisualTokens
from ..cost.flops import Ops
from ..cost.selection import Widths
from .decoder import DecoderMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FromFile(DecoderMethod):
    """Cut at the layers and by the fractions of a schedule file, ranked by the score that it names.

    The file holds the fraction of the visual tokens that is left from a layer on, and which language model that was
    found for. It takes no budget. A fraction of 0 drops all visual tokens. `tokprune search` writes such files:
    G-Search, the fewest tokens without loss of accuracy, or P-Sigmoid, the best sigmoid of a budget.

    Source:   "Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction", CVPR 2025,
              arXiv 2412.00556.
    Faithful: to the description; there is no code to compare with.
    Differs:  G-Search bisects, in the paper Bayesian optimisation finds the fraction of a layer; the paper's sigmoid is
              not known.
    Needs:    what the score needs, before every cut.

    Args:
        file: a schedule file. In a specification its path must not have a colon.
    """

    file: str = ""

    needs_file: ClassVar[str] = "file"
    source: ClassVar[str] = "G-Search and P-Sigmoid, CVPR 2025, arXiv 2412.00556"

    def __post_init__(self):
        super().__post_init__()
        if self.schedule is not None or self.uniform:
            raise OptionError(
                "schedule takes only file: the file holds the schedule, and options of the score go into the file's "
                '"score" ("fastv:uniform=0.5")'
            )

    @functools.cached_property
    def found(self) -> ScheduleFile:
        """Read once, when first used; OptionError if the file is missing or broken."""
        if not self.file:
            raise OptionError(f"schedule needs a file, as schedule:file=schedule.json; {HOW}")
        return read_schedule(self.file)

    @functools.cached_property
    def by(self) -> DecoderMethod:
        from . import METHODS

        score = self.found.score
        try:
            built = METHODS.build(score)
            if not isinstance(built, DecoderMethod) or isinstance(built, FromFile) or built.schedule is not None:
                raise OptionError("use a method between decoder layers without a schedule, such as fastv")
            return METHODS.build(score, {"schedule": self.found.schedule})
        except TokPruneError as error:
            raise OptionError(f"file={self.file!r} ranks by {score[:80]!r}: {error}") from error

    @property
    def plan(self) -> Schedule:
        return self.by.plan

    @property
    def takes_budget(self) -> bool:
        return False

    @property
    def count(self) -> Count:
        return self.by.count if self.file else Count.EXACT

    @property
    def keeps_features(self) -> bool:  # type: ignore[override]
        return self.by.keeps_features if self.file else True

    def check(self, decoder: Decoder) -> None:
        """Raise OptionError if the schedule was found for another language model."""
        found = self.found
        if (found.n_layers, found.fingerprint) != (decoder.n_layers, decoder.fingerprint):
            raise OptionError(
                f"file={self.file!r} was found for a language model of {found.n_layers} layers "
                f"({found.fingerprint[:80]}), this one has {decoder.n_layers} ({decoder.fingerprint}); {HOW}"
            )
        self.by.check(decoder)

    def write_file(self, path: Path) -> None:
        write_schedule(path, self.found)

    def left(self, n_present: int, n_keep: int) -> int:
        return self.by.left(n_present, n_keep) if n_keep else 0

    def reads(self, layer: int) -> frozenset[Signal]:
        return self.by.reads(layer)

    def cost(self, layout: Layout, n_keep: int, widths: Widths) -> Ops:
        return self.by.cost(layout, n_keep, widths) if n_keep else Ops()

    def score(self, tokens: VisualTokens) -> Tensor:
        return self.by.score(tokens)

    def select(self, tokens: VisualTokens, n_keep: int) -> VisualTokens:
        return self.by.select(tokens, n_keep) if n_keep else replace(tokens, keep=torch.zeros_like(tokens.keep))
