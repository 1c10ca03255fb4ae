"""The cost of selecting tokens: before the language model, and at a cut between its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..core.layout import Layout
from ..core.signals import Kind, Signal
from .flops import Ledger, Ops, Shape, decoder_signals


class Widths(NamedTuple):
    """Widths that the cost of a selection depends on.

    Args:
        rows: width of the rows that are compared and merged.
        keys: width of the tower's keys, all heads.
        head: width of one head's keys.
        states: width of the tower's states.
        has_cls_state: whether the tower's [CLS] state can be one of the kept tokens.
    """

    rows: int
    keys: int
    head: int
    states: int
    has_cls_state: bool


Products = Callable[[Layout, int, Widths], Ops]


@dataclass(frozen=True)
class SelectionCost:
    """The cost of selecting the tokens of an image with a method, and of what runs after it.

    Args:
        shape: the model.
        signals: collected from the vision tower.
        products: `Method.cost`: (layout, n_keep, widths) to the matrix products of the selection itself.
        in_tower: whether it merges states of the tower, which then pass the projector.
        projects_all: whether all states pass it, or only those that are kept.
    """

    shape: Shape
    signals: frozenset[Signal]
    products: Products
    in_tower: bool = False
    projects_all: bool = False

    def selector(self, layout: Layout, n_keep: int, n_patches: int | None = None, collected: bool = True) -> Ops:
        """Cost of signals, if collected, and of the selection, unless all tokens are kept."""
        spent = Ops()
        if n_keep < layout.n_visual:
            tower = self.shape.vision.stack
            widths = Widths(
                rows=tower.width if self.in_tower else self.shape.text.width,
                keys=tower.n_heads * tower.head_dim,
                head=tower.head_dim,
                states=tower.width,
                has_cls_state=any(s.kind is Kind.CLS_STATE for s in self.signals),
            )
            spent += self.products(layout.without_specials, n_keep, widths)
            spent += self.shape.project(layout.n_visual if self.projects_all else n_keep) if self.in_tower else Ops()
        if collected:
            spent += self.shape.vision.signals(self.signals, n_patches) * layout.n_crops
        return spent

    def prefill(self, layout: Layout, n_keep: int, n_text: int, n_patches: int | None = None) -> Ledger:
        """One image and `n_text` text tokens, newlines included; keeping all tokens skips the selection."""
        spent = self.selector(layout, n_keep, n_patches) if n_keep < layout.n_visual else Ops()
        encoded = self.shape.encode(layout.n_crops, n_patches, spent)
        return encoded + self.shape.read(n_text + n_keep)


def cut_ops(
    shape: Shape,
    products: Products,
    signals: Iterable[Signal],
    layer: int,
    layout: Layout,
    n_keep: int,
    n_columns: int,
    n_text: int,
) -> Ops:
    """What one cut of one image computes.

    Args:
        shape: the model.
        products: `Method.cost`.
        signals: what the method reads before this layer.
        layer: the first that sees fewer tokens.
        layout: of the image.
        n_keep: visual tokens left.
        n_columns: of the row at the cut.
        n_text: text tokens, for signals about all of them.
    """
    own = products(layout, n_keep, widths_of_cuts(shape))
    return decoder_signals(shape.text, signals, layer, n_columns, n_text) + own


def widths_of_cuts(shape: Shape) -> Widths:
    """Of what a method between layers reads."""
    text = shape.text
    return Widths(text.width, text.n_kv_heads * text.head_dim, text.head_dim, 0, False)
