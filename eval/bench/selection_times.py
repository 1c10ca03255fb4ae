"""Seconds that selecting takes, by method and number of visual tokens, without a model.

python -m tokprune.eval.bench.selection_times --out eval/results/selection-times.jsonl

Seconds are CPU time of one thread, so that other work on the machine counts little. Features are as wide as those of a
7B model. Every measurement runs in a process of its own, which is ended at a limit of time or memory. Of methods about
videos, the share of the prefill of a 7B shape is measured too: its FLOPs by the ledger, at the rate of one decoder
layer's products on the same machine.
"""

from __future__ import annotations

import datetime
import functools
import json
import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer

from tokprune.core.budget import Budget
from tokprune.core.files import write_text
from tokprune.core.layout import Layout, frames_layout, grid_layout
from tokprune.core.registry import nearest
from tokprune.core.signals import Kind, Signal, Tower
from tokprune.core.tokens import Stage, VisualTokens
from tokprune.cost.shapes import known_shape
from tokprune.methods import METHODS, build_method

WIDTH, TOWER_WIDTH, HEADS, HEAD_DIM, N_TEXT = 3584, 1024, 16, 64, 64
GRIDS = {576: (24, 24), 1024: (32, 32), 4096: (64, 64), 16384: (128, 128), 32768: (128, 256)}
FRAME = (8, 8)  # of videos, tokens
VIDEO = ("dycoke", "evs", "fastvid", "framefusion", "vidcom2")
BUDGETED = {"dycoke": "dycoke:k=none"}
TOWER, LAYER = Tower(n_layers=24, has_cls=True), 8
KEEP, SHAPE, CLIP = 0.25, "qwen2.5-vl-7b", (64, 14, 14)
GIB = 2**30


@dataclass
class Timed:
    """One method on one number of tokens.

    Args:
        what: "selection" of a picture, "share" of the clip, or "prefill" of the shape with the clip.
        method: as it was built.
        n_visual, n_kept: tokens of one picture or video, and the budget.
        seconds: median of the rounds; None where a limit was met first.
        rounds: how many.
        stopped: which limit was met: "time" or "memory"; "" for none.
    """

    what: str
    method: str
    n_visual: int
    n_kept: int
    seconds: float | None
    rounds: int
    stopped: str
    limit_s: float
    limit_gib: float
    device: str
    threads: int
    torch: str
    date: str


def names() -> list[str]:
    """Methods of the registry that need no trained file."""
    found = [name for name in METHODS.own_names() if name not in METHODS.aliases]
    return [name for name in found if not METHODS.load(name).needs_file]


def layout_of(name: str, n: int) -> Layout:
    """A picture, or of methods about videos frames of 8 x 8 tokens."""
    if name in VIDEO:
        return frames_layout(n // (FRAME[0] * FRAME[1]), *FRAME)
    return grid_layout(*GRIDS[n])


def tokens_for(method: Any, layout: Layout) -> VisualTokens:
    """Tokens of a few kinds with noise, and everything that a method reads."""
    generator = torch.Generator().manual_seed(0)
    n = layout.n_visual

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator)

    def signal(s: Signal) -> torch.Tensor:
        n_layers = max(len(s.layers), 1)
        shapes = {
            Kind.KEYS: (n_layers, n, HEADS, HEAD_DIM),
            Kind.TOWER_STATES: (1, n, TOWER_WIDTH),
            Kind.CLS_STATE: (layout.n_crops, WIDTH),
            Kind.TEXT_EMBEDS: (N_TEXT, WIDTH),
            Kind.PIXELS: (1, n, 3 * 28 * 28),
            Kind.LM_KEYS: (n, 4, 128),
            Kind.LM_TEXT_KEYS: (N_TEXT, 4, 128),
            Kind.LM_TEXT_STATES: (N_TEXT, WIDTH),
            Kind.LM_FIRST_STATE: (WIDTH,),
            Kind.LM_EMBEDS: (n, WIDTH),
            Kind.LM_TEXT_EMBEDS: (N_TEXT, WIDTH),
        }
        if s.kind in shapes:
            return values(*shapes[s.kind])
        if s.kind is Kind.LM_MASS:
            return values(n_layers).sigmoid()
        rows = (N_TEXT, n) if s.kind is Kind.LM_TEXT_ROWS else (n_layers, n)
        return (3 * values(*rows)).softmax(-1)

    between = method.stage is Stage.DECODER
    needs = method.reads(LAYER) if between else method.needs(TOWER)
    kinds = torch.randn(256, WIDTH, generator=generator)
    per_frame = n // layout.n_crops if layout.is_video else n
    place = torch.arange(n) % per_frame * len(kinds) // per_frame
    features = kinds[place][None] + 0.5 * values(n, WIDTH)
    tokens = VisualTokens.of(features, layout, {s: signal(s) for s in sorted(needs, key=str)})
    return replace(tokens, index=torch.arange(n)[None]) if between else tokens


def selection(spec: str, layout: Layout) -> Callable[[], Any]:
    """What is timed: one picture's selection."""
    method: Any = build_method(spec)[0]
    tokens = tokens_for(method, layout)
    if method.is_filter:
        return lambda: method.passes(tokens)
    n_keep = Budget(keep_ratio=KEEP).n_keep(layout.n_visual)
    return lambda: method.select(tokens, n_keep)


def layer_rate(n: int = 1024) -> Callable[[], Any]:
    """The products and the attention of one decoder layer of the shape, over n columns."""
    text = known_shape(SHAPE).text
    wide, narrow = text.n_heads * text.head_dim, text.n_kv_heads * text.head_dim
    sides = [(text.width, wide), (text.width, 2 * narrow), (wide, text.width), (text.width, 2 * text.mlp_width)]
    weights = [torch.randn(a, b) for a, b in [*sides, (text.mlp_width, text.width)]]
    inputs = [torch.randn(n, len(w)) for w in weights]
    heads = torch.randn(3, 1, text.n_heads, n, text.head_dim)

    def run() -> None:
        for x, w in zip(inputs, weights, strict=True):
            x @ w
        F.scaled_dot_product_attention(*heads)

    return run


def layer_flops(n: int = 1024) -> int:
    """Of `layer_rate`; attention counted dense."""
    text = known_shape(SHAPE).text
    wide, narrow = text.n_heads * text.head_dim, text.n_kv_heads * text.head_dim
    weights = text.width * (2 * wide + 2 * narrow + 3 * text.mlp_width)
    return 2 * n * weights + 4 * n * n * wide


def prefill_flops(n_visual: int) -> int:
    """Of the language model of the shape, with text around the video."""
    return int(known_shape(SHAPE).read(n_visual + N_TEXT).llm.flops)


def seconds_of(make: Callable[[], Callable[[], Any]], limit_s: float, limit_gib: float) -> tuple[list[float], str]:
    """Rounds of a call in a process of its own, and the limit that it met."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(make, limit_gib, theirs))
    child.start()
    theirs.close()
    found: list[float] = []
    stopped = ""
    try:
        if not ours.poll(10 * limit_s + 60) or ours.recv() != "ready":  # data are made
            stopped = "memory"
        while not stopped and len(found) < 3:
            if not ours.poll(limit_s):
                stopped = "time"
            elif isinstance(said := ours.recv(), float):
                found.append(said)
                if said > limit_s / 10:
                    break
            else:
                stopped = "memory"
    except EOFError:
        stopped = "memory"
    child.kill()
    child.join()
    return found, "" if found else stopped


def _measure(make: Callable[[], Callable[[], Any]], limit_gib: float, pipe: Any) -> None:
    """In the other process: time rounds until it is ended."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gib * GIB), resource.RLIM_INFINITY))
    try:
        with torch.no_grad():
            run = make()
            pipe.send("ready")
            for _ in range(3):
                begun = time.thread_time()
                run()
                pipe.send(time.thread_time() - begun)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        pipe.send("memory")
    os._exit(0)


def measured(methods: list[str], sizes: list[int], limit_s: float, limit_gib: float) -> Iterator[Timed]:
    """Every method at every size; larger sizes are left out where a limit was met."""
    common = {"limit_s": limit_s, "limit_gib": limit_gib, **conditions_of_machine()}
    stopped = dict.fromkeys(methods, "")
    for n in sizes:
        for name in methods:
            spec, layout, rounds = BUDGETED.get(name, name), layout_of(name, n), []
            if not stopped[name]:
                make = functools.partial(selection, spec, layout)
                rounds, stopped[name] = seconds_of(make, limit_s, limit_gib)
            yield _row("selection", spec, layout, rounds, stopped[name], common)
    videos = [name for name in methods if name in VIDEO]
    if not videos:
        return
    layout = frames_layout(*CLIP)
    rounds, met = seconds_of(layer_rate, limit_s, limit_gib)
    if rounds:
        rate = layer_flops() / median(rounds)
        rounds = [prefill_flops(layout.n_visual) / rate]
    yield _row("prefill", SHAPE, layout, rounds, met, common)
    for name in videos:
        spec = BUDGETED.get(name, name)
        rounds, met = seconds_of(functools.partial(selection, spec, layout), limit_s, limit_gib)
        yield _row("share", spec, layout, rounds, met, common)


def _row(what: str, spec: str, layout: Layout, rounds: list[float], stopped: str, common: dict[str, Any]) -> Timed:
    n_kept = Budget(keep_ratio=KEEP).n_keep(layout.n_visual)
    middle = median(rounds) if rounds else None
    return Timed(what, spec, layout.n_visual, n_kept, middle, len(rounds), stopped, **common)


def conditions_of_machine() -> dict[str, Any]:
    """What times depend on."""
    return {
        "device": f"{platform.machine()} cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def main(
    out: Annotated[Path, typer.Option(help="Where to write the rows as JSONL; rows of other methods stay.")],
    methods: Annotated[str, typer.Option(help="Names, separated by commas. Default: all.")] = "",
    sizes: Annotated[str, typer.Option(help="Numbers of tokens, of 576,1024,4096,16384,32768.")] = "",
    limit: Annotated[float, typer.Option(help="Seconds after which a measurement is ended.")] = 60,
    memory: Annotated[float, typer.Option(help="GiB of memory that a measurement may take.")] = 8,
) -> None:
    """Measure how long selecting takes."""
    chosen = [name for name in methods.split(",") if name] or names()
    for name in chosen:
        if name not in names():
            near = nearest(name, names())
            raise typer.BadParameter(f"no method {name!r} to time{f': did you mean {near!r}?' if near else ''}")
    wanted = [int(n) for n in sizes.split(",") if n] or list(GRIDS)
    torch.set_num_threads(1)
    for row in measured(chosen, wanted, limit, memory):
        typer.echo(f"{row.what} {row.method} {row.n_visual}: {row.seconds} {row.stopped}")
        old = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        key = (row.what, row.method, row.n_visual)
        kept = [r for r in old if (r["what"], r["method"], r["n_visual"]) != key]
        write_text(out, "".join(json.dumps(r) + "\n" for r in [*kept, asdict(row)]))


if __name__ == "__main__":
    typer.run(main)
