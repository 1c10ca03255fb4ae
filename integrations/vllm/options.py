"""What was asked of a server, or of one request, checked against the model; nothing of vLLM is needed."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokprune.core.budget import Budget
from tokprune.core.errors import BudgetError, OptionError, TokPruneError
from tokprune.core.layout import Layout
from tokprune.core.signals import Kind, Signal
from tokprune.cost.flops import Ledger, Ops, Shape
from tokprune.cost.selection import SelectionCost
from tokprune.prune.request import Request, request_of
from tokprune.prune.saved import read_saved, version_of
from tokprune.prune.select import Project, Selector, flops_of, most_specials
from tokprune.prune.supply import checked_signals, why_unplanned

from .families import FAMILIES

KEY = "tokprune"
BUDGETS = ("keep_ratio", "keep_tokens", "flops_ratio", "flops_scope", "flops_text")
EXAMPLE = '{"tokprune": {"method": "vtc_cls", "keep_ratio": 0.25}}'


@dataclass(frozen=True)
class Plan:
    """How pictures are pruned.

    Args:
        family: facts about the model.
        request: method, budget and newlines.
        signals: that the method needs from the vision tower.
    """

    family: Any
    request: Request
    signals: frozenset[Signal]

    @property
    def budget(self) -> Budget:
        """Of every picture."""
        budget = self.request.before_budget
        if budget is None:
            raise BudgetError(f"{self.request.label!r} has no budget; use keep_ratio=0.25")
        return budget

    @property
    def merges_states(self) -> bool:
        """Whether the method merges what the projector takes."""
        method: Any = self.request.before
        return method.space == "tower" and self.family.tower.projects_rows

    @property
    def identity(self) -> str:
        """A digest of all that decides what is kept of a picture, for whoever caches features by picture."""
        said = (self.request.before, self.budget, self.request.newlines, version_of("tokprune"))
        return hashlib.sha256(repr(said).encode()).hexdigest()[:16]

    @functools.cached_property
    def n_keep(self) -> Any:
        """(layout) to the visual tokens to keep of a picture."""
        return self.selector(self.budget).n_keep

    def n_rows(self, layout: Layout) -> int:
        """Rows that the language model gets of a picture, newlines included."""
        return rows_of(layout, self.n_keep(layout), self.request.newlines)

    def selector(self, budget: Budget, project: Project | None = None) -> Selector:
        """The method with a budget."""
        method: Any = self.request.before
        return Selector(method, budget, self.request.label, self.request.newlines, self._flops, project)

    def of_request(self, given: Any) -> Plan:
        """With the budget that a request asks for.

        Raises:
            OptionError: it asks for something else than a budget.
            BudgetError: no such budget.
        """
        checked_mapping(given, '{"keep_tokens": 64}')
        other = sorted(set(given) - set(BUDGETS))
        if other:
            near = difflib.get_close_matches(other[0], BUDGETS, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; start another server for another {other[0]}"
            raise OptionError(f"{KEY}: a request sets {', '.join(BUDGETS[:3])} and not {other[0]!r}{hint}")
        return self._with_budget(json.dumps(given, sort_keys=True))

    @functools.lru_cache(maxsize=64)  # noqa: B019 - a plan lives as long as its server
    def _with_budget(self, given: str) -> Plan:
        budget = told(Budget, **json.loads(given))
        plan = replace(self, request=replace(self.request, before_budget=budget))
        told(plan.check)
        return plan

    def check(self) -> None:
        """Raise BudgetError where the budget is out of reach on the largest picture."""
        if self.budget.flops_ratio and self.family.shape is None:
            raise BudgetError("the FLOPs of this model are not known; use keep_ratio or keep_tokens")
        self.n_keep(self.family.largest)

    def _cost(self, layout: Layout) -> SelectionCost:
        method: Any = self.request.before
        in_tower = self.merges_states and self.family.merges_states(layout)
        return SelectionCost(self.family.shape, self.signals, method.cost, in_tower)

    def _flops(self, layout: Layout, n_keep: int) -> int:
        return flops_of(self._cost(layout), self.budget, self.request.newlines, layout, n_keep)

    def prefill(self, layout: Layout, n_text: int) -> Ledger:
        """Predicted cost of a prompt with a picture and so many other tokens; of a model whose shape is known."""
        return self._cost(layout).prefill(layout, self.n_keep(layout), n_text)

    def spent(self, layout: Layout, shape: Shape | None, n_patches: int | None = None) -> Ops:
        """What collecting signals and selecting computes for a picture of which not all is kept.

        Args:
            layout: of the picture.
            shape: of the model; None where it is not known, and nothing is counted.
            n_patches: of a crop, where the picture's size decides.
        """
        n_keep = self.n_keep(layout)
        if shape is None or n_keep >= layout.n_visual:
            return Ops()
        return replace(self._cost(layout), shape=shape).selector(layout, n_keep, n_patches)

    def __str__(self):
        largest = self.family.largest
        n_visual, n_keep = largest.n_visual, self.n_keep(largest)
        newlines = f", newlines {self.request.newlines}" if self.family.has_newlines else ""
        tokens = f"{n_visual} -> {n_keep} tokens {self.family.picture}{newlines}"
        return f"{KEY}: {self.request.label} {self.budget}: {tokens}"


def rows_of(layout: Layout, n_keep: int, newlines: str) -> int:
    """Rows that the language model gets of a picture, newlines included."""
    if n_keep >= layout.n_visual:
        return len(layout.crop)
    return n_keep + most_specials(layout, n_keep, newlines)


def plan_of(config: Any, given: Any) -> Plan | None:
    """What was asked of a server; None where nothing was.

    Args:
        config: of the model, as transformers loads it.
        given: the value of our key.

    Raises:
        TokPruneError: in one of its kinds, with the key in front.
    """
    return None if given is None else told(_plan_of, config, given)


def told(function: Any, *arguments: Any, **keywords: Any) -> Any:
    """What a function returns; its errors begin with our key, so that one knows in a server's log whose they are."""
    try:
        return function(*arguments, **keywords)
    except TokPruneError as error:
        if str(error).startswith(KEY):
            raise
        raise type(error)(f"{KEY}: {error}") from error
    except TypeError as error:  # a name that Budget does not take
        raise OptionError(f"{KEY}: {error}") from error


def checked_mapping(given: Any, example: str) -> None:
    """Raise OptionError unless it is an object with names."""
    if not isinstance(given, Mapping):
        raise OptionError(f"{KEY}: {given!r} is not an object; use {example}")


def check_key(names: Any) -> None:
    """Raise OptionError for a key that was probably meant to be ours: vLLM would ignore it and prune nothing."""
    near = next((n for n in names if n != KEY and difflib.get_close_matches(str(n).lower(), [KEY], cutoff=0.75)), None)
    if near is not None:
        raise OptionError(f"{KEY}: {near!r} would be ignored and nothing pruned; did you mean {KEY!r}?")


def _plan_of(config: Any, given: Any) -> Plan:
    checked_mapping(given, f"--mm-processor-kwargs '{EXAMPLE}'")
    architecture = (config.architectures or [""])[0]
    if architecture not in FAMILIES.names():
        raise OptionError(
            f"{architecture} is not pruned in vLLM; there are {', '.join(FAMILIES.names())}. Use tokprune.attach with "
            "transformers for other models"
        )
    family = FAMILIES.load(architecture)(config)
    request = _planned(_request_of(family, dict(given)), family)
    signals = checked_signals(request.before, request.label, family.supply)
    plan = Plan(family, request, signals)
    plan.check()
    return plan


def _request_of(family: Any, given: dict[str, Any]) -> Request:
    """From a method with its budget, or from a saved folder."""
    if "config" in given:
        return _request_of_saved(family, given)
    if "method" not in given:
        raise OptionError(f"which method? There is no default; use --mm-processor-kwargs '{EXAMPLE}'")
    method = given.pop("method")
    known = {name: given.pop(name) for name in (*BUDGETS, "newlines", "positions") if name in given}
    return request_of(method, given, **known)


def _request_of_saved(family: Any, given: dict[str, Any]) -> Request:
    saved, newlines = read_saved(given.pop("config")), given.pop("newlines", None)
    if given:
        name = next(iter(given))
        raise OptionError(f"'config' names a saved folder, which holds {name} already; leave {name} out")
    saved.check(family.facts)
    return request_of(saved.method, **{**saved.keywords, **({"newlines": newlines} if newlines else {})})


def _planned(request: Request, family: Any) -> Request:
    """A request that vLLM can serve: the number of tokens follows from the size of a picture.

    Raises:
        OptionError: it cannot be served.
    """
    method = request.before if request.between is None else request.between
    why = "cuts between decoder layers" if request.between is not None else why_unplanned(method)
    if why:
        raise OptionError(
            f"{request.label!r} {why}, and vLLM plans the tokens of a prompt before pictures are encoded. Methods that "
            f"work here: {', '.join(family.supply.serving)}"
        )
    needs_text = {s.kind for s in method.needs(family.tower)} & {Kind.TEXT_EMBEDS}
    if needs_text:
        raise OptionError(
            f"{request.label!r} reads the question, and vLLM encodes a picture once for all questions. Methods that "
            f"work here: {', '.join(family.supply.serving)}"
        )
    if request.before is not None and request.before.keeps_positions:
        raise OptionError(f"{request.label!r}: calibrate keeps positions, which vLLM does not; leave calibrate out")
    if request.positions not in ("auto", family.positions):
        raise OptionError(
            f"positions={request.positions!r} is not served by vLLM for this model; use positions={family.positions!r}"
        )
    if family.keeps_breaks:
        return replace(request, newlines="keep")
    if request.newlines != "keep_rows_with_tokens" or not family.has_newlines:
        return request
    return replace(request, newlines="keep")  # which rows keep a token is known too late
