"""The cost of a method on a model that is not loaded: what `tokprune flops` prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..core.budget import Budget
from ..core.errors import RunError
from ..core.layout import Layout, grid_layout
from ..core.signals import Decoder, Kind, Signal, Tower
from ..core.tokens import Count
from ..cost.flops import Ledger, Ops, Shape
from ..cost.selection import SelectionCost, cut_ops
from ..methods import METHODS, build_method
from ..methods.base import Method
from .report import by_layer
from .request import request_of
from .saved import is_saved, read_saved


@dataclass(frozen=True)
class Kept:
    """Visual tokens of one picture by decoder layer and in the tower, the signals needed, and the cost of selecting."""

    by_layer: list[int]
    in_tower: int
    signals: frozenset[Signal] = frozenset()
    products: Ops = field(default_factory=Ops)
    decided: str = "keep {keep:g}"  # how many stay, for the line below a table


def costs(shape: Shape, found: Kept, visual: int, text: int, crops: int | None) -> tuple[Ledger, Ledger]:
    """Ledgers of a prompt, unpruned and with what is kept."""
    before = shape.picture(visual, crops) + shape.read(visual + text)
    after = shape.picture(found.in_tower, crops, found.signals) + shape.read([n + text for n in found.by_layer])
    return before, after + Ledger(layers=(Ops(),) * shape.text.n_layers, selector=found.products)


def kept(shape: Shape, method: str, keep: float, visual: int, text: int) -> Kept:
    """What a method keeps of `visual` tokens in a prompt with `text` text tokens.

    Args:
        shape: the model.
        method: a specification, a saved folder with its own budget, or empty for the budget alone.
        keep: fraction of the visual tokens.
        visual: visual tokens of the prompt.
        text: its other tokens.

    Raises:
        RunError: the count depends on the picture, or the method does not run on this shape.
    """
    n_layers = shape.text.n_layers
    if not method:
        return Kept([Budget(keep_ratio=keep).n_keep(visual)] * n_layers, visual)
    built: Any = read_saved(method).method.method if is_saved(method) else build_method(method)[0]
    if isinstance(built, Method) and built.space == "pixels":
        if not shape.takes_cells:
            raise RunError(f"{method!r} needs a tower that runs on part of a picture: use a Qwen-VL model")
        n = Budget(keep_ratio=keep).n_keep(visual)
        return Kept([n] * n_layers, n, decided="as if a picture keeps {keep:g}")
    if built.count is Count.CONTENT or built.is_filter:
        raise RunError(
            f"how many tokens {method!r} keeps depends on the picture: leave --method out to count the budget alone"
            f"{with_budget(method)}"
        )
    if built.needs_file:
        raise RunError(
            f"{method!r} is fitted to one model: attach it there, or use its counts, as fastv:schedule=layers/2x288"
        )
    before, between = built.stages
    decided = Kept.decided if built.takes_budget else "how many are kept is up to the method"
    first, second = _budgets(method, keep ** (1 / max(built.n_budgets, 1)))
    n_keep, products = visual, Ops()
    signals: frozenset[Signal] = frozenset()
    if before is not None:
        n_keep, signals, products = _before(shape, method, before, first.n_keep(visual) if first else 0, visual)
    if between is None:
        return Kept([n_keep] * n_layers, visual, signals, products, decided)
    left = second.n_keep(n_keep) if second and between.takes_budget else 0
    cuts = between.cuts(Decoder(n_layers, shape.text.width), n_keep, left)
    counts, layout = by_layer(cuts, n_keep, n_layers), grid_layout(1, n_keep)
    for layer, n in cuts.items():
        columns = counts[layer - 1] + text
        products += cut_ops(shape, between.cost, between.reads(layer), layer, layout, n, columns, text)
    return Kept(counts, visual, signals, products, decided)


def _budgets(method: str, ratio: float) -> tuple[Budget | None, Budget | None]:
    """Budgets before the language model and between its layers: those of a saved folder, or a ratio of each.

    Raises:
        RunError: a saved folder has a budget of FLOPs.
    """
    if not is_saved(method):
        return Budget(keep_ratio=ratio), Budget(keep_ratio=ratio)
    saved = read_saved(method)
    asked = request_of(saved.method, **saved.keywords)
    budgets = asked.before_budget, asked.between_budget
    if any(budget is not None and budget.flops_ratio for budget in budgets):
        raise RunError(f"{method} has a budget of FLOPs, which is solved for each picture: attach it, or use --keep")
    return budgets


def _before(shape: Shape, label: str, method: Any, n_keep: int, visual: int) -> tuple[int, frozenset[Signal], Ops]:
    """Tokens kept before the language model, signals needed, and the cost of selecting."""
    has_cls = shape.vision.n_special > 0
    projects_rows = shape.projector[0] == shape.vision.stack.width
    signals = method.needs(Tower(shape.vision.stack.n_layers, has_cls, projects_rows))
    if not has_cls and any(s.kind is Kind.CLS_ROW for s in signals):
        instead = f"use {label}:{method.if_missing}, or see" if _helps(label, method) else "see"
        raise RunError(
            f"{label!r} needs a [CLS] token, which the tower of {shape.name} lacks: {instead} tokprune models"
        )
    n_keep = n_keep if method.takes_budget else 0
    least = method.min_keep(grid_layout(1, visual))
    if method.takes_budget and n_keep < min(least, visual) and method.count is Count.EXACT:
        raise RunError(f"{label!r} cannot keep {n_keep} tokens, its minimum is {least}: use a larger --keep")
    if n_keep == visual:
        return n_keep, frozenset(), Ops()
    tiles = [i // shape.n_visual for i in range(visual)]
    layout = Layout(tuple(tiles), tuple(range(visual)), (0,) * visual, (1, max(tiles)))
    cost = SelectionCost(shape, signals, method.cost, method.space == "tower" and projects_rows)
    return n_keep, signals, cost.selector(layout, n_keep, collected=False)


def _helps(label: str, method: Method) -> bool:
    """Whether a name alone was given of a method that has an option for towers without [CLS]."""
    return bool(method.if_missing) and label in METHODS.names()


def with_budget(spec: str) -> str:
    """The option that makes a method take a budget, as the end of a message."""
    option = build_method(spec)[0].if_budget
    return f", or use {spec}:{option}" if option else ""
