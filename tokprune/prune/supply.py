"""What a method needs against what a model's vision tower supplies, in any host."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import MissingSignalError, OptionError
from ..core.signals import Kind, Signal, Tower
from ..core.tokens import Count
from ..methods import METHODS
from ..methods.base import Method, asked_signals


@dataclass(frozen=True)
class Supply:
    """What can be collected for methods from one model.

    Args:
        tower: facts about its vision tower.
        kinds: of signals.
        unreadable: what the tower does so that attention cannot be read; empty where it can.
        planned: whether the host plans the number of tokens before pictures are encoded, so that only methods before
            the language model that keep exactly their budget can run.
        n_built: vision layers that the host builds, from the first on; None for all.
    """

    tower: Tower
    kinds: frozenset[Kind]
    unreadable: str = ""
    planned: bool = False
    n_built: int | None = None

    def has_all(self, signals: frozenset[Signal]) -> bool:
        """Whether every signal can be collected."""
        return all(s.kind in self.kinds for s in signals) and not self.unbuilt(signals)

    def unbuilt(self, signals: frozenset[Signal]) -> list[int]:
        """Layers among those of the signals that the host does not build."""
        return sorted({i for s in signals for i in s.layers if self.n_built is not None and i >= self.n_built})

    def serves(self, method: Method) -> bool:
        """Whether a method can run."""
        return self.has_all(asked_signals(method, "needs", self.tower)) and not (self.planned and why_unplanned(method))

    @property
    def serving(self) -> list[str]:
        """Names of methods that run as they are."""
        return [name for name in METHODS.working() if self.serves(METHODS.build(name))]


def tower_kinds(tower: Tower) -> frozenset[Kind]:
    """Kinds of signals of a vision tower whose attention can be read."""
    kinds = {Kind.RECEIVED, Kind.GIVEN, Kind.KEYS, Kind.TOWER_STATES}
    if tower.has_cls:
        kinds |= {Kind.CLS_ROW, Kind.CLS_STATE} if tower.projects_rows else {Kind.CLS_ROW}
    return frozenset(kinds)


def why_unplanned(method: Method) -> str:
    """Why a method cannot run where the number of tokens is planned before pictures are encoded; empty if it can."""
    if method.stages[1] is not None:
        return "cuts between decoder layers"
    if method.is_filter:
        return "is a filter and needs a method after it"
    if not method.takes_budget or method.count is not Count.EXACT:
        return "does not keep an exact number of tokens"
    return ""


def checked_signals(method: Method, label: str, supply: Supply) -> frozenset[Signal]:
    """What a method needs from the tower of a model.

    Args:
        method: selects before the language model.
        label: the method as it was asked for.
        supply: of the model.

    Raises:
        MissingSignalError: the tower does not supply it; the message names methods that work.
        OptionError: a layer is not built.
    """
    signals = asked_signals(method, "needs", supply.tower)
    if unbuilt := supply.unbuilt(signals):
        raise OptionError(
            f"{label!r} reads vision layer {unbuilt[0]}, and only layers 0 to {supply.n_built - 1} are built here, up "  # type: ignore[operator]
            f"to the one that the model reads; name one of these. Methods that work here: {', '.join(supply.serving)}"
        )
    if not supply.has_all(signals):
        missing = sorted({s.kind.name for s in signals if s.kind not in supply.kinds})
        lacks = supply.unreadable or ("does not supply it" if supply.tower.has_cls else "has no [CLS] token")
        if missing == [Kind.PIXELS.name]:
            lacks = "runs on whole pictures alone"
        typed = label in METHODS.names() and method.if_missing and not supply.unreadable
        option = f" (or {label}:{method.if_missing})" if typed else ""
        raise MissingSignalError(
            f"{label!r} needs {', '.join(missing)}, but this model's vision tower {lacks}. "
            f"Methods that work here: {', '.join(supply.serving)}{option}"
        )
    return signals
