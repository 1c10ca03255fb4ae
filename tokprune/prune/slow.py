"""A warning before a selection that takes long on a CPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..core.layout import Layout
from ..core.signals import Kind
from ..core.tokens import Stage, VisualTokens
from ..cost.selection import Widths
from ..methods.base import Method

if TYPE_CHECKING:
    import torch

# Seconds of one thread, as estimated: of `eval/results/selection-times.jsonl`, what took over 4 s (2 s on two cores) is
# estimated at more, and what took under 0.5 s at less.
LONG = 2.5


def warn_if_slow(method: Method, label: str, tokens: VisualTokens, n_keep: int) -> None:
    """Say before the selection what it costs, and what is cheaper; once for each kind of picture.

    Graphics processors do as much in a fraction of a second, so nothing is said there.

    Args:
        method: selects.
        label: the method as it was asked for.
        tokens: what it selects from.
        n_keep: its budget.
    """
    warn_of_cuts(method, label, tokens.layout, [n_keep], _widths(tokens), tokens.keep.device)


def warn_of_cuts(
    method: Method, label: str, layout: Layout, n_keeps: Iterable[int], widths: Widths, device: torch.device
) -> None:
    """As `warn_if_slow`, of all cuts of one image together, before the first.

    Args:
        method: selects.
        label: the method as it was asked for.
        layout: of what it selects from.
        n_keeps: tokens left after every cut.
        widths: of what the method reads.
        device: where it selects.
    """
    if device.type != "cpu":
        return
    seconds = seconds_of(method, layout, n_keeps, widths)
    if seconds < LONG:
        return
    linear = "fastv" if method.stage is Stage.DECODER else "vidcom2" if layout.is_video else "fopru"
    cheaper = f"use a method that does not compare all tokens, such as {linear}"
    if getattr(method, "split", None) == "joint" and layout.n_crops > 1:
        cheaper = f"use split=even to select in each of the {layout.n_crops} crops or frames separately"
    warnings.warn(
        f"{label} compares {layout.n_visual:,} visual tokens with each other, which takes roughly "
        f"{_shown(seconds)} of one CPU thread; {cheaper}",
        stacklevel=3,
    )


def seconds_of(method: Method, layout: Layout, n_keeps: Iterable[int], widths: Widths) -> float:
    """Of one CPU thread, for all cuts together: FLOPs at the rate that the method declares, within some factor of 3."""
    flops = sum(method.cost(layout, n_keep, widths).flops for n_keep in n_keeps if n_keep > 0)
    return flops / min(member.cpu_rate for member in method.members)


def _shown(seconds: float) -> str:
    """One digit: estimates are within some factor of 3."""
    n, unit = (seconds, "s") if seconds < 100 else (seconds / 60, "min")
    return f"{float(f'{n:.1g}'):,.0f} {unit}"


def _widths(tokens: VisualTokens) -> Widths:
    """Of what the method reads."""
    found = {signal.kind: values for signal, values in tokens.signals.items()}
    keys, states = found.get(Kind.KEYS), found.get(Kind.TOWER_STATES)
    width = tokens.features.shape[-1]
    return Widths(
        rows=width,
        keys=keys.shape[-2] * keys.shape[-1] if keys is not None else width,
        head=keys.shape[-1] if keys is not None else width,
        states=states.shape[-1] if states is not None else width,
        has_cls_state=Kind.CLS_STATE in found,
    )
