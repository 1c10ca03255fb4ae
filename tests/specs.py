"""Every registered method, and the options under which it behaves differently."""

from __future__ import annotations

import torch

import tokprune
from tokprune.methods import METHODS
from tokprune.types import Kind, Layout, Tower, VisualTokens, grid_layout

VARIANTS = [
    "fopru:strategy=row",
    "fopru:form=logits",
    "fopru:gate=received",
    "fopru:gate=given:form=logits",
    "random:seed=3",
    "vtc_cls:start_layer=22",
    "vtc_cls:start_layer=-8",
]
SPECS = tokprune.list_methods() + VARIANTS
BUDGETED = [s for s in SPECS if METHODS.build(s).takes_budget]
TOWER = Tower(n_layers=24, has_cls=True)


def tokens_for(spec: str, n_images=3, layout: Layout | None = None, dtype=torch.float32, seed=0, extra=False, width=16):
    """Random visual tokens with what a method needs; with `extra`, also every other kind of signal."""
    layout = layout or grid_layout(6, 6)
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(n_images, *shape, generator=generator)

    needs = METHODS.build(spec).needs(TOWER)
    features = values(layout.n_visual, width).to(dtype)
    signals = {s: values(len(s.layers), layout.n_visual).softmax(-1) for s in sorted(needs, key=str)}
    if extra:
        from tokprune.types import Signal

        have = {s.kind for s in needs}
        signals |= {Signal(k, (0,)): values(1, layout.n_visual) for k in Kind if k not in have}
    return VisualTokens.of(features, layout, signals)


def n_keeps(spec: str, layout: Layout) -> list[int]:
    """Budgets worth trying: the least, a few in between, all."""
    n, least = layout.n_visual, METHODS.build(spec).min_keep(layout)
    return sorted({k for k in (least, least + 1, n // 4, n // 2, n - 1, n) if max(least, 1) <= k <= n})
