"""What a method needs against what a model's vision tower supplies, in any host."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import MissingSignalError
from ..core.signals import Kind, Signal, Tower
from ..methods import METHODS
from ..methods.base import Method, asked_signals


@dataclass(frozen=True)
class Supply:
    """What can be collected for methods from one model.

    Args:
        tower: facts about its vision tower.
        kinds: of signals.
        unreadable: what the tower does so that attention cannot be read; empty where it can.
    """

    tower: Tower
    kinds: frozenset[Kind]
    unreadable: str = ""

    def has_all(self, signals: frozenset[Signal]) -> bool:
        """Whether every signal is of a kind that can be collected."""
        return all(s.kind in self.kinds for s in signals)


def tower_kinds(tower: Tower) -> frozenset[Kind]:
    """Kinds of signals of a vision tower whose attention can be read."""
    kinds = {Kind.RECEIVED, Kind.GIVEN, Kind.KEYS, Kind.TOWER_STATES}
    if tower.has_cls:
        kinds |= {Kind.CLS_ROW, Kind.CLS_STATE} if tower.projects_rows else {Kind.CLS_ROW}
    return frozenset(kinds)


def checked_signals(method: Method, label: str, supply: Supply) -> frozenset[Signal]:
    """What a method needs from the tower of a model.

    Args:
        method: selects before the language model.
        label: the method as it was asked for.
        supply: of the model.

    Raises:
        MissingSignalError: the tower does not supply it; the message names methods that work.
    """
    signals = asked_signals(method, "needs", supply.tower)
    if not supply.has_all(signals):
        missing = sorted({s.kind.name for s in signals if s.kind not in supply.kinds})
        works = [n for n in METHODS.working() if supply.has_all(METHODS.build(n).needs(supply.tower))]
        lacks = supply.unreadable or ("does not supply it" if supply.tower.has_cls else "has no [CLS] token")
        if missing == [Kind.PIXELS.name]:
            lacks = "runs on whole pictures alone"
        typed = label in METHODS.names() and method.if_missing and not supply.unreadable
        option = f" (or {label}:{method.if_missing})" if typed else ""
        raise MissingSignalError(
            f"{label!r} needs {', '.join(missing)}, but this model's vision tower {lacks}. "
            f"Methods that work here: {', '.join(works)}{option}"
        )
    return signals
