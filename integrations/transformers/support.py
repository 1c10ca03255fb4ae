"""Which method runs on which model: what methods need against what model families supply."""

from __future__ import annotations

from dataclasses import dataclass

from tokprune.core.signals import Kind, Tower
from tokprune.core.tokens import Stage
from tokprune.methods import METHODS
from tokprune.methods.base import asked_signals

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
