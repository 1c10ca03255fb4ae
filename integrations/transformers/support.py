"""Which method runs on which model: what methods need against what model families supply."""

from __future__ import annotations

from dataclasses import dataclass

from tokprune.core.errors import MissingSignalError
from tokprune.core.signals import Kind, Signal, Tower
from tokprune.core.tokens import Stage
from tokprune.methods import METHODS
from tokprune.methods.base import Method, asked_signals

from .families.base import ModelFamily


@dataclass(frozen=True)
class Support:
    """A method on a model family with one kind of vision tower.

    Args:
        model: `config.model_type`.
        tower: name of the kind of tower.
        method: as `attach` takes it.
        works: whether it runs as it is.
        instead: what to type where it does not run as it is; empty where nothing helps.
    """

    model: str
    tower: str
    method: str
    works: bool
    instead: str = ""

    @property
    def answer(self) -> str:
        """Does it run? "yes", what to type instead, or "no"."""
        return "yes" if self.works else self.instead or "no"


def list_support() -> list[Support]:
    """Every method on every model family, from what methods need and families supply.

    Methods and families of other packages that cannot be built or imported are left out; `tokprune methods` says what
    is wrong with a method.
    """
    from .families import all_families, other_families

    names, pairs = METHODS.working(), []
    for family in [*all_families(), *other_families()]:
        for kind in dict.fromkeys(family.towers.values()):
            tower = Tower(n_layers=24, has_cls=kind.has_cls, projects_rows=family.one_patch_a_row)
            supplied = family.supplies_of(tower)
            pairs += [_pair(family, kind.name, name, tower, supplied) for name in names]
    return pairs


def _pair(family: type[ModelFamily], tower_name: str, name: str, tower: Tower, supplied: frozenset[Kind]) -> Support:
    method = METHODS.build(name)
    cuts = method.stage is Stage.DECODER and bool(family.no_layer_cuts)
    works = not cuts and all(s.kind in supplied for s in asked_signals(method, "needs", tower))
    typed = f"{name}:{method.if_missing}"
    helps = bool(method.if_missing) and all(s.kind in supplied for s in METHODS.build(typed).needs(tower))
    instead = typed if helps and not works and not cuts else ""
    return Support(family.model_type, tower_name, name, works, instead)


def checked_signals(method: Method, label: str, family) -> frozenset[Signal]:
    """What a method needs from the tower of a model.

    Raises:
        MissingSignalError: the tower does not supply it; the message names methods that work.
    """
    signals = asked_signals(method, "needs", family.tower)
    if not family.supplies_all(signals):
        missing = sorted({s.kind.name for s in signals if s.kind not in family.supplies})
        works = [n for n in METHODS.working() if family.supplies_all(METHODS.build(n).needs(family.tower))]
        lacks = family.no_tower_signals or ("does not supply it" if family.tower.has_cls else "has no [CLS] token")
        if missing == [Kind.PIXELS.name]:
            lacks = "runs on whole pictures alone"
        typed = label in METHODS.names() and method.if_missing and not family.no_tower_signals
        option = f" (or {label}:{method.if_missing})" if typed else ""
        raise MissingSignalError(
            f"{label!r} needs {', '.join(missing)}, but this model's vision tower {lacks}. "
            f"Methods that work here: {', '.join(works)}{option}"
        )
    return signals
