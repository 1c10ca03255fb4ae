"""Every registered method, and the options under which it behaves differently."""

from __future__ import annotations

from dataclasses import replace

import torch

from tokprune.core.layout import Layout, frames_layout, grid_layout
from tokprune.core.signals import Decoder, Kind, Signal, Tower
from tokprune.core.tokens import Stage, VisualTokens
from tokprune.methods import METHODS, build_method
from tokprune.methods.base import Filter

VARIANTS = [
    "cdpruner:invert=false",
    "cdpruner:split=even",
    "damro_filter+fopru",
    "damro_filter:n_outliers=3+vtc_cls",
    "divprune:split=even",
    "dycoke:faithful=true",
    "dycoke:k=none",
    "evs:split=even",
    "evs:split=query",
    "fastvid:rule=llava_onevision",
    "fastvid:rule=llava_video",
    "fastvid:rule=qwen2_5_vl",
    "fastvid:segments=1:every=2:contextual=1",
    "fopru:split=query",
    "fopru:strategy=row",
    "fopru:form=logits",
    "fopru:gate=received",
    "fopru:gate=given:form=logits",
    "framefusion:faithful=true",
    "framefusion:similarity=-1",
    "globalcom2:allocate=even",
    "globalcom2:alpha=0.5:form=softmax:temperature=0.1",
    "globalcom2:faithful=true",
    "globalcom2:renormalise=true",
    "hired:alpha=0.2",
    "hired:faithful=true",
    "hiprune:alpha=1",
    "hiprune:alpha=0.5:split=joint",
    "hiprune:faithful=true",
    "hiprune:variant=angelslim",
    "holov:faithful=true",
    "holov:power=2:stripes=5",
    "mmtok:alpha=2:split=even",
    "mmtok:text_temperature=0.1:vision_temperature=1",
    "pixelprune:tau=0.5",
    "pixelprune:tau=1:anchored=false",
    "prumerge:adaptive=false",
    "prumerge_plus:adaptive=false",
    "prumerge_plus:n_top=5:step=6",
    "random:seed=3",
    "random:split=even",
    "scope:alpha=2:split=even",
    "scope:combine=add",
    "random:split=query",
    "tokencorr:sample=top:thumbnail=false",
    "uniform:split=even",
    "vidcom2:faithful=true",
    "visionzip:contextual=2",
    "vispruner:important=0.75:split=joint",
    "vispruner:variant=angelslim",
    "vtc_cls:split=even",
    "vtc_cls:split=query",
    "vtc_cls:start_layer=22",
    "vtc_cls:start_layer=-8",
]
DECODER_VARIANTS = [
    "dart:pivots=2:text_pivots=1",
    "dart:text=all",
    "dart:faithful=true",
    "fastv:layer=-2",
    "fastv:schedule=cosine",
    "fastv:schedule=pyramid/1/3",
    "fastv:schedule=sigmoid/2/2",
    "fastv:schedule=single/3",
    "fastv:uniform=0.5",
    "pyramiddrop:schedule=single/2",
    "sink_filter:threshold=2+fastv",
    "sparsevlm:faithful=true",
    "sparsevlm:recycle=false",
    "sparsevlm:recycle=false:uniform=0.25",
]


def _of(stage: Stage, filters: bool) -> list[str]:
    built = {n: METHODS.build(n) for n in METHODS.own_names()}
    shown = {n: m for n, m in built.items() if not m.needs_file}  # those have tests of their own
    return [n for n, m in shown.items() if m.stage is stage and isinstance(m, Filter) == filters]


FILTERS = _of(Stage.PRE_LLM, True)
SPECS = _of(Stage.PRE_LLM, False) + VARIANTS
CUTTING = _of(Stage.DECODER, False) + DECODER_VARIANTS  # between decoder layers
DECODER = Decoder(n_layers=32, width=16)


def build(spec: str):
    """The method object of a specification, or of several joined by "+"."""
    return build_method(spec)[0]


BUDGETED = [s for s in SPECS if build(s).takes_budget]
PRUNING = [s for s in SPECS if s != "blind"]  # with those that decide how many by themselves
BEFORE_THE_TOWER = [s for s in SPECS if build(s).space == "pixels"]  # few towers run on a part of a picture
TOWER = Tower(n_layers=24, has_cls=True)
HEADS, HEAD_DIM, TOWER_WIDTH, N_TEXT = 2, 4, 12, 5


def mosaic_layout(side: int, grid: tuple[int, int], height: int | None = None, width: int | None = None) -> Layout:
    """A thumbnail and a mosaic of crops, cut to height x width around its middle; no newlines."""
    rows, columns = grid
    height, width = height or side * rows, width or side * columns
    top, left = (side * rows - height) // 2, (side * columns - width) // 2
    places = [(0, r, c) for r in range(side) for c in range(side)]
    for r in range(height):
        for c in range(width):
            places.append((1 + (r + top) // side * columns + (c + left) // side, r, c))
    return Layout(*(tuple(x) for x in zip(*places, strict=True)), crop_grid=grid)


LAYOUTS = {
    "6x6": grid_layout(6, 6),
    "3x8": grid_layout(3, 8),
    "1x1": grid_layout(1, 1),
    "thumbnail and 2x2": mosaic_layout(6, (2, 2)),
    "padded": mosaic_layout(6, (2, 2), height=9),
    "wide": mosaic_layout(4, (1, 3), width=11),
    "three frames": frames_layout(3, 3, 3),
    "nine frames": frames_layout(9, 2, 2),
}


def tokens_for(spec: str, n_images=3, layout: Layout | None = None, dtype=torch.float32, seed=0, extra=False, width=16):
    """Random visual tokens with what a method needs; with `extra`, also every other kind of signal."""
    layout = layout or grid_layout(6, 6)
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(n_images, *shape, generator=generator)

    def signal(s: Signal) -> torch.Tensor:
        n = layout.n_visual
        if s.kind is Kind.KEYS:
            return values(max(len(s.layers), 1), n, HEADS, HEAD_DIM)
        if s.kind is Kind.TOWER_STATES:
            return values(1, n, TOWER_WIDTH)
        if s.kind is Kind.CLS_STATE:
            return values(layout.n_crops, width)  # of all crops that a tower encodes
        if s.kind is Kind.PIXELS:
            return values(1, n, 3).round()  # so that some repeat
        if s.kind is Kind.TEXT_EMBEDS:
            return values(N_TEXT, width) * torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])[:, None]
        return (3 * values(max(len(s.layers), 1), n)).softmax(-1)

    needs = build(spec).needs(TOWER)
    features = values(layout.n_visual, width).to(dtype)
    signals = {s: signal(s) for s in sorted(needs, key=str)}
    if extra:
        have = {s.kind for s in needs}
        signals |= {Signal(k, (0,)): signal(Signal(k, (0,))) for k in Kind if k not in have and not k.is_decoder}
    return VisualTokens.of(features, layout, signals)


LAYER = 8  # of `DECODER`, to cut before


def cut_tokens_for(spec: str, n_images=3, n=36, seed=0, width=16, dtype=torch.float32, extra=False) -> VisualTokens:
    """Random tokens at a cut of which 36 of a 7 x 7 picture are left, with what a method reads there."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(n_images, *shape, generator=generator)

    def signal(s: Signal) -> torch.Tensor:
        return {
            Kind.LM_ROW: lambda: (3 * values(max(len(s.layers), 1), n + 9)).softmax(-1)[..., :n],
            Kind.LM_MASS: lambda: values(max(len(s.layers), 1)).sigmoid(),
            Kind.LM_TEXT_ROWS: lambda: (3 * values(N_TEXT, n + 9)).softmax(-1)[..., :n],
            Kind.LM_KEYS: lambda: values(n, HEADS, HEAD_DIM),
            Kind.LM_TEXT_KEYS: lambda: values(N_TEXT, HEADS, HEAD_DIM),
            Kind.LM_TEXT_STATES: lambda: values(N_TEXT, width),
            Kind.LM_FIRST_STATE: lambda: values(width),
            Kind.LM_EMBEDS: lambda: values(49, width),
            Kind.LM_TEXT_EMBEDS: lambda: values(N_TEXT, width),
        }[s.kind]()

    reads = build(spec).reads(LAYER)
    features = values(n, width).to(dtype)
    index = torch.rand(n_images, 49, generator=generator).argsort(1)[:, :n].sort(1).values
    signals = {s: signal(s) for s in sorted(reads, key=str)}
    if extra:
        have = {s.kind for s in reads}
        signals |= {Signal(k, (LAYER,)): signal(Signal(k, (LAYER,))) for k in Kind if k.is_decoder and k not in have}
    return replace(VisualTokens.of(features, grid_layout(7, 7), signals), index=index)


def n_keeps(spec: str, layout: Layout) -> list[int]:
    """Budgets worth trying: the least, a few in between, all."""
    n, least = layout.n_visual, build(spec).min_keep(layout)
    return sorted({k for k in (least, least + 1, n // 4, n // 2, n - 1, n) if max(least, 1) <= k <= n})


def most_kept(spec: str, n_keep: int, layout: Layout) -> int:
    """The most tokens that a method whose count the picture decides may keep."""
    if build(spec).takes_budget and spec.lower().startswith("vidcom2:faithful=true"):
        return n_keep + layout.frames[0]  # every frame is rounded by itself, and keeps one token at least
    if spec.lower().startswith("framefusion:faithful=true"):
        return layout.n_visual  # where too few tokens are similar
    return n_keep


def scaled(spec: str) -> str:
    """The same for a tower of a few layers."""
    return spec.replace("start_layer=22", "start_layer=2").replace("start_layer=-8", "start_layer=-3")
